"""Measure a circuit by intervention: keep its units, replace the values of all others, and compute the metric.

This is the ground truth that scores estimate. Edge patching is exact: the stream that a destination reads is the sum
over its sources of the current run's output where the edge is kept, and of the replacement where it is not. q, k and v
of every head read separate streams. Patching a node patches all its outgoing edges. Links are patched individually
within each head's sum over keys.

Several circuits can be measured in one pass, stacked along leading dimensions.
"""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.ablations import LinkAblation, find_ablation
from gossamer.circuits.activation_cache import ActivationCache, run_with_cache
from gossamer.circuits.graph import Graph
from gossamer.circuits.projections import Projection, Projections, projections_of, repetitions
from gossamer.circuits.streams import Norm, Pattern, StreamHooks, graph_of, stream_hooks
from gossamer.circuits.tasks.base import Batch


class Patched(StreamHooks):
    """Builds the patched streams from the difference between what sources write and their replacements.

    Rows of the batch are ordered by circuit, then by prompt.
    """

    def __init__(
        self, graph: Graph, kept: Tensor, other: ActivationCache, ablation: str, neurons: Tensor | None = None
    ) -> None:
        self.graph, self.other = graph, other
        self.kept = kept.to(other.written)
        self.neurons = None if neurons is None else neurons.to(other.written)
        self.replacement = find_ablation(ablation).replace(other.written, other.mean)
        self.change = other.written.new_empty(graph.sources, len(kept), *other.written.shape[1:])

    def _replaced(self, kind: str, layer: int, sources: int) -> Tensor:
        """Return the stream in which every source carries its replacement."""
        if self.replacement is self.other.written:
            return self.other.read[kind, layer]
        return self.other.constant(self.graph, kind, layer) + self.replacement[:sources].sum(0)

    def _mixed(
        self, kept: Float[Tensor, "circuits sources destinations"], kind: str, layer: int
    ) -> Float[Tensor, "destinations rows tokens d_model"]:
        """Return the streams that destinations of one kind read when they keep these sources.

        The loop over circuits avoids a copy. Small circuits keep few sources, and the products are memory-bound, so
        the other sources are not read.
        """
        circuits, sources, destinations = kept.shape
        mixed = self.change.new_empty(destinations, *self.change.shape[1:])
        mixed[:] = self._replaced("q" if kind in "qkv" else kind, layer, sources)
        for circuit in range(circuits):
            own, change = kept[circuit], self.change[:sources, circuit]
            used = own.any(1)
            if 2 * int(used.sum()) < sources:
                own, change = own[used], change[used]
            mixed[:, circuit] += (own.mT @ change.flatten(1)).view(destinations, *change.shape[1:])
        return mixed.flatten(1, 2)

    def _write(self, sources: slice, values: Float[Tensor, "sources rows tokens d_model"]) -> None:
        rows = values.unflatten(1, self.change.shape[1:3])
        self.change[sources] = rows - self.replacement[sources, None]
        if self.neurons is not None:
            self.change[sources] *= self.neurons[sources, None, None, None]

    def read_input(self, x: Tensor) -> Tensor:
        self._write(slice(0, 1), x[None])
        return x

    def write_heads(self, layer: int, contributions: Tensor) -> None:
        self._write(slice(self.graph.head(layer, 0), self.graph.mlp(layer)), contributions)

    def write_mlp(self, layer: int, contribution: Tensor) -> None:
        mlp = self.graph.mlp(layer)
        self._write(slice(mlp, mlp + 1), contribution[None])


class PatchedNodes(Patched):
    """Patches nodes: destinations that read at the same place of a layer share one stream."""

    def _stream(self, kind: str, layer: int) -> Float[Tensor, "rows tokens d_model"]:
        sources = self.graph.sources_of(self.graph.read(layer, kind))
        return self._mixed(self.kept[:, :sources, None], kind, layer)[0]

    def read_attention(self, layer: int, x: Tensor, norm: Norm) -> Tensor:
        return self._stream("q", layer)

    def read_mlp(self, layer: int, x: Tensor) -> Tensor:
        return self._stream("mlp", layer)

    def read_logits(self, x: Tensor) -> Tensor:
        return self._stream("logits", 0)


