"""Exact patching: ablate one unit at a time. Slow, but the ground truth that the other scores estimate."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.ablations import LinkAblation
from gossamer.circuits.activation_cache import ActivationCache, run_with_cache
from gossamer.circuits.intervention import run_with_edges, run_with_links, run_with_nodes
from gossamer.circuits.scores.base import Score
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch

AT_ONCE = 8
"""Number of units patched in one forward pass, each in a separate copy of the batch."""


def edge_scores(
    model: PreTrainedModel,
    batch: Batch,
    *,
    ablation: str = "patch",
    mean: Float[Tensor, "sources tokens d_model"] | None = None,
) -> Float[Tensor, "sources destinations"]:
    """Measure the change in the metric when a single edge is ablated, summed over the batch."""
    possible = graph_of(model).possible()
    keep = partial(run_with_edges, model, batch, ablation=ablation, other=_other(model, batch, mean))
    return _one_at_a_time(keep, possible).sum(-1)


def node_scores(
    model: PreTrainedModel,
    batch: Batch,
    *,
    ablation: str = "patch",
    mean: Float[Tensor, "sources tokens d_model"] | None = None,
) -> Float[Tensor, " sources"]:
    """Measure the change in the metric when a single node is ablated, summed over the batch."""
    nodes = torch.ones(graph_of(model).sources, dtype=torch.bool)
    keep = partial(run_with_nodes, model, batch, ablation=ablation, other=_other(model, batch, mean))
    return _one_at_a_time(keep, nodes).sum(-1)


def link_scores(
    model: PreTrainedModel, batch: Batch, *, ablation: LinkAblation = "patch"
) -> Float[Tensor, "prompts layers heads tokens tokens"]:
    """Measure the change in the metric when a single attention link is ablated, for each prompt."""
    graph, (prompts, tokens) = graph_of(model), batch.clean.shape
    other = run_with_cache(model, batch.corrupted, links=True)
    links = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(graph.layers, graph.heads, tokens, tokens)

    def keep(kept: Tensor) -> Tensor:
        circuits = kept[:, None].expand(-1, prompts, *links.shape)
        return run_with_links(model, batch, circuits, ablation=ablation, other=other)

    return _one_at_a_time(keep, links).movedim(-1, 0)


def _other(model: PreTrainedModel, batch: Batch, mean: Tensor | None) -> ActivationCache:
    other = run_with_cache(model, batch.corrupted)
    other.mean = mean
    return other


@torch.no_grad()
def _one_at_a_time(keep: Callable[[Tensor], Tensor], everything: Tensor) -> Tensor:
    """Metric without each unit minus the metric with all units, ``[*units, prompts]``; several units per pass."""
    units = everything.flatten().nonzero()[:, 0]
    clean = keep(everything[None]).cpu()[0]
    scores = torch.zeros(everything.numel(), len(clean), dtype=clean.dtype)
    for some in units.split(AT_ONCE):
        circuits = everything.flatten().repeat(len(some), 1)
        circuits[torch.arange(len(some)), some] = False
        scores[some] = keep(circuits.view(-1, *everything.shape)).cpu() - clean
    return scores.view(*everything.shape, -1)


EXACT = Score("exact", edge_scores, nodes=node_scores, links=link_scores)
