"""The truth that scores estimate: keep a circuit, give every other unit another run's value, and measure.

Edges are exact: the stream that a destination reads is the sum of what its sources wrote, of the run at hand where the
edge is kept and of the replacement where it is not, and q, k and v of every head read streams of their own. To patch a
node is to patch all edges that leave it. Links are patched one by one within each head's sum over keys.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.graph import Graph
from gossamer.circuits.recording import Recording, record
from gossamer.circuits.streams import Pattern, Visitor, graph_of, visited
from gossamer.circuits.tasks.base import Batch

Ablation = Literal["patch", "zero", "mean"]


class _PatchedEdges(Visitor):
    def __init__(self, graph: Graph, kept: Tensor, other: Recording, replacement: Tensor) -> None:
        self.graph, self.other, self.replacement = graph, other, replacement
        self.kept = kept.to(replacement)
        self.change = torch.empty_like(replacement)

    def _streams(self, kind: str, layer: int, destinations: slice) -> Tensor:
        """[destinations, batch, tokens, d_model]: what the destinations read."""
        graph = self.graph
        sources = graph.sources_of(destinations.start)
        base = self.other.constant(graph, kind, layer) + self.replacement[:sources].sum(0)
        return base + torch.einsum("uv,ubtd->vbtd", self.kept[:sources, destinations], self.change[:sources])

    def _write(self, sources: slice, values: Tensor) -> None:
        self.change[sources] = values - self.replacement[sources]

    def read_input(self, x: Tensor) -> Tensor:
        self._write(slice(0, 1), x[None])
        return x

    def read_attention(self, layer: int, x: Tensor) -> Tensor:
        return self._streams("q", layer, self.graph.attention_reads(layer)).flatten(0, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        heads, groups = q.shape[1], q.shape[1] // k.shape[1]
        own = torch.arange(heads, device=q.device)
        picked = []
        for kind, x in enumerate((q, k, v)):
            streams = x.unflatten(0, (3, heads, -1))[kind]
            picked.append(streams[own, :, own if kind == 0 else own // groups].transpose(0, 1))
        return pattern(*picked[:2]) @ picked[2]

    def write_heads(self, layer: int, contributions: Tensor) -> None:
        self._write(slice(self.graph.head(layer, 0), self.graph.mlp(layer)), contributions)

    def read_mlp(self, layer: int, x: Tensor) -> Tensor:
        mlp = self.graph.read(layer, "mlp")
        return self._streams("mlp", layer, slice(mlp, mlp + 1))[0]

    def write_mlp(self, layer: int, contribution: Tensor) -> None:
        mlp = self.graph.mlp(layer)
        self._write(slice(mlp, mlp + 1), contribution[None])

    def read_logits(self, x: Tensor) -> Tensor:
        return self._streams("logits", 0, slice(self.graph.logits, self.graph.logits + 1))[0]


def _replacement(other: Recording, ablation: Ablation) -> Tensor:
    if ablation == "zero":
        return torch.zeros_like(other.written)
    if ablation == "mean":
        return other.written.mean(1, keepdim=True).expand_as(other.written).contiguous()
    return other.written


@torch.no_grad()
def keep_edges(
    model: PreTrainedModel,
    batch: Batch,
    kept: Bool[Tensor, "sources destinations"],
    *,
    ablation: Ablation = "patch",
    other: Recording | None = None,
) -> Float[Tensor, " prompts"]:
    """The task's metric on the clean prompts when only the kept edges carry their own values.

    Args:
        kept: which edges are kept.
        ablation: what the others carry: the corrupted run's values, zero, or the mean over the batch's corrupted runs
            by position.
        other: the corrupted run, if it has been recorded already.
    """
    graph = graph_of(model)
    other = record(model, batch.corrupted) if other is None else other
    with visited(model, _PatchedEdges(graph, kept, other, _replacement(other, ablation))):
        logits = model(input_ids=batch.clean, use_cache=False, logits_to_keep=1).logits[:, -1]
    return batch.measure(logits)


def keep_nodes(
    model: PreTrainedModel,
    batch: Batch,
    kept: Bool[Tensor, " sources"],
    *,
    ablation: Ablation = "patch",
    other: Recording | None = None,
) -> Float[Tensor, " prompts"]:
    """:func:`keep_edges` with all edges that leave the kept nodes."""
    graph = graph_of(model)
    edges = kept[:, None] & graph.possible().to(kept.device)
    return keep_edges(model, batch, edges, ablation=ablation, other=other)


@dataclass
class _PatchedLinks(Visitor):
    kept: Tensor
    other: Recording | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        weights, values = pattern(q, k.repeat_interleave(groups, 1)), v.repeat_interleave(groups, 1)
        kept = self.kept[:, layer].to(weights)
        own = (weights * kept) @ values
        if self.other is None:
            return own
        return own + (self.other.weights[layer] * (1 - kept)) @ self.other.values[layer]


@torch.no_grad()
def keep_links(
    model: PreTrainedModel,
    batch: Batch,
    kept: Bool[Tensor, "prompts layers heads tokens tokens"],
    *,
    ablation: Literal["patch", "zero"] = "patch",
    other: Recording | None = None,
) -> Float[Tensor, " prompts"]:
    """The metric on the clean prompts when only the kept attention links carry their own weight and value.

    The others carry the corrupted run's weight and value at the same place, or nothing (``zero``). MLPs run as they do.
    """
    if ablation == "zero":
        other = None
    elif other is None:
        other = record(model, batch.corrupted, links=True)
    with visited(model, _PatchedLinks(kept, other)):
        logits = model(input_ids=batch.clean, use_cache=False, logits_to_keep=1).logits[:, -1]
    return batch.measure(logits)


@dataclass
class _CutLinks(Visitor):
    cut: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        weights = pattern(q, k.repeat_interleave(groups, 1))
        return weights.masked_fill(self.cut[layer], 0.0) @ v.repeat_interleave(groups, 1)


@torch.no_grad()
def logits_without(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    cut: Bool[Tensor, "layers heads tokens tokens"],
) -> Float[Tensor, "batch tokens vocab"]:
    """The model's logits when the cut attention links carry nothing; everything after them runs as it then does.

    Args:
        cut: True where (layer, head, query, key) is cut, in every sequence of the batch.
    """
    with visited(model, _CutLinks(cut.to(input_ids.device))):
        return cast(Tensor, model(input_ids=input_ids, use_cache=False).logits)


@dataclass
class _ExchangedLinks(Visitor):
    exchanged: Tensor
    other: Recording
    donors: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        own = self.exchanged[layer]
        weights = pattern(q, k.repeat_interleave(groups, 1)).masked_fill(own, 0.0)
        donated = self.other.weights[layer][self.donors] * own
        return weights @ v.repeat_interleave(groups, 1) + donated @ self.other.values[layer][self.donors]


@torch.no_grad()
def exchanged_links(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    exchanged: Bool[Tensor, "layers heads tokens tokens"],
    recording: Recording,
    donors: Int[Tensor, " batch"],
) -> Float[Tensor, "batch tokens vocab"]:
    """The model's logits when the exchanged links carry what they carry in another sequence.

    Args:
        exchanged: True where (layer, head, query, key) carries another sequence's weight and value.
        recording: of the same batch, with ``links=True``.
        donors: of each sequence, the one of the batch whose links it gets.
    """
    visitor = _ExchangedLinks(exchanged.to(input_ids.device), recording, donors.to(input_ids.device))
    with visited(model, visitor):
        return cast(Tensor, model(input_ids=input_ids, use_cache=False).logits)
