"""Read and check the records in a run's directory: the required keys of each file, and the remedy if it is damaged.

``docs/metrics.md`` explains each key. Keys that only some runs have, or that earlier versions did not write, may be
missing. This module imports nothing heavy.
"""

from pathlib import Path
from typing import Any, TypedDict

from typing_extensions import NotRequired

from gossamer.errors import GossamerError
from gossamer.inputs import check, read_json, read_json_lines, reading
from gossamer.runs.upgrade import upgraded_metrics, upgraded_record

EVALUATE = "gossamer evaluate measures it anew, once it is out of the way"
SEARCH = "gossamer circuits finds them anew with --replace"
ATTENTION = "gossamer report --tokens 32 records it anew"
AGAIN = "put it back as it was, or begin anew with another --out"


class ConstraintWords(TypedDict):
    """The constraint: what is bounded, in words, and the bound."""

    name: str
    symbol: str
    label: str
    bound: float


class Measured(TypedDict):
    """Values measured before and after training."""

    loss_dense: float
    tokens_before: NotRequired[int | None]
    selected: NotRequired[dict[str, Any]]


class RunRecord(TypedDict):
    """``config.json``."""

    config: dict[str, Any]
    constraint: ConstraintWords
    versions: NotRequired[dict[str, str]]
    fingerprints: NotRequired[dict[str, str | None]]
    measured: NotRequired[Measured]


class TopkPoint(TypedDict):
    """A point of the top-k curve."""

    k: int
    renormalised: bool
    open_fraction: float
    loss: float


class Metrics(TypedDict):
    """``metrics.json``."""

    seq_len: int
    tokens_evaluated: int
    blocks_evaluated: NotRequired[int]
    loss_dense: float
    loss_sparse: float
    loss_dense_control: float | None
    loss_difference_stderr: NotRequired[float | None]
    kl: float
    kl_stderr: NotRequired[float | None]
    constraint_symbol: str
    constraint_label: str
    constraint_value: float
    constraint_bound: float
    constraint_stderr: NotRequired[float | None]
    constraint_met: bool
    open_fraction: float
    open_links_per_query: float
    open_fraction_per_layer: list[float]
    open_fraction_per_head: list[list[float]]
    topk: list[TopkPoint]
    topk_tokens_evaluated: NotRequired[int]
    topk_loss_dense: NotRequired[float]
    tokens_trained: NotRequired[int]
    tasks: NotRequired[dict[str, dict[str, Any]]]
    addition: NotRequired[dict[str, Any]]


class Step(TypedDict):
    """A line of ``training.jsonl``; all other values in it are numbers or null."""

    step: int


class Point(TypedDict):
    """A measured circuit."""

    size: int
    metric: float
    faithfulness: float


class Level(TypedDict):
    """The circuits of one kind of unit."""

    total: int
    points: list[Point]
    first_size: NotRequired[int | None]


class Units(TypedDict):
    """The units that circuits consist of."""

    layers: int
    heads: NotRequired[int]
    parallel: NotRequired[bool]
    width: NotRequired[int]


class CircuitsOfModel(TypedDict):
    """The circuits found in one model."""

    units: Units
    levels: dict[str, Level]


class CircuitsOfModels(TypedDict):
    """The circuits of both models."""

    dense: CircuitsOfModel
    sparse: CircuitsOfModel


class CircuitsRecord(TypedDict):
    """``circuits.json``."""

    models: CircuitsOfModels
    selection: NotRequired[str]


class LinksOfModel(TypedDict):
    """A circuit of links on one prompt: layer, head, query, key and score of each link."""

    size: int | None
    links: list[list[float]]


class LinksRecord(TypedDict):
    """``links.json``."""

    tokens: list[str]
    ids: NotRequired[list[int]]
    answer: str
    models: dict[str, LinksOfModel]


class AttentionOfModel(TypedDict):
    """The attention of one model on one prompt: all links, or only the open ones."""

    next: list[list[list[str | float]]]
    open: int
    triangles: NotRequired[str]
    links: NotRequired[list[list[float]]]


class AttentionOfPrompt(TypedDict):
    """The attention of both models on one prompt."""

    note: str
    tokens: list[str]
    models: dict[str, AttentionOfModel]


class AttentionRecord(TypedDict):
    """``attention.json``."""

    layers: int
    heads: int
    prompts: list[AttentionOfPrompt]


class Sentence(TypedDict):
    """A finding about some links, with its evidence."""

    text: str
    links: list[list[int]]
    evidence: dict[str, Any]


class Findings(TypedDict):
    """``findings.json``."""

    title: str
    positions: list[str]
    sentences: list[Sentence]