class PatchedEdges(Patched):
    """Patches edges: every destination reads a separate stream.

    Query heads that share columns of a projection cannot be computed in the same row. The batch is therefore repeated
    (``repetitions``), and head h is computed in repetition h modulo the number of repetitions.
    """

    def __init__(
        self,
        graph: Graph,
        places: list[Projections],
        kept: Tensor,
        other: ActivationCache,
        ablation: str,
        neurons: Tensor | None = None,
    ) -> None:
        super().__init__(graph, kept, other, ablation, neurons)
        self.places = places
        self.repetitions = [repetitions(projections) for projections in places]
        self.norm: Norm | None = None

    def _streams(self, kind: str, layer: int) -> Float[Tensor, "destinations rows tokens d_model"]:
        """Return the streams that the destinations of one kind in a layer read; for q, k and v one per head."""
        graph = self.graph
        first = graph.read(layer, kind)
        reads = slice(first, first + (graph.heads if kind in "qkv" else 1))
        return self._mixed(self.kept[:, : graph.sources_of(first), reads], kind, layer)

    def read_attention(self, layer: int, x: Tensor, norm: Norm) -> Tensor:
        self.norm = norm
        return x.repeat(self.repetitions[layer], 1, 1)

    def project(self, layer: int, name: str, x: Tensor, y: Tensor) -> Tensor:
        assert self.norm is not None
        turns = self.repetitions[layer]
        y = y.clone().unflatten(0, (turns, -1))
        for kind, place in self.places[layer].items():
            if place.name != name:
                continue
            normed = self.norm(self._streams(kind, layer).flatten(0, 1)).unflatten(0, (self.graph.heads, -1))
            for turn in range(turns):
                heads = list(range(turn, self.graph.heads, turns))
                columns = place.columns[heads]
                y[turn, :, :, columns.flatten()] = _projected(place, columns, normed[heads])
        return y.flatten(0, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        own, turns = torch.arange(q.shape[1], device=q.device), self.repetitions[layer]
        q, k, v = (x.unflatten(0, (turns, -1))[own % turns, :, own].transpose(0, 1) for x in (q, k, v))
        return pattern(q, k) @ v

    def read_mlp(self, layer: int, x: Tensor) -> Tensor:
        return self._streams("mlp", layer)[0]

    def read_logits(self, x: Tensor) -> Tensor:
        return self._streams("logits", 0)[0]


def _projected(place: Projection, columns: Tensor, x: Float[Tensor, "heads rows tokens d_model"]) -> Tensor:
    """Project each head's stream to that head's columns: ``[rows, tokens, heads * columns]``."""
    outputs = x.flatten(1, 2) @ place.weight(columns).mT
    bias = place.bias(columns)
    if isinstance(bias, Tensor):
        outputs = outputs + bias[:, None]
    return outputs.unflatten(1, x.shape[1:3]).permute(1, 2, 0, 3).flatten(2)


@torch.no_grad()
def run_with_edges(
    model: PreTrainedModel,
    batch: Batch,
    kept: Bool[Tensor, "*circuits sources destinations"],
    *,
    ablation: str = "patch",
    other: ActivationCache | None = None,
    neurons: Bool[Tensor, "sources d_model"] | None = None,
) -> Float[Tensor, "*circuits prompts"]:
    """Return the task's metric on the clean prompts when only the kept edges carry their original values.

    Args:
        kept: which edges are kept, for one circuit or several.
        neurons: which dimensions of a source's output its kept edges carry, the same in all circuits; all if None.
        ablation: what the other edges carry: the corrupted run's values, zero, or the mean of corrupted runs at each
            position (``other.mean`` if given, else over the batch).
        other: the corrupted run, if it is already recorded.
    """
    circuits = kept[None] if kept.ndim == 2 else kept
    other = run_with_cache(model, batch.corrupted) if other is None else other
    hooks = PatchedEdges(graph_of(model), projections_of(model), circuits, other, ablation, neurons)
    return metric_with(model, batch, hooks, len(circuits)).view(*kept.shape[:-2], -1)


def metric_with(model: PreTrainedModel, batch: Batch, hooks: StreamHooks, circuits: int) -> Tensor:
    rows = batch.clean.to(model.device).repeat(circuits, 1)
    with stream_hooks(model, hooks):
        logits = model(input_ids=rows, use_cache=False, logits_to_keep=1).logits[:, -1]
    return torch.stack([batch.measure(part) for part in logits.unflatten(0, (circuits, -1))])


@torch.no_grad()
def run_with_nodes(
    model: PreTrainedModel,
    batch: Batch,
    kept: Bool[Tensor, "*circuits sources"],
    *,
    ablation: str = "patch",
    other: ActivationCache | None = None,
) -> Float[Tensor, "*circuits prompts"]:
    """:func:`run_with_edges` for all outgoing edges of the kept nodes, without a separate stream per destination."""
    circuits = kept[None] if kept.ndim == 1 else kept
    other = run_with_cache(model, batch.corrupted) if other is None else other
    hooks = PatchedNodes(graph_of(model), circuits, other, ablation)
    return metric_with(model, batch, hooks, len(circuits)).view(*kept.shape[:-1], -1)


@dataclass
class _PatchedLinks(StreamHooks):
    kept: Tensor
    other: ActivationCache | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        weights = pattern(q, k)
        kept = self.kept[:, :, layer].to(weights)
        own = (weights * kept.flatten(0, 1)) @ v
        if self.other is None:
            return own
        return own + ((self.other.weights[layer] * (1 - kept)) @ self.other.values[layer]).flatten(0, 1)


@torch.no_grad()
def run_with_links(
    model: PreTrainedModel,
    batch: Batch,
    kept: Bool[Tensor, "*circuits prompts layers heads tokens tokens"],
    *,
    ablation: LinkAblation = "patch",
    other: ActivationCache | None = None,
) -> Float[Tensor, "*circuits prompts"]:
    """Return the metric on the clean prompts when only the kept attention links carry their original weight and value.

    The others carry the corrupted run's weight and value of the same link, or nothing (``zero``). MLPs run normally.
    """
    circuits = kept[None] if kept.ndim == 5 else kept
    if ablation == "zero":
        other = None
    elif other is None:
        other = run_with_cache(model, batch.corrupted, links=True)
    return metric_with(model, batch, _PatchedLinks(circuits, other), len(circuits)).view(*kept.shape[:-5], -1)


@dataclass
class _CutLinks(StreamHooks):
    cut: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        return pattern(q, k).masked_fill(self.cut[layer], 0.0) @ v


@torch.no_grad()
def run_without_links(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    cut: Bool[Tensor, "layers heads tokens tokens"],
) -> Float[Tensor, "batch tokens vocab"]:
    """Return the model's logits when the cut attention links carry nothing; everything after them is recomputed.

    Args:
        cut: True where (layer, head, query, key) is cut, for every sequence in the batch.
    """
    with stream_hooks(model, _CutLinks(cut.to(input_ids.device))):
        return cast(Tensor, model(input_ids=input_ids, use_cache=False).logits)


@dataclass
class _InterchangedLinks(StreamHooks):
    exchanged: Tensor
    other: ActivationCache
    donors: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        own = self.exchanged[layer]
        donated = self.other.weights[layer][self.donors] * own
        return pattern(q, k).masked_fill(own, 0.0) @ v + donated @ self.other.values[layer][self.donors]


@torch.no_grad()
def run_with_interchange(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    exchanged: Bool[Tensor, "layers heads tokens tokens"],
    cache: ActivationCache,
    donors: Int[Tensor, " batch"],
) -> Float[Tensor, "batch tokens vocab"]:
    """Return the model's logits when the exchanged links carry their weights and values from another sequence.

    Args:
        exchanged: True where (layer, head, query, key) carries another sequence's weight and value.
        cache: cache of the same batch, recorded with ``links=True``.
        donors: for each sequence, the index in the batch of the sequence whose links it receives.
    """
    hooks = _InterchangedLinks(exchanged.to(input_ids.device), cache, donors.to(input_ids.device))
    with stream_hooks(model, hooks):
        return cast(Tensor, model(input_ids=input_ids, use_cache=False).logits)
