"""Masks on the nodes or component edges of a model, on the prompts of a task.

    f(E) = (m(E) - m(nothing)) / (m(everything) - m(nothing))

with m the task's mean metric over the prompts, where a unit carries z times its value plus (1 - z) times the ablation's
replacement. At z = 0 and 1 this equals :mod:`gossamer.circuits.intervention`, which measures sets. Here the metric is
differentiable with respect to z.

Among the nodes, the input has no mask and always keeps its value. Without the input nothing of a prompt is left, so any
set of nodes that contains it would count as necessary.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.activation_cache import ActivationCache, run_with_cache
from gossamer.circuits.graph import prune
from gossamer.circuits.intervention import (
    Patched,
    PatchedEdges,
    PatchedNodes,
    metric_with,
    run_with_edges,
    run_with_nodes,
)
from gossamer.circuits.mask_search import MaskRow
from gossamer.circuits.projections import projections_of
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch
from gossamer.errors import GossamerError

Units = Literal["nodes", "edges"]

PROMPTS = 32
"""Maximum number of prompts on which a search measures sets."""

PROMPTS_WITH_GRADIENTS = {"nodes": 16, "edges": 8}
"""Maximum of masks times prompts in a pass with gradients."""

ROWS = 64
"""Maximum of sets times prompts in a pass without gradients."""


class _Masked(Patched):
    """Stores what sources write in separate tensors, by first source: in-place writes to a buffer lose gradients."""

    parts: dict[int, Float[Tensor, "sources circuits prompts tokens d_model"]]

    def read_input(self, x: Tensor) -> Tensor:
        self.parts = {}
        return super().read_input(x)

    def _write(self, sources: slice, values: Float[Tensor, "sources rows tokens d_model"]) -> None:
        replaced = self.replacement[sources, None]
        self.parts[sources.start] = values.unflatten(1, (-1, replaced.shape[2])) - replaced

    def _mixed(
        self, kept: Float[Tensor, "circuits sources destinations"], kind: str, layer: int
    ) -> Float[Tensor, "destinations rows tokens d_model"]:
        circuits, sources, destinations = kept.shape
        base = self._replaced("q" if kind in "qkv" else kind, layer, sources)
        mixed = [base.flatten().expand(destinations, -1)] * circuits
        for first, part in self.parts.items():
            for circuit in range(circuits if first < sources else 0):
                own = kept[circuit, first : first + len(part)].mT
                mixed[circuit] = torch.addmm(mixed[circuit], own, part[:, circuit].flatten(1))
        return torch.stack(mixed, 1).view(destinations, circuits * base.shape[0], *base.shape[1:])


class _MaskedNodes(_Masked, PatchedNodes):
    """Masked nodes; destinations that read at the same place share one stream."""


class _MaskedEdges(_Masked, PatchedEdges):
    """Masked edges; every destination reads a separate stream."""


def metric_under_masks(
    model: PreTrainedModel,
    batch: Batch,
    masks: Float[Tensor, "circuits units"],
    units: Units,
    *,
    ablation: str = "patch",
    other: ActivationCache,
) -> Float[Tensor, "circuits prompts"]:
    """Return the task's metric on the clean prompts under each mask, differentiable with respect to the masks.

    Args:
        masks: masks of all sources except the input, or of the possible edges in the order of
            ``graph.possible().nonzero()``.
        other: the corrupted run.
    """
    graph = graph_of(model)
    if units == "nodes":
        return metric_with(model, batch, _MaskedNodes(graph, with_input(masks), other, ablation), len(masks))
    possible = graph.possible().to(masks.device)
    kept = masks.new_zeros(len(masks), *possible.shape)
    kept = kept.masked_scatter(possible.expand_as(kept), masks)
    return metric_with(model, batch, _MaskedEdges(graph, projections_of(model), kept, other, ablation), len(masks))


def with_input(nodes: Shaped[Tensor, "*sets nodes"]) -> Shaped[Tensor, "*sets sources"]:
    """Prepend the input, always kept, to masks or sets of the other sources."""
    return torch.cat([torch.ones_like(nodes[..., :1]), nodes], -1)


class TaskMasks:
    """Maskable units of one kind, measured on the first prompts of a task.

    Args:
        model: dense or gated, in ``eval()`` mode.
        batches: the task's prompts.
        units: ``nodes`` or ``edges``.
        ablation: what units outside a set carry.
        means: what sources carry under mean ablation, by prompt length.

    Raises:
        GossamerError: if replacing every unit does not change the metric.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        units: Units,
        ablation: str,
        means: Mapping[int, Tensor],
    ) -> None:
        self.model, self.units, self.ablation, self.means = model.requires_grad_(False), units, ablation, means
        self.graph = graph_of(model)
        self.possible = self.graph.possible()
        self.batches = _first(batches, PROMPTS)
        self.graded = [part for batch in self.batches for part in _parts(batch, PROMPTS_WITH_GRADIENTS[units])]
        self.turn = 0
        everything, nothing = torch.ones(len(self), dtype=torch.bool), torch.zeros(len(self), dtype=torch.bool)
        self.full, self.nothing = self._metrics([everything, nothing]).tolist()
        if self.full == self.nothing:
            raise GossamerError(
                f"patching all {units} changes nothing: the metric does not tell clean from corrupted prompts"
            )

    def __len__(self) -> int:
        return self.graph.sources - 1 if self.units == "nodes" else int(self.possible.sum())

    @property
    def rows_with_gradients(self) -> int:
        """Number of masks that :meth:`shares` takes at once, limited to keep a pass small; at least one."""
        return max(1, PROMPTS_WITH_GRADIENTS[self.units] // max(len(batch.clean) for batch in self.graded))

    def shares(self, rows: list[MaskRow]) -> Float[Tensor, " rows"]:
        """Return f under each mask on a few prompts, which rotate between calls; differentiable in the masks."""
        batch = self.graded[self.turn % len(self.graded)]
        self.turn += 1
        masks = torch.stack([row.mask for row in rows]).to(self.model.device)
        other = self._other(batch)
        values = metric_under_masks(self.model, batch, masks, self.units, ablation=self.ablation, other=other)
        return (values.mean(1) - self.nothing) / (self.full - self.nothing)

    def kept(self, sets: list[Bool[Tensor, " units"]]) -> Float[Tensor, " sets"]:
        """Return f(E) of some sets, on all prompts of the search."""
        return (self._metrics(sets) - self.nothing) / (self.full - self.nothing)

    def left_when_cut(self, sets: list[Bool[Tensor, " units"]]) -> Float[Tensor, " sets"]:
        """Return f(not E) of some sets, on all prompts of the search."""
        return self.kept([~each for each in sets])

    def reaching(self, chosen: Bool[Tensor, " units"]) -> Bool[Tensor, " units"]:
        """Return the chosen edges that are not cut off from input or logits, or all chosen nodes."""
        return chosen if self.units == "nodes" else prune(self.graph, self.scattered(chosen))[self.possible]

    def scattered(self, values: Tensor) -> Tensor:
        """Scatter values of the possible edges into a ``[sources, destinations]`` tensor."""
        return values.new_zeros(self.possible.shape).masked_scatter(self.possible, values)

    def _other(self, batch: Batch) -> ActivationCache:
        other = run_with_cache(self.model, batch.corrupted)
        other.mean = self.means.get(batch.clean.shape[1])
        return other

    @torch.no_grad()
    def _metrics(self, sets: list[Bool[Tensor, " units"]]) -> Float[Tensor, " sets"]:
        total = torch.zeros(len(sets), dtype=torch.double)
        for batch in self.batches:
            other = self._other(batch)
            for at in torch.arange(len(sets)).split(max(1, ROWS // len(batch.clean))):
                some = [sets[each] for each in at.tolist()]
                if self.units == "nodes":
                    kept = with_input(torch.stack(some))
                    values = run_with_nodes(self.model, batch, kept, ablation=self.ablation, other=other)
                else:
                    kept = torch.stack([self.scattered(each) for each in some])
                    values = run_with_edges(self.model, batch, kept, ablation=self.ablation, other=other)
                total[at] += values.double().cpu().sum(1)
        return total / sum(len(batch.clean) for batch in self.batches)


def _first(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Batches of the first ``count`` prompts."""
    found, left = [], count
    for batch in batches:
        if left > 0:
            found.append(batch.rows(slice(0, left)))
            left -= len(batch.clean)
    return found


def _parts(batch: Batch, size: int) -> list[Batch]:
    return [batch.rows(slice(at, at + size)) for at in range(0, len(batch.clean), size)]
