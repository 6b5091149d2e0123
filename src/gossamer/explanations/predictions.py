"""Explain many predictions on natural text: how many links they need in a dense and in a sparse model.

1. Choose tokens that both models predict well, and only from their context: p is above :data:`LIKELY` with all links,
   and log p is at least :data:`GAIN` nats lower with none. The seeded choice is made separately per context length.
2. Search for sufficient and complete sets of each prediction in both models, with two seeds.
3. Write each row as soon as it is computed, so that an interrupted measurement continues where it stopped.
"""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.link_masks import LinkMasks
from gossamer.circuits.mask_search import MaskSearch, overlap
from gossamer.circuits.streams import Pattern, StreamHooks, attention_hooks
from gossamer.errors import GossamerError
from gossamer.explanations.config import Kind
from gossamer.explanations.prediction import Prediction
from gossamer.files import atomic_write_text
from gossamer.inputs import check, read_json_lines, read_text, reading
from gossamer.locks import locked
from gossamer.models.fingerprint import weights_fingerprint
from gossamer.models.frozen import frozen

LIKELY = 0.3
"""Probability above which a token counts as well predicted."""

GAIN = 2.0
"""Nats by which the token's log-probability has to drop when every link is cut."""

KINDS: tuple[Kind, ...] = ("sufficient", "complete")

_TRIED = 200
"""Number of positions in the text that are tried per requested prediction."""

_TOKENS_AT_ONCE = 2_048


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of some values."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Compute them from at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*quantiles(values, n=4, method="inclusive"))


ANOTHER = "give another --out"


@dataclass(frozen=True)
class PredictionsConfig:
    """Which predictions to explain.

    Attributes:
        lengths: numbers of context tokens.
        count: number of predictions per length.
        share: share of the metric to keep.
        seed: of the choice and of the searches.
    """

    lengths: Sequence[int]
    count: int
    share: float = 0.9
    seed: int = 0


class _Row(TypedDict):
    """The sets of one prediction and kind in one model."""

    length: int
    prediction: int
    model: Literal["dense", "sparse"]
    kind: Literal["sufficient", "complete"]
    candidates: int
    sizes: list[int]
    kept: list[float]
    left_when_cut: list[float]
    overlap: float


class _NoLinks(StreamHooks):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        return torch.zeros_like(v)


