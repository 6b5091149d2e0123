"""Exact patching: one unit at a time gets the corrupted run's value. Slow; the truth that the scores estimate."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.activation_cache import run_with_cache
from gossamer.circuits.intervention import run_with_edges, run_with_links, run_with_nodes
from gossamer.circuits.search import Level
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch

AT_ONCE = 8
"""Units that are patched in one forward pass, each in a copy of the batch."""


@torch.no_grad()
def exact_scores(model: PreTrainedModel, batch: Batch, level: Level) -> Float[Tensor, "..."]:
    """By how much the metric changes when one unit alone is patched; one forward pass for some units.

    Returns:
        nodes ``[sources]`` and edges ``[sources, destinations]``, summed over the batch like
        :func:`~gossamer.circuits.attribution.edge_scores`; links ``[prompts, layers, heads, tokens, tokens]``.
    """
    graph, (prompts, tokens) = graph_of(model), batch.clean.shape
    other = run_with_cache(model, batch.corrupted, links=level == "links")
    keep: Callable[..., Tensor]
    if level == "nodes":
        everything, keep = torch.ones(graph.sources, dtype=torch.bool), run_with_nodes
    elif level == "edges":
        everything, keep = graph.possible(), run_with_edges
    else:
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        everything = allowed.expand(graph.layers, graph.heads, tokens, tokens)
        keep = run_with_links
    units = everything.flatten().nonzero()[:, 0]
    scores = torch.zeros(everything.numel(), prompts, dtype=other.logits.dtype)

    def measured(circuits: Tensor) -> Tensor:
        if level == "links":
            circuits = circuits[:, None].expand(-1, prompts, *everything.shape)
        return keep(model, batch, circuits, other=other).cpu()

    clean = measured(everything[None])[0]
    for some in units.split(AT_ONCE):
        circuits = everything.flatten().repeat(len(some), 1)
        circuits[torch.arange(len(some)), some] = False
        scores[some] = measured(circuits.view(-1, *everything.shape)) - clean
    if level == "links":
        return scores.mT.reshape(prompts, *everything.shape)
    return scores.sum(1).view(everything.shape)
