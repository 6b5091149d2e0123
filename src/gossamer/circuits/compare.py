"""Circuits of a run's sparse model beside those of its dense original, as a record in the run's directory.

``circuits/TASK/circuits.json`` is the record (with another corruption than the task's first, and under another ablation
than patching, ``TASK-CORRUPTION``, ``TASK-zero``, ``TASK-CORRUPTION-mean`` and so on),
``scores.safetensors`` beside it holds the scores of all edges of both models, ``links.json`` the attention links that
explain one prompt. The keys are documented in ``docs/metrics.md``.
"""

import json
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.circuits.ability import Ability, measure_ability, require_ability, require_known_tokens
from gossamer.circuits.activation_cache import Ablation
from gossamer.circuits.circuit_files import Circuit
from gossamer.circuits.graph import Graph, prune, top_edges
from gossamer.circuits.metrics import EXPLAINED, Curve
from gossamer.circuits.scores import find_score
from gossamer.circuits.scores.eap_ig_inputs import EAP_IG_INPUTS
from gossamer.circuits.search import LEVELS, Circuits, Level, find_circuits
from gossamer.circuits.tasks.base import Prompts, Task
from gossamer.errors import GossamerError
from gossamer.files import atomic_directory
from gossamer.runs.record import Run, load_both, versions
from gossamer.tables import Table


@dataclass(frozen=True)
class SearchConfig:
    """How circuits are looked for.

    Attributes:
        examples: prompts of each variation.
        corruption: kind of corrupted prompts; the task's first if None.
        seed: of the prompts.
        seeds: how many seeds, from ``seed`` on: a variation each.
        rephrased: a variation for each of the task's phrasings too, with the first seed.
        score: what ranks the units, by name.
        levels: kinds of units.
        ablation: what units outside a circuit carry. Links are left out with ``mean``, and with a score that is not
            defined for them.
        absolute: choose units by largest absolute score; else those that help most, by lowest score.
        batch_size: rows in one forward pass.
        forced: go on even if a model cannot do the task.
        replace: put the record in the place of one that was made with other settings.
    """

    examples: int = 100
    corruption: str | None = None
    seed: int = 0
    seeds: int = 1
    rephrased: bool = False
    score: str = EAP_IG_INPUTS.name
    levels: tuple[Level, ...] = LEVELS
    ablation: Ablation = "patch"
    absolute: bool = True
    batch_size: int = 16
    forced: bool = False
    replace: bool = False


