"""Compare circuits of a run's sparse model with those of its dense original, and record them in the run's directory.

The record is ``circuits/TASK/circuits.json``. If the corruption is not the task's first, or the ablation is not
patching, the folder is ``TASK-CORRUPTION``, ``TASK-zero``, ``TASK-CORRUPTION-mean`` and so on. In the same folder,
``scores.safetensors`` holds the scores of all edges of both models, and ``links.json`` the attention links that explain
one prompt. The keys are documented in ``docs/metrics.md``.
"""

import json
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.circuits.ability import Ability, measure_ability, require_ability, require_known_tokens
from gossamer.circuits.ablations import ABLATIONS, find_ablation
from gossamer.circuits.config import SearchConfig
from gossamer.circuits.links_inside import links_inside, links_of_heads
from gossamer.circuits.mask_search import UnitSet
from gossamer.circuits.metrics import Curve
from gossamer.circuits.records import check_record, circuit_folder, identity
from gossamer.circuits.scores import find_score
from gossamer.circuits.search import Circuits, find_circuits
from gossamer.circuits.tasks.base import Prompts, Task
from gossamer.errors import GossamerError
from gossamer.files import atomic_directory
from gossamer.locks import locked
from gossamer.runs.record import Run, load_both, versions


def compare_circuits(
    run: Run, task: Task, config: SearchConfig | None = None, *, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Find circuits of both models and write the record.

    Args:
        run: a finished run.
        task: the task.
        config: settings of the search; the defaults if None.
        progress: called with a short description of the current step.

    Raises:
        GossamerError: if the run is not finished; if a model cannot do the task; if ``rephrased`` is set but the task
            has no phrasings; if only links are requested and the ablation or the score is not defined for them; before
            the search, if there is a record with other settings; if another process is working on the record.
    """
    config = config or SearchConfig()
    _check_config(task, config)
    dense, sparse, tokenizer = load_both(run)
    return compare_models(dense, sparse, tokenizer, task, run.folder, config, progress=progress)


def compare_models(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    root: Path,
    config: SearchConfig,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """:func:`compare_circuits` for models that do not come from a run; the record is written to ``root/circuits``."""
    _check_config(task, config)
    corruption = config.corruption or task.corruptions[0]
    folder = circuit_folder(root, task, corruption, config.ablation)
    with locked(folder):
        return _compare({"dense": dense, "sparse": sparse}, tokenizer, task, folder, config, progress)


def _compare(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    folder: Path,
    config: SearchConfig,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    corruption = config.corruption or task.corruptions[0]
    variations = _variations(task, config)
    prompts = [
        task.prompts(tokenizer, config.examples, seed=seed, corruption=config.corruption, phrasing=phrasing)
        for seed, phrasing in variations
    ]
    for model in models.values():
        for some in prompts:
            require_known_tokens(model, tokenizer, some)
    settings = {**identity(task, corruption, config.ablation), **_settings(config), **_checksums(prompts)}
    if not config.replace:
        check_record(folder, settings)
    found, records = _search(models, prompts, task, config, progress)
    record = {
        **settings,
        "prompts": len(prompts[0].kept),
        "dropped": len(prompts[0].dropped),
        "versions": versions(),
        "models": {name: records[name][0] for name in models},
        "variations": [
            {"seed": seed, "phrasing": phrasing, "models": {name: records[name][place] for name in models}}
            for place, (seed, phrasing) in enumerate(variations)
        ],
        "overlap": {name: _overlap(circuits) for name, circuits in found.items()},
    }
    first = {name: circuits[0] for name, circuits in found.items()}
    with atomic_directory(folder, replace=True) as staging:
        scores = {name: circuits.scores.contiguous() for name, circuits in first.items()}
        save_file(scores, staging / "scores.safetensors")
        (staging / "links.json").write_text(json.dumps(_links_of_one_prompt(first, tokenizer)) + "\n")
        (staging / "circuits.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _check_config(task: Task, config: SearchConfig) -> None:
    if config.rephrased and not task.phrasings:
        raise GossamerError(f"task {task.name} has no other phrasings")
    if find_ablation(config.ablation).links is None and config.levels == ("links",):
        names = " or ".join(name for name, ablation in ABLATIONS.items() if ablation.links is not None)
        raise GossamerError(f"links have no {config.ablation} to carry; ablate them by {names}")
    score = find_score(config.score)
    if not score.has_links and config.levels == ("links",):
        raise GossamerError(f"the score {score.name} is not defined for links; choose another one")


def _variations(task: Task, config: SearchConfig) -> list[tuple[int, str | None]]:
    """Seed and phrasing of each set of prompts to search, in order."""
    seeds: list[tuple[int, str | None]] = [(config.seed + more, None) for more in range(config.seeds)]
    return seeds + ([(config.seed, phrasing) for phrasing in task.phrasings] if config.rephrased else [])


def _settings(config: SearchConfig) -> dict[str, Any]:
    """Settings of the search in the record; a new search must match them to overwrite it."""
    return {
        "examples": config.examples,
        "seed": config.seed,
        "seeds": config.seeds,
        "rephrased": config.rephrased,
        "levels": list(config.levels),
        "score": find_score(config.score).name,
        "selection": "lowest score" if config.signed else "largest absolute score",
    }


def _checksums(prompts: Sequence[Prompts]) -> dict[str, int]:
    kept = [each for some in prompts for each in some.kept]
    return {
        "checksum": _checksum((each.clean, each.corrupted) for each in kept),
        "answers_checksum": _checksum((each.answers, each.wrong) for each in kept),
    }


def _checksum(tokens: Iterable[tuple[Tensor, Tensor]]) -> int:
    return zlib.crc32(json.dumps([[part.tolist() for part in parts] for parts in tokens]).encode())


def _search(
    models: Mapping[str, PreTrainedModel],
    prompts: Sequence[Prompts],
    task: Task,
    config: SearchConfig,
    progress: Callable[[str], None],
) -> tuple[dict[str, list[Circuits]], dict[str, list[dict[str, Any]]]]:
    """Find circuits of each model on the prompts of each variation; also return their record entries."""
    abilities = {name: [measure_ability(model, some) for some in prompts] for name, model in models.items()}
    for name in models:
        for ability in abilities[name]:
            require_ability(ability, f"{task.name} ({name})", forced=config.force)
    found: dict[str, list[Circuits]] = {name: [] for name in models}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for place, some in enumerate(prompts):
        part = f"variation {place + 1} of {len(prompts)}, " if len(prompts) > 1 else ""
        links = links_of_heads(models["sparse"], some, config.batch_size)
        for name, model in models.items():
            circuits, record = _of_model(model, some, abilities[name][place], config, f"{part}{name}: ", progress)
            if "nodes" in record["circuit"]:
                record["circuit"]["nodes"]["links_inside"] = links_inside(circuits, links[name])
            found[name].append(circuits)
            records[name].append(record)
    return found, records


def _of_model(
    model: PreTrainedModel,
    prompts: Prompts,
    ability: Ability,
    config: SearchConfig,
    told: str,
    progress: Callable[[str], None],
) -> tuple[Circuits, dict[str, Any]]:
    started = time.perf_counter()
    score = find_score(config.score)
    has_links = find_ablation(config.ablation).links is not None and score.has_links
    found = find_circuits(
        model,
        prompts,
        levels=tuple(level for level in config.levels if level != "links" or has_links),
        score=score,
        ablation=config.ablation,
        absolute=not config.signed,
        batch_size=config.batch_size,
        progress=lambda what: progress(told + what),
    )
    return found, {
        "accuracy": ability.accuracy,
        "metric_clean": ability.clean,
        "metric_corrupted": ability.corrupted,
        "seconds": time.perf_counter() - started,
        "peak_memory_megabytes": _peak_megabytes(),
        "units": {
            "layers": found.graph.layers,
            "heads": found.graph.heads,
            "parallel": found.graph.parallel,
            "width": model.config.hidden_size,
        },
        "levels": {
            level: {**_curve_record(curve), "left_when_cut": found.left_when_cut[level]}
            for level, curve in found.curves.items()
        },
        "sets": {level: _sets_record(sets) for level, sets in found.sets.items()},
        "circuit": _circuit_record(found),
    }


def _sets_record(sets: Sequence[UnitSet]) -> dict[str, Any]:
    """Means over the sets: a single one, or of links one per prompt."""
    return {
        "size": mean(len(each) for each in sets),
        "kept": mean(each.kept for each in sets),
        "left_when_cut": mean(each.left_when_cut for each in sets),
        "sizes": [len(each) for each in sets],
    }


def _circuit_record(found: Circuits) -> dict[str, Any]:
    """Contents of the smallest circuits at 90 %, after pruning units that are cut off."""
    graph, sizes = found.graph, {level: curve.first_size for level, curve in found.curves.items()}
    is_head = torch.tensor([graph.source_name(source).startswith("a") for source in range(graph.sources)])
    record: dict[str, Any] = {}
    if sizes.get("nodes") is not None:
        nodes = found.nodes(sizes["nodes"] or 0)
        record["nodes"] = {
            "heads": int((nodes & is_head).sum()),
            "mlps": int((nodes & ~is_head)[1:].sum()),
            "names": [graph.source_name(source) for source in nodes.nonzero()[:, 0].tolist()],
        }
    if sizes.get("edges") is not None:
        edges = found.edges(sizes["edges"] or 0)
        used = edges.any(1)
        heads, mlps = int((used & is_head).sum()), int((used & ~is_head)[1:].sum())
        record["edges"] = {"edges": int(edges.sum()), "heads": heads, "mlps": mlps}
    if sizes.get("links") is not None:
        links = torch.cat([part.flatten(1).sum(1) for part in found.links(sizes["links"] or 0)])
        record["links"] = {"links_per_prompt": links.double().mean().item()}
    return record


def _overlap(found: list[Circuits]) -> float | None:
    """Mean Jaccard index of the edges at 90 % over all pairs of variations."""
    sizes = [circuits.curves["edges"].first_size if "edges" in circuits.curves else None for circuits in found]
    edges = [circuits.edges(size) for circuits, size in zip(found, sizes, strict=True) if size is not None]
    pairs = [int((a & b).sum()) / max(1, int((a | b).sum())) for a, b in combinations(edges, 2)]
    return mean(pairs) if pairs else None


def _links_of_one_prompt(found: dict[str, Circuits], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Links of the first prompt's circuit, as many as explain 90 % on average over the prompts."""
    if "links" not in found["dense"].curves:
        return None
    batch = found["dense"].batches[0]
    record: dict[str, Any] = {
        "prompt": tokenizer.decode(batch.clean[0]),
        "ids": batch.clean[0].tolist(),
        "tokens": [tokenizer.decode([token]) for token in batch.clean[0].tolist()],
        "answer": tokenizer.decode([int(batch.answers[0][0])]),
        "models": {},
    }
    for name, circuits in found.items():
        size = circuits.curves["links"].first_size
        kept = circuits.links(size if size is not None else circuits.curves["links"].total)[0][0]
        scores: Tensor = circuits.link_scores[0][0]
        links = [[*place, round(scores[tuple(place)].item(), 6)] for place in kept.nonzero().tolist()]
        record["models"][name] = {"size": size, "links": sorted(links, key=lambda link: -abs(link[-1]))}
    return record


def _peak_megabytes() -> float:
    """Peak memory of this process so far; on a GPU, torch's peak allocation."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
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
