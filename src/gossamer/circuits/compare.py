"""Circuits of a run's sparse model beside those of its dense original, as a record in the run's directory.

``circuits/TASK/circuits.json`` is the record, ``scores.safetensors`` beside it holds the scores of all edges of both
models. The keys are documented in ``docs/metrics.md``.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file
from transformers import PreTrainedModel

from gossamer.circuits.ability import Ability, measure_ability, require_ability
from gossamer.circuits.metrics import Curve
from gossamer.circuits.search import LEVELS, Circuits, find_circuits
from gossamer.circuits.tasks.base import Prompts, Task
from gossamer.files import written_beside
from gossamer.models.pretrained import load_dense
from gossamer.training.run import Run, load_sparse, versions


def compare_circuits(
    run: Run,
    task: Task,
    *,
    examples: int = 100,
    corruption: str | None = None,
    seed: int = 0,
    steps: int = 5,
    forced: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Find and prove circuits of both models, and write the record.

    Args:
        run: a finished run.
        task: what the models do.
        examples: how many prompts.
        corruption: kind of corrupted prompts; the task's first if None.
        seed: of the prompts.
        steps: of EAP-IG; 0 for EAP.
        forced: go on even if a model cannot do the task.
        progress: is told in a few words what is being done.

    Raises:
        GossamerError: if the run is not finished; if a model cannot do the task.
    """
    dense, tokenizer = load_dense(run.dense)
    prompts = task.prompts(tokenizer, examples, seed=seed, corruption=corruption)
    record: dict[str, Any] = {
        "task": task.name,
        "corruption": corruption or task.corruptions[0],
        "metric": prompts.metric,
        "prompts": len(prompts.kept),
        "dropped": len(prompts.dropped),
        "seed": seed,
        "ig_steps": steps,
        "ablation": "patch",
        "selection": "largest absolute score",
        "versions": versions(),
        "models": {},
    }
    models = {"dense": dense, "sparse": load_sparse(run)}
    abilities = {}
    for name, model in models.items():
        abilities[name] = measure_ability(model, prompts)
        require_ability(abilities[name], f"{task.name} ({name})", forced=forced)
    scores = {}
    for name, model in models.items():
        found, record["models"][name] = _of_model(name, model, prompts, abilities[name], steps, progress)
        scores[name] = found.scores.contiguous()
    with written_beside(run.folder / "circuits" / task.name) as staging:
        save_file(scores, staging / "scores.safetensors")
        (staging / "circuits.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _of_model(
    name: str,
    model: PreTrainedModel,
    prompts: Prompts,
    ability: Ability,
    steps: int,
    progress: Callable[[str], None],
) -> tuple[Circuits, dict[str, Any]]:
    started = time.perf_counter()
    found = find_circuits(model, prompts, steps=steps, progress=lambda what: progress(f"{name}: {what}"))
    seconds = time.perf_counter() - started
    edges = found.curves["edges"]
    pruned = found.edges(edges.first_size) if edges.first_size is not None else None
    return found, {
        "accuracy": ability.accuracy,
        "metric_clean": ability.clean,
        "metric_corrupted": ability.corrupted,
        "seconds": seconds,
        "peak_memory_megabytes": _peak_megabytes(),
        "levels": {level: _curve_record(curve) for level, curve in found.curves.items()},
        "edges_after_pruning": None if pruned is None else int(pruned.sum()),
    }


def _peak_megabytes() -> float:
    """Of this process so far; torch's allocations on a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _curve_record(curve: Curve) -> dict[str, Any]:
    return {
        "total": curve.total,
        "metric_nothing": curve.nothing,
        "metric_everything": curve.everything,
        "first_size": curve.first_size,
        "lasting_size": curve.lasting_size,
        "cpr": curve.cpr,
        "cmd": curve.cmd,
        "points": [asdict(point) for point in curve.points],
        "shares": [point.size for point in curve.shares],
    }


def comparison_tables(record: dict[str, Any]) -> list[Table]:
    """The record as the terminal shows it."""
    dense, sparse = record["models"]["dense"], record["models"]["sparse"]
    ability = Table(title=f"{record['task']}, corruption {record['corruption']}, {record['prompts']} prompts")
    for column in ("model", "right (%)", "metric, clean", "metric, corrupted", "seconds", "peak memory (MB)"):
        ability.add_column(column, justify="left" if column == "model" else "right")
    for name, model in record["models"].items():
        numbers = (f"{model[key]:.3f}" for key in ("metric_clean", "metric_corrupted"))
        rest = (f"{model['seconds']:.0f}", f"{model['peak_memory_megabytes']:,.0f}")
        ability.add_row(name, f"{100 * model['accuracy']:.1f}", *numbers, *rest)
    sizes = Table(title="Units that explain 90 % (first crossing; for good)")
    for column in ("level", "of", "dense", "sparse", "dense : sparse", "CPR dense", "CPR sparse"):
        sizes.add_column(column, justify="left" if column == "level" else "right")
    for level in LEVELS:
        a, b = dense["levels"][level], sparse["levels"][level]
        ratio = f"{a['first_size'] / b['first_size']:.1f}" if a["first_size"] and b["first_size"] else "-"
        counts = (f"{_count(x['first_size'])}; {_count(x['lasting_size'])}" for x in (a, b))
        sizes.add_row(level, f"{a['total']:,}", *counts, ratio, f"{a['cpr']:.3f}", f"{b['cpr']:.3f}")
    return [ability, sizes]


def _count(size: int | None) -> str:
    return "-" if size is None else f"{size:,}"