def compare_circuits(
    run: Run, task: Task, config: SearchConfig | None = None, *, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Find circuits of both models, and write the record.

    Args:
        run: a finished run.
        task: what the models do.
        config: how circuits are looked for; the defaults if None.
        progress: is told in a few words what is being done.

    Raises:
        GossamerError: if the run is not finished; if a model cannot do the task; if the task has no phrasings and
            ``rephrased`` asks for them; if links alone are asked for under mean ablation or a score without them; if
            there is a record of other settings, before anything is searched.
    """
    config = config or SearchConfig()
    if config.rephrased and not task.phrasings:
        raise GossamerError(f"task {task.name} has no other phrasings")
    if config.ablation == "mean" and config.levels == ("links",):
        raise GossamerError("links have no mean to carry; ablate them by patch or zero")
    score = find_score(config.score)
    if score.links is None and config.levels == ("links",):
        raise GossamerError(f"the score {score.name} is not defined for links; choose another one")
    corruption = config.corruption or task.corruptions[0]
    settings: dict[str, Any] = {
        **_identity(task, corruption, config.ablation),
        "examples": config.examples,
        "seed": config.seed,
        "seeds": config.seeds,
        "rephrased": config.rephrased,
        "levels": list(config.levels),
        "score": score.name,
        "selection": "largest absolute score" if config.absolute else "lowest score",
    }
    folder = _folder(run, task, corruption, config.ablation)
    dense, sparse, tokenizer = load_both(run)
    models = {"dense": dense, "sparse": sparse}
    variations: list[tuple[int, str | None]] = [(config.seed + more, None) for more in range(config.seeds)]
    if config.rephrased:
        variations += [(config.seed, phrasing) for phrasing in task.phrasings]
    prompts = [
        task.prompts(tokenizer, config.examples, seed=seed, corruption=config.corruption, phrasing=phrasing)
        for seed, phrasing in variations
    ]
    for model in models.values():
        for some in prompts:
            require_known_tokens(model, tokenizer, some)
    settings["checksum"] = _checksum((each.clean, each.corrupted) for some in prompts for each in some.kept)
    settings["answers_checksum"] = _checksum((each.answers, each.wrong) for some in prompts for each in some.kept)
    if not config.replace:
        _check_record(folder, settings)
    abilities = {}
    for name, model in models.items():
        abilities[name] = [measure_ability(model, some) for some in prompts]
        for ability in abilities[name]:
            require_ability(ability, f"{task.name} ({name})", forced=config.forced)
    found: dict[str, list[Circuits]] = {name: [] for name in models}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for place, some in enumerate(prompts):
        part = f"variation {place + 1} of {len(prompts)}, " if len(prompts) > 1 else ""
        for name, model in models.items():
            told = f"{part}{name}: "
            circuits, record = _of_model(model, some, abilities[name][place], config, told, progress)
            found[name].append(circuits)
            records[name].append(record)
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
    with atomic_directory(folder) as staging:
        save_file({name: circuits[0].scores.contiguous() for name, circuits in found.items()},
                  staging / "scores.safetensors")  # fmt: skip
        links = _links_of_one_prompt({name: circuits[0] for name, circuits in found.items()}, tokenizer)
        (staging / "links.json").write_text(json.dumps(links) + "\n")
        (staging / "circuits.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _folder(run: Run, task: Task, corruption: str, ablation: Ablation) -> Path:
    parts = [task.name]
    if corruption != task.corruptions[0]:
        parts.append(corruption)
    if ablation != "patch":
        parts.append(ablation)
    return run.folder / "circuits" / "-".join(parts)


def _identity(task: Task, corruption: str, ablation: Ablation) -> dict[str, Any]:
    """What a record is of; its folder's name alone does not tell."""
    return {
        "task": task.name,
        "file_checksum": task.file_checksum,
        "corruption": corruption,
        "ablation": ablation,
        "metric": task.metric,
    }


def _checksum(tokens: Iterable[tuple[Tensor, Tensor]]) -> int:
    return zlib.crc32(json.dumps([[part.tolist() for part in parts] for parts in tokens]).encode())


_OTHERWISE = {
    "file_checksum": "in another file, or in what stood in it before",
    "checksum": "on other prompts",
    "answers_checksum": "with other answers to the prompts",
}


def _difference(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """In words, how a record was made otherwise; None if it was not."""
    for key, value in settings.items():
        if key in record and record[key] != value:
            return _OTHERWISE.get(key) or f"with {key} {record[key]}, not {value}"
    return None


def _check_record(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to put a record in the place of one that was made otherwise."""
    try:
        before = json.loads((folder / "circuits.json").read_text())
    except (OSError, ValueError):
        return
    if "ig_steps" in before:  # Records once had the steps of EAP-IG in the place of the score's name.
        before["score"] = {0: "eap", 5: "eap-ig-inputs"}.get(
            before["ig_steps"], f"{before['ig_steps']} steps of EAP-IG"
        )
    if difference := _difference(before, settings):
        raise GossamerError(f"{folder} holds circuits found {difference}; --replace puts the new ones in their place")


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
    has_links = config.ablation != "mean" and score.links is not None
    found = find_circuits(
        model,
        prompts,
        levels=tuple(level for level in config.levels if level != "links" or has_links),
        score=score,
        ablation=config.ablation,
        absolute=config.absolute,
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
        "levels": {level: _curve_record(curve) for level, curve in found.curves.items()},
        "circuit": _circuit_record(found),
    }


def _circuit_record(found: Circuits) -> dict[str, Any]:
    """What the smallest circuits at 90 % hold after pruning what is cut off."""
    graph, sizes = found.graph, {level: curve.first_size for level, curve in found.curves.items()}
    is_head = torch.tensor([graph.source_name(source).startswith("a") for source in range(graph.sources)])
    record: dict[str, Any] = {}
    if sizes.get("nodes") is not None:
        nodes = found.nodes(sizes["nodes"] or 0)
        record["nodes"] = {"heads": int((nodes & is_head).sum()), "mlps": int((nodes & ~is_head)[1:].sum())}
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
    """The circuit of the first prompt, as many links as explain 90 % on average."""
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


def load_circuit(
    run: Run,
    task: Task,
    model: str,
    edges: int | None = None,
    *,
    corruption: str | None = None,
    ablation: Ablation = "patch",
) -> Circuit:
    """A circuit of edges from what :func:`compare_circuits` left, pruned.

    Args:
        run: whose circuits have been found.
        task: what the models do.
        model: ``dense`` or ``sparse``.
        edges: how many of the best are kept; None: as many as explain 90 %.
        corruption: kind of corrupted prompts with which it was found; the task's first if None.
        ablation: under which it was found.

    Raises:
        GossamerError: if there is no such record, or its place is taken by that of another task; if no circuit explains
            90 % and ``edges`` is None.
    """
    corruption = corruption or task.corruptions[0]
    folder = _folder(run, task, corruption, ablation)
    if not (folder / "circuits.json").exists():
        raise GossamerError(f"{run.folder} has no circuits of {folder.name}; find them with gossamer circuits")
    try:
        record = json.loads((folder / "circuits.json").read_text())
        if difference := _difference(record, _identity(task, corruption, ablation)):
            raise GossamerError(
                f"{folder} holds circuits found {difference}; find those of {task.name} with gossamer circuits"
            )
        scores = load_file(folder / "scores.safetensors")[model]
        units = record["models"][model]["units"]
        if "edges" not in record["models"][model]["levels"]:
            raise GossamerError(
                f"the circuits of {folder.name} in {run.folder} were found without edges; find those too"
            )
        size = edges if edges is not None else record["models"][model]["levels"]["edges"]["first_size"]
        graph = Graph(units["layers"], units["heads"], units["parallel"])
    except (ValueError, KeyError, SafetensorError) as error:
        raise GossamerError(f"the records in {folder} are damaged ({error}); find the circuits again") from error
    if size is None:
        raise GossamerError(f"no circuit of {folder.name} that was measured explains 90 %; say how many edges to keep")
    kept = prune(graph, top_edges(graph, scores, size, absolute=record["selection"].startswith("largest")))
    return Circuit(graph, units["width"], scores, kept)


def _peak_megabytes() -> float:
    """Of this process so far; torch's allocations on a GPU."""
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


SHOWN = (0.001, 0.01, 0.1)
"""Kept shares whose faithfulness the terminal shows."""


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
    sizes = Table(title=f"Units that explain {100 * EXPLAINED:.0f} % (first crossing; for good)")
    for column in ("level", "of", "dense", "sparse", "dense : sparse", "CPR dense", "CPR sparse"):
        sizes.add_column(column, justify="left" if column == "level" else "right")
    explained = Table(title="Faithfulness by kept share")
    for column in ("level", "model", *(f"{100 * share:g} %" for share in SHOWN), "CMD"):
        explained.add_column(column, justify="left" if column in ("level", "model") else "right")
    for level in dense["levels"]:
        a, b = dense["levels"][level], sparse["levels"][level]
        ratio = f"{a['first_size'] / b['first_size']:.1f}" if a["first_size"] and b["first_size"] else "-"
        counts = (f"{_count(x['first_size'])}; {_count(x['lasting_size'])}" for x in (a, b))
        sizes.add_row(level, f"{a['total']:,}", *counts, ratio, f"{a['cpr']:.3f}", f"{b['cpr']:.3f}")
        for name, curve in (("dense", a), ("sparse", b)):
            at = {point["size"]: point["faithfulness"] for point in curve["points"]}
            shown = [at.get(round(share * curve["total"])) for share in SHOWN]
            cells = ("-" if value is None else f"{value:.3f}" for value in shown)
            explained.add_row(level, name, *cells, f"{curve['cmd']:.3f}")
    tables = [ability, sizes, explained, _pruned_table(record)]
    return tables + ([_spread_table(record)] if len(record["variations"]) > 1 else [])


def _pruned_table(record: dict[str, Any]) -> Table:
    table = Table(title="The circuits at first crossing, less what is cut off")
    for column in ("model", "circuit of", "heads", "MLPs", "edges", "links a prompt"):
        table.add_column(column, justify="left" if column in ("model", "circuit of") else "right")
    for name, model in record["models"].items():
        for level, counts in model["circuit"].items():
            links = counts.get("links_per_prompt")
            cells = [_count(counts.get(key)) for key in ("heads", "mlps", "edges")]
            table.add_row(name, level, *cells, "-" if links is None else f"{links:,.1f}")
    return table


def _spread_table(record: dict[str, Any]) -> Table:
    """Mean ± standard deviation of the sizes at first crossing over the variations."""
    table = Table(title=f"Over {len(record['variations'])} variations (seeds and phrasings): mean ± standard deviation")
    for column in ("model", *record["models"]["dense"]["levels"], "overlap of edges"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in record["models"]:
        cells = []
        for level in record["models"][name]["levels"]:
            sizes = [each["models"][name]["levels"][level]["first_size"] for each in record["variations"]]
            known = [size for size in sizes if size is not None]
            cells.append(f"{mean(known):,.0f} ± {stdev(known):,.0f}" if len(known) > 1 else "-")
        overlap = record["overlap"][name]
        table.add_row(name, *cells, "-" if overlap is None else f"{overlap:.2f}")
    return table


def _count(size: int | None) -> str:
    return "-" if size is None else f"{size:,}"
