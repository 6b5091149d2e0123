"""Explanations of many predictions of natural text: how many links they need, in a dense model and in a sparse one.

1. Tokens are chosen that both models predict well, and only from their context: p above :data:`LIKELY` with all links,
   at least :data:`GAIN` nats less with none. The choice is made by seed, for each length of context on its own.
2. For each of them sufficient and complete sets are searched for in both models, with two seeds.
3. Each row is written as soon as it is there: a measurement that was cut off goes on where it stopped.
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

from gossamer.circuits.mask_search import MaskSearch, overlap
from gossamer.circuits.streams import Pattern, StreamHooks, attention_hooks
from gossamer.errors import GossamerError
from gossamer.explanations.config import Kind
from gossamer.explanations.link_masks import LinkMasks
from gossamer.explanations.prediction import Prediction
from gossamer.files import atomic_write_text
from gossamer.inputs import check, read_json_lines, read_text, reading
from gossamer.locks import locked
from gossamer.models.fingerprint import weights_fingerprint
from gossamer.models.frozen import frozen

LIKELY = 0.3
"""Probability above which a token counts as predicted well."""

GAIN = 2.0
"""Nats that its log-probability has to fall by when every link is cut."""

KINDS: tuple[Kind, ...] = ("sufficient", "complete")

_TRIED = 200
"""Places in the text that are looked at for each prediction that is wanted."""

_TOKENS_AT_ONCE = 2_048


@dataclass(frozen=True)
class Quartiles:
    """The middle of some values, and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*quantiles(values, n=4, method="inclusive"))


ANOTHER = "give another --out"


@dataclass(frozen=True)
class PredictionsConfig:
    """Which predictions are explained.

    Attributes:
        lengths: tokens of context.
        count: predictions of each length.
        share: of the metric that is kept.
        seed: of the choice and of the searches.
    """

    lengths: Sequence[int]
    count: int
    share: float = 0.9
    seed: int = 0


class _Row(TypedDict):
    """The sets of a prediction in one model."""

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
    """Predictions of a text that all models make well and that need their context.

    Args:
        models: by name, in ``eval()`` mode.
        blocks: of the text, longer than ``length``.
        length: tokens of context.
        count: how many predictions.
        seed: of the choice.

    Raises:
        GossamerError: if the text has too few of them.
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
    """Of the last token of each window after all others."""
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
    """Search for the sets of many predictions; a row of the file for each prediction, model and kind of set.

    Args:
        models: ``dense`` and ``sparse``.
        blocks: of the text.
        file: JSON lines. If it exists, what it has is not searched for again.
        config: which predictions, and what is searched for.
        described: what the rows belong to, by name: models, text and settings; the file's first line, with checksums.
        progress: told what is being searched for.

    Raises:
        GossamerError: if the file belongs to other models, text or settings, or the text has too few predictions; if
            another process is at work on the file.
    """
    known = {**described, "fingerprints": _fingerprints(models, blocks)}
    with locked(file):
        return _explain(models, blocks, file, config, known, progress)


def _fingerprints(models: Mapping[str, PreTrainedModel], blocks: Int[Tensor, "blocks tokens"]) -> dict[str, str]:
    """Of the models' weights and of the text: names stay where what they stand for is exchanged."""
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
    """The rows of the file, without one that was cut off; the file is begun if there is none."""
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
    """Two sets of one prediction."""
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
    """Quartiles by length and kind of set: of sizes, what is kept and left, overlap, and the ratio dense : sparse."""
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