@torch.no_grad()
def choose_predictions(
    models: Mapping[str, PreTrainedModel],
    blocks: Int[Tensor, "blocks tokens"],
    *,
    length: int,
    count: int,
    seed: int,
) -> list[Prediction]:
    """Choose predictions in a text that all models make well and that depend on their context.

    Args:
        models: by name, in ``eval()`` mode.
        blocks: of the text, longer than ``length``.
        length: number of context tokens.
        count: number of predictions.
        seed: of the choice.

    Raises:
        GossamerError: if the text has too few such predictions.
    """
    width = blocks.shape[1] - length
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(blocks) * width, generator=generator)[: _TRIED * count]
    found: list[Prediction] = []
    for some in places.split(max(1, _TOKENS_AT_ONCE // length)):
        starts = [(int(place) // width, int(place) % width) for place in some]
        windows = torch.stack([blocks[block, at : at + length + 1] for block, at in starts])
        good = torch.ones(len(windows), dtype=torch.bool)
        for model in models.values():
            full = _log_probabilities(model, windows)
            with attention_hooks(model, _NoLinks()):
                gain = full - _log_probabilities(model, windows)
            good &= (full.exp() > LIKELY) & (gain >= GAIN)
        found += [Prediction(tuple(row[:-1]), row[-1]) for row in windows[good].tolist()]
        if len(found) >= count:
            return found[:count]
    raise GossamerError(
        f"the text has {len(found)} predictions at {length} tokens that both models make well and from their context "
        f"alone, of {len(places):,} places looked at, fewer than {count}; give more text or fewer --predictions"
    )


def _log_probabilities(model: PreTrainedModel, windows: Int[Tensor, "rows tokens"]) -> Float[Tensor, " rows"]:
    """Log-probability of the last token of each window given all others."""
    ids = windows[:, :-1].to(model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float().cpu()
    return logits.log_softmax(-1).gather(1, windows[:, -1:])[:, 0]


def explain_predictions(
    models: Mapping[str, PreTrainedModel],
    blocks: Int[Tensor, "blocks tokens"],
    file: Path,
    config: PredictionsConfig,
    *,
    described: Mapping[str, Any],
    progress: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Search for the sets of many predictions, one row of the file per prediction, model and kind of set.

    Args:
        models: ``dense`` and ``sparse``.
        blocks: of the text.
        file: JSON lines. Rows that an existing file already has are not searched for again.
        config: which predictions to choose, and what to search for.
        described: names of the models and the text, and the settings; the file's first line holds them with checksums.
        progress: called with a description of the current search.

    Raises:
        GossamerError: if the file belongs to other models, text or settings, or the text has too few predictions; if
            another process is writing the file.
    """
    known = {**described, "fingerprints": _fingerprints(models, blocks)}
    with locked(file):
        return _explain(models, blocks, file, config, known, progress)


def _fingerprints(models: Mapping[str, PreTrainedModel], blocks: Int[Tensor, "blocks tokens"]) -> dict[str, str]:
    """Checksums of the models' weights and of the text, because a name may later refer to other content."""
    found = {name: weights_fingerprint(model) for name, model in models.items()}
    return {**found, "text": f"{zlib.crc32(blocks.long().cpu().contiguous().numpy().tobytes()):08x}"}


def _explain(
    models: Mapping[str, PreTrainedModel],
    blocks: Int[Tensor, "blocks tokens"],
    file: Path,
    config: PredictionsConfig,
    described: Mapping[str, Any],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    rows = _begun(file, described)
    done = {(row["length"], row["prediction"], row["model"], row["kind"]) for row in rows}
    for length in sorted(config.lengths):
        for name in models:
            models[name].eval()
        predictions = choose_predictions(models, blocks, length=length, count=config.count, seed=config.seed)
        for at, prediction in enumerate(predictions):
            for name, model in models.items():
                for kind in KINDS:
                    if (length, at, name, kind) in done:
                        continue
                    progress(f"{length} tokens, prediction {at + 1} of {config.count}, {kind}, {name}")
                    row = {
                        "length": length, "prediction": at, "model": name, "kind": kind, "ids": list(prediction.ids),
                        "target": prediction.target, **_sets(model, prediction, kind, config.share, config.seed),
                    }  # fmt: skip
                    with file.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(row) + "\n")
                    rows.append(row)
    return rows


def _begun(file: Path, described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the file, without an incomplete last one; creates the file if it does not exist."""
    if not file.exists():
        atomic_write_text(file, json.dumps(described) + "\n")
        return []
    found: list[dict[str, Any]] = read_json_lines(file, remedy=ANOTHER, cut_off=True)
    first, *rows = found or [{}]
    if first != dict(described):
        raise GossamerError(f"{file} was begun with other models, text or settings; {ANOTHER}")
    for number, row in enumerate(rows, 2):
        with reading(f"{file}, line {number}", ANOTHER):
            check(row, _Row)
    text = read_text(file)
    if not text.endswith("\n"):
        atomic_write_text(file, text[: text.rfind("\n") + 1])
    return rows


def _sets(model: PreTrainedModel, prediction: Prediction, kind: Kind, share: float, seed: int) -> dict[str, Any]:
    """Search for two sets of one prediction."""
    with frozen(model):
        masks = LinkMasks(model, prediction)
        sets = [MaskSearch(masks, share=share, complete=kind == "complete", seed=seed + at).run() for at in range(2)]
    return {
        "metric_full": masks.full,
        "metric_none": masks.nothing,
        "candidates": len(masks),
        "sizes": [len(each) for each in sets],
        "kept": [each.kept for each in sets],
        "left_when_cut": [each.left_when_cut for each in sets],
        "overlap": overlap(sets),
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Quartiles by length and kind of set: size, share kept and left, overlap, and the size ratio dense : sparse."""
    found = []
    for length in sorted({row["length"] for row in rows}):
        for kind in KINDS:
            own = [row for row in rows if row["length"] == length and row["kind"] == kind]
            by_model = {
                name: {row["prediction"]: row for row in own if row["model"] == name} for name in ("dense", "sparse")
            }
            both = sorted(set(by_model["dense"]) & set(by_model["sparse"]))
            if not both:
                continue
            line: dict[str, Any] = {"length": length, "kind": kind, "predictions": len(both)}
            for name, of_model in by_model.items():
                some = [of_model[at] for at in both]
                line[name] = {
                    "candidates": Quartiles.of([row["candidates"] for row in some]),
                    "size": Quartiles.of([row["sizes"][0] for row in some]),
                    "kept": Quartiles.of([row["kept"][0] for row in some]),
                    "left_when_cut": Quartiles.of([row["left_when_cut"][0] for row in some]),
                    "overlap": Quartiles.of([row["overlap"] for row in some]),
                }
            ratios = [by_model["dense"][at]["sizes"][0] / by_model["sparse"][at]["sizes"][0] for at in both]
            line["ratio"] = Quartiles.of(ratios)
            found.append(line)
    return found