def read_run_record(folder: Path) -> dict[str, Any]:
    """Read ``config.json``, written by any version.

    Raises:
        GossamerError: if the folder is not a run, or if the file is damaged.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise GossamerError(f"{folder} is not a run: it has no readable config.json")
    found: dict[str, Any] = read_json(file, remedy=AGAIN)
    if "config" not in found:
        raise GossamerError(f"{folder} is not a run: its config.json is of another kind")
    with reading(file, AGAIN):
        found = upgraded_record(found)
        check(found, RunRecord)
    return found


def read_metrics(file: Path) -> dict[str, Any]:
    """Read ``metrics.json``, written by any version.

    Raises:
        GossamerError: naming the file and what is wrong with it.
    """
    found: dict[str, Any] = read_json(file, remedy=EVALUATE)
    with reading(file, EVALUATE):
        found = upgraded_metrics(found)
        check(found, Metrics)
        layers, heads = found["open_fraction_per_layer"], found["open_fraction_per_head"]
        if len(layers) != len(heads) or len({len(row) for row in heads}) > 1:
            raise ValueError("open_fraction_per_head has not as many layers and heads as it should")
    return found


def read_training_log(file: Path) -> tuple[dict[str, Any], ...]:
    """Read the lines of ``training.jsonl``; none if the file does not exist. An incomplete last line is left out.

    Raises:
        GossamerError: naming the file, the line and what is wrong with it.
    """
    if not file.exists():
        return ()
    rows: list[dict[str, Any]] = read_json_lines(file, Step, cut_off=True)
    for number, row in enumerate(rows, 1):
        with reading(f"{file}, line {number}"):
            check(row, dict[str, float | None])
    return tuple(rows)


def read_circuits(folder: Path) -> dict[str, Any]:
    """Read ``circuits.json`` in the folder of a task.

    Raises:
        GossamerError: naming the file and what is wrong with it.
    """
    return read_json(folder / "circuits.json", CircuitsRecord, remedy=SEARCH)


def read_links(file: Path) -> dict[str, Any] | None:
    """Read ``links.json``; None if it does not exist or contains null.

    Raises:
        GossamerError: naming the file and what is wrong with it.
    """
    if not file.exists():
        return None
    found: dict[str, Any] | None = read_json(file, LinksRecord | None, remedy=SEARCH)
    with reading(file, SEARCH):
        for name, model in (found or {"models": {}})["models"].items():
            _check_links(model["links"], len(found["tokens"]) if found else 0, 5, f"models.{name}.links")
    return found


def read_attention(file: Path) -> dict[str, Any] | None:
    """Read ``attention.json``; None if it does not exist.

    Raises:
        GossamerError: naming the file and what is wrong with it.
    """
    if not file.exists():
        return None
    found: dict[str, Any] = read_json(file, AttentionRecord, remedy=ATTENTION)
    with reading(file, ATTENTION):
        if not found["prompts"]:
            raise ValueError("it has no prompt")
        for prompt in found["prompts"]:
            for name, model in prompt["models"].items():
                _check_attention(model, len(prompt["tokens"]), found["layers"] * found["heads"], name)
    return found


def _check_attention(model: AttentionOfModel, tokens: int, heads: int, name: str) -> None:
    allowed = heads * tokens * (tokens + 1) // 2
    if "triangles" in model:
        if len(model["triangles"]) != -(-allowed // 3) * 4:
            raise ValueError(f"the attention of the model {name} is not of {allowed:,} links")
    else:
        _check_links(model["links"], tokens, 5, f"links of the model {name}")
    if len(model["next"]) != tokens:
        raise ValueError(f"next of the model {name} is not of {tokens} tokens")


def read_findings(file: Path) -> dict[str, Any] | None:
    """Read ``findings.json``; None if it does not exist.

    Raises:
        GossamerError: naming the file and what is wrong with it.
    """
    remedy = "gossamer demo measures them anew, in another --out"
    if not file.exists():
        return None
    found: dict[str, Any] = read_json(file, Findings, remedy=remedy)
    with reading(file, remedy):
        for place, sentence in enumerate(found["sentences"]):
            _check_links(sentence["links"], len(found["positions"]), 4, f"sentences[{place}].links")
    return found


def _check_links(links: list[list[float]], tokens: int, length: int, place: str) -> None:
    """Check links of ``length`` entries: layer, head, query and key, with a number after them if there are five."""
    for link in links:
        whole = link[:4]
        if len(link) != length or not all(isinstance(one, int) for one in whole) or min(whole) < 0:
            raise ValueError(f"{place}: {link} is no link")
        if max(whole[2:]) >= tokens:
            raise ValueError(f"{place}: {link} is between tokens of which there are {tokens}")
