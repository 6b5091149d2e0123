"""Circuits of one model for one task, at three levels: scores, circuits from them, the proof by intervention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.attribution import edge_scores, link_scores
from gossamer.circuits.graph import Graph, prune, top_edges
from gossamer.circuits.intervention import keep_edges, keep_links, keep_nodes
from gossamer.circuits.metrics import Curve, measure_curve
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch, Prompts
from gossamer.errors import GossamerError

Level = Literal["nodes", "edges", "links"]
LEVELS: tuple[Level, ...] = ("nodes", "edges", "links")


@dataclass(frozen=True)
class Circuits:
    """What was found of one model.

    Attributes:
        curves: faithfulness by size, by level. Links are counted on one prompt, averaged over the prompts.
        scores: of the component edges, the mean over the prompts.
        graph: of the model.
    """

    curves: dict[Level, Curve]
    scores: Tensor
    graph: Graph

    def edges(self, count: int) -> Tensor:
        """The best ``count`` edges less those that are cut off from input or logits."""
        return prune(self.graph, top_edges(self.graph, self.scores, count))


def find_circuits(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    levels: tuple[Level, ...] = LEVELS,
    steps: int = 5,
    batch_size: int = 16,
    progress: Callable[[str], None] = lambda line: None,
) -> Circuits:
    """Score the units of a model on a task, and measure how much the best of them explain.

    Args:
        model: dense or gated, in ``eval()`` mode.
        prompts: of the task.
        levels: which kinds of units.
        steps: of EAP-IG; 0 for EAP.
        batch_size: prompts in one forward pass.
        progress: is told in a few words what is being done.

    Raises:
        GossamerError: if the metric does not tell clean from corrupted prompts.
    """
    graph = graph_of(model)
    batches = list(prompts.batches(batch_size))
    count = len(prompts.kept)
    scores = torch.zeros(graph.sources, graph.destinations)
    for done, batch in enumerate(batches):
        progress(f"scores of edges, batch {done + 1} of {len(batches)}")
        scores += edge_scores(model, batch, steps=steps).cpu() / count
    curves: dict[Level, Curve] = {}
    if "nodes" in levels:
        order = torch.argsort(scores.sum(1).abs(), descending=True, stable=True)

        def nodes(batch: Batch, size: int) -> Tensor:
            kept = torch.zeros(graph.sources, dtype=torch.bool)
            kept[order[:size]] = True
            return keep_nodes(model, batch, kept)

        curves["nodes"] = _curve("nodes", graph.sources, batches, nodes, progress)
    if "edges" in levels:

        def edges(batch: Batch, size: int) -> Tensor:
            return keep_edges(model, batch, top_edges(graph, scores, size))

        curves["edges"] = _curve("edges", int(graph.possible().sum()), batches, edges, progress)
    if "links" in levels:
        curves["links"] = _link_curve(model, batches, graph, progress)
    return Circuits(curves, scores, graph)


def _curve(
    level: Level,
    total: int,
    batches: list[Batch],
    measure: Callable[[Batch, int], Tensor],
    progress: Callable[[str], None],
) -> Curve:
    def mean_metric(size: int) -> float:
        progress(f"keeping {size:,} of {total:,} {level}")
        return torch.cat([measure(batch, size).cpu() for batch in batches]).mean().item()

    try:
        return measure_curve(total, mean_metric)
    except ZeroDivisionError as error:
        raise GossamerError(
            f"patching all {level} changes nothing: the metric does not tell the prompts apart"
        ) from error


def _link_curve(model: PreTrainedModel, batches: list[Batch], graph: Graph, progress: Callable[[str], None]) -> Curve:
    """Links have no name across prompts of other lengths: each prompt keeps the same number of its own best ones."""
    orders = []
    progress("scores of links")
    for batch in batches:
        scores = link_scores(model, batch)
        tokens = scores.shape[-1]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand_as(scores)
        orders.append(torch.argsort(scores.abs().masked_fill(~allowed, -1).flatten(1), dim=1, descending=True))
    lengths = [batch.clean.shape[1] for batch in batches for _ in batch.clean]
    total = round(graph.layers * graph.heads * sum(n * (n + 1) / 2 for n in lengths) / len(lengths))

    def links(batch: Batch, size: int) -> Tensor:
        place = next(index for index, other in enumerate(batches) if other is batch)
        prompts, tokens = batch.clean.shape
        kept = torch.zeros(orders[place].shape, dtype=torch.bool)
        kept.scatter_(1, orders[place][:, : size if size < total else kept.shape[1]], True)
        return keep_links(model, batch, kept.view(prompts, graph.layers, graph.heads, tokens, tokens))

    return _curve("links", total, batches, links, progress)
