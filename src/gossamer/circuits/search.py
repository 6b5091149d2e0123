"""Find circuits of one model for one task at three levels: score units, choose circuits, measure by intervention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.ablations import find_ablation
from gossamer.circuits.activation_cache import run_with_cache, source_outputs
from gossamer.circuits.config import LEVELS, Level
from gossamer.circuits.graph import Graph, prune, prune_links, top_edges
from gossamer.circuits.intervention import run_with_edges, run_with_links, run_with_nodes
from gossamer.circuits.mask_search import UnitSet
from gossamer.circuits.metrics import Curve, Point, measure_curve
from gossamer.circuits.scores.base import Score
from gossamer.circuits.scores.eap_ig_inputs import EAP_IG_INPUTS
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch, Prompts
from gossamer.errors import GossamerError


@dataclass(frozen=True)
class Circuits:
    """Circuits found in one model.

    Attributes:
        graph: the model's graph.
        curves: faithfulness by size, for each level. Link counts are per prompt, averaged over the prompts.
        scores: mean scores of the component edges over the prompts; zeros if only links were requested.
        node_scores: mean scores of the nodes, in the same way.
        link_scores: scores of the attention links, by batch; empty if links were not requested.
        batches: the prompts of each batch.
        absolute: whether units were chosen by largest absolute score instead of lowest score.
        sets: sets found by a search, by level, measured on the prompts of the search: one set, or for links one of each
            prompt; empty with other scores.
        left_when_cut: f when the smallest circuit that explains 90 % is cut, by level; None if no circuit does.
    """

    graph: Graph
    curves: dict[Level, Curve]
    scores: Float[Tensor, "sources destinations"]
    node_scores: Float[Tensor, " sources"]
    link_scores: tuple[Float[Tensor, "prompts layers heads tokens tokens"], ...]
    batches: tuple[Batch, ...]
    absolute: bool
    sets: Mapping[Level, tuple[UnitSet, ...]] = field(default_factory=dict)
    left_when_cut: Mapping[Level, float | None] = field(default_factory=dict)

    def nodes(self, count: int) -> Bool[Tensor, " sources"]:
        """The best ``count`` nodes."""
        scores = self.node_scores
        kept = torch.zeros(self.graph.sources, dtype=torch.bool)
        kept[torch.argsort(scores.abs() if self.absolute else -scores, descending=True, stable=True)[:count]] = True
        return kept

    def edges(self, count: int) -> Bool[Tensor, "sources destinations"]:
        """The best ``count`` edges, without those cut off from the input or the logits."""
        return prune(self.graph, top_edges(self.graph, self.scores, count, absolute=self.absolute))

    def links(self, count: int) -> list[Bool[Tensor, "prompts layers heads tokens tokens"]]:
        """The best ``count`` links of each prompt, without those from which no path leads to the last position."""
        return [prune_links(top_links(scores, count, absolute=self.absolute)) for scores in self.link_scores]


def find_circuits(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    levels: tuple[Level, ...] = LEVELS,
    score: Score = EAP_IG_INPUTS,
    ablation: str = "patch",
    absolute: bool = True,
    batch_size: int = 16,
    progress: Callable[[str], None] = lambda line: None,
) -> Circuits:
    """Score the units of a model on a task and measure how much the best units explain.

    Args:
        model: dense or gated, in ``eval()`` mode.
        prompts: the task's prompts.
        levels: which kinds of units.
        score: the score that ranks the units.
        ablation: what units outside a circuit carry: a name in ``gossamer.circuits.ablations.ABLATIONS``.
        absolute: choose the largest absolute scores instead of the lowest (the units that help the metric most).
        batch_size: rows per forward pass: prompts, or several circuits on fewer prompts.
        progress: called with a short description of the current step.

    Raises:
        GossamerError: if the metric does not distinguish clean from corrupted prompts; if there is no such ablation; if
            links are requested and the ablation or the score is not defined for them.
    """
    if "links" in levels and not score.has_links:
        raise GossamerError(f"the score {score.name} is not defined for links")
    if "links" in levels and find_ablation(ablation).links is None:
        raise GossamerError(f"the ablation {ablation} is not defined for links")
    batches = tuple(prompts.batches(batch_size))
    means = mean_source_outputs(model, batches) if find_ablation(ablation).averages else {}
    scored = _score_units(model, batches, means, levels, score, ablation, absolute, progress)
    proof = _Proof(model, scored, means, ablation, batch_size, progress)
    curves = {level: measure_curve(proof.total(level), partial(proof.metrics, level)) for level in levels}
    return replace(
        scored, curves=curves, left_when_cut={level: proof.left_when_cut(level, curves[level]) for level in levels}
    )


def _score_units(
    model: PreTrainedModel,
    batches: tuple[Batch, ...],
    means: Mapping[int, Tensor],
    levels: tuple[Level, ...],
    score: Score,
    ablation: str,
    absolute: bool,
    progress: Callable[[str], None],
) -> Circuits:
    """Score all units of these levels; the result has no curves yet."""
    graph, count = graph_of(model), sum(len(batch.clean) for batch in batches)
    if score.search is not None:
        return _search_sets(model, batches, means, levels, score, ablation, absolute, progress)
    assert score.edges is not None
    scores, node_scores = torch.zeros(graph.sources, graph.destinations), torch.zeros(graph.sources)
    for done, batch in enumerate(batches if set(levels) - {"links"} else ()):
        progress(f"scores of nodes and edges, batch {done + 1} of {len(batches)}")
        average = means.get(batch.clean.shape[1])
        if "edges" in levels or score.nodes is None:
            scores += score.edges(model, batch, ablation=ablation, mean=average).cpu() / count
        if "nodes" in levels and score.nodes is not None:
            node_scores += score.nodes(model, batch, ablation=ablation, mean=average).cpu() / count
    if score.nodes is None:
        node_scores = scores.sum(1)
    links: list[Tensor] = []
    if "links" in levels:
        assert score.links is not None
        for done, batch in enumerate(batches):
            progress(f"scores of links, batch {done + 1} of {len(batches)}")
            links.append(score.links(model, batch, ablation=find_ablation(ablation).links).cpu())
    return Circuits(graph, {}, scores, node_scores, tuple(links), batches, absolute)


def _search_sets(
    model: PreTrainedModel,
    batches: tuple[Batch, ...],
    means: Mapping[int, Tensor],
    levels: tuple[Level, ...],
    score: Score,
    ablation: str,
    absolute: bool,
    progress: Callable[[str], None],
) -> Circuits:
    """Search for sets of units; the result has no curves yet."""
    graph = graph_of(model)
    scores: dict[Level, Tensor] = {
        "nodes": torch.zeros(graph.sources),
        "edges": torch.zeros(graph.sources, graph.destinations),
    }
    sets: dict[Level, tuple[UnitSet, ...]] = {}
    for units in ("nodes", "edges"):
        if units in levels:
            assert score.search is not None
            scores[units], found = score.search(
                model, batches, units, ablation=ablation, means=means, progress=progress
            )
            sets[units] = (found,)
    links: list[Tensor] = []
    outside = find_ablation(ablation).links
    if "links" in levels and outside is not None:
        assert score.link_search is not None
        for batch in batches:
            found_links, of_prompts = score.link_search(model, batch, ablation=outside, progress=progress)
            links.append(found_links)
            sets["links"] = (*sets.get("links", ()), *of_prompts)
    return Circuits(graph, {}, scores["edges"], scores["nodes"], tuple(links), batches, absolute, sets)


@dataclass(frozen=True)
class _Proof:
    """Measures the metric of circuits of the best units by intervention."""

    model: PreTrainedModel
    scored: Circuits
    means: Mapping[int, Tensor]
    ablation: str
    batch_size: int
    progress: Callable[[str], None]

    def total(self, level: Level) -> int:
        """Number of units at the level; for links, the mean per prompt."""
        graph = self.scored.graph
        if level == "nodes":
            return graph.sources
        if level == "edges":
            return int(graph.possible().sum())
        lengths = [batch.clean.shape[1] for batch in self.scored.batches for _ in batch.clean]
        return round(graph.layers * graph.heads * sum(n * (n + 1) / 2 for n in lengths) / len(lengths))

    def metrics(self, level: Level, sizes: list[int], *, cut: bool = False) -> list[float]:
        """Return the mean metric over the prompts of the best ``size`` units, for each of ``sizes``.

        Args:
            cut: measure all units except these; the input node is never cut.
        """
        batches = self.scored.batches
        metrics = torch.zeros(len(sizes), dtype=torch.double)
        units = None if level == "links" else [self._units(level, size) for size in sizes]
        outside = find_ablation(self.ablation).links if level == "links" else self.ablation
        for place, batch in enumerate(batches):
            self.progress(f"keeping {sizes[0]:,} to {sizes[-1]:,} {level}, batch {place + 1} of {len(batches)}")
            other = run_with_cache(self.model, batch.corrupted, links=level == "links")
            other.mean = self.means.get(batch.clean.shape[1])
            for some in torch.arange(len(sizes)).split(max(1, self.batch_size // len(batch.clean))):
                kept = [self._links(place, sizes[at]) if units is None else units[at] for at in some.tolist()]
                circuits = torch.stack(kept)
                if cut:
                    circuits = self._everything(level, place) & ~circuits
                    if level == "nodes":
                        circuits[:, 0] = True  # without the input, nothing of a prompt is left
                values = _RUN[level](self.model, batch, circuits, ablation=outside, other=other)
                metrics[some] += values.double().cpu().sum(1)
        return (metrics / sum(len(batch.clean) for batch in batches)).tolist()

    def left_when_cut(self, level: Level, curve: Curve) -> float | None:
        """f when the smallest circuit that explains 90 % is cut; None if no circuit does."""
        if curve.first_size is None:
            return None
        (metric,) = self.metrics(level, [curve.first_size], cut=True)
        return (metric - curve.nothing) / (curve.everything - curve.nothing)

    def _units(self, level: Level, size: int) -> Tensor:
        return self.scored.nodes(size) if level == "nodes" else self.scored.edges(size)

    def _links(self, batch: int, size: int) -> Tensor:
        if size < self.total("links"):
            return prune_links(top_links(self.scored.link_scores[batch], size, absolute=self.scored.absolute))
        # A prompt longer than the mean has more links than the mean prompt's total.
        return self._everything("links", batch)

    def _everything(self, level: Level, batch: int) -> Tensor:
        graph = self.scored.graph
        if level == "nodes":
            return torch.ones(graph.sources, dtype=torch.bool)
        if level == "edges":
            return graph.possible()
        return torch.ones_like(self.scored.link_scores[batch], dtype=torch.bool).tril()


_RUN: dict[Level, Callable[..., Tensor]] = {
    "nodes": run_with_nodes,
    "edges": run_with_edges,
    "links": run_with_links,
}


def faithfulness_of(
    model: PreTrainedModel,
    prompts: Prompts,
    kept: Bool[Tensor, "sources destinations"],
    *,
    neurons: Bool[Tensor, "sources d_model"] | None = None,
    fed: Bool[Tensor, " sources"] | None = None,
    ablation: str = "patch",
    batch_size: int = 16,
) -> Point:
    """Measure how much one circuit of edges explains, after pruning edges cut off from the input or the logits.

    Args:
        model: dense or gated, in ``eval()`` mode.
        prompts: the task's prompts.
        kept: the circuit.
        neurons: which dimensions of a source's output its kept edges carry; all if None.
        fed: sources that are kept even if no kept edge leads to them; see :func:`gossamer.circuits.graph.prune`.
        ablation: what all other edges carry.
        batch_size: prompts per forward pass.

    Raises:
        GossamerError: if the metric does not distinguish clean from corrupted prompts.
    """
    graph = graph_of(model)
    possible, pruned = graph.possible(), prune(graph, kept, fed=fed)
    circuits = ((torch.zeros_like(possible), None), (pruned, neurons), (possible, None))
    metrics = torch.zeros(3, dtype=torch.double)
    batches = tuple(prompts.batches(batch_size))
    means = mean_source_outputs(model, batches) if find_ablation(ablation).averages else {}
    for batch in batches:
        other = run_with_cache(model, batch.corrupted)
        other.mean = means.get(batch.clean.shape[1])
        for place, (circuit, chosen) in enumerate(circuits):
            values = run_with_edges(model, batch, circuit, ablation=ablation, other=other, neurons=chosen)
            metrics[place] += values.double().cpu().sum()
    nothing, metric, everything = (metrics / len(prompts.kept)).tolist()
    if everything == nothing:
        raise GossamerError("patching all edges changes nothing: the metric does not tell the prompts apart")
    return Point(int(pruned.sum()), metric, (metric - nothing) / (everything - nothing))


def mean_source_outputs(
    model: PreTrainedModel, batches: tuple[Batch, ...]
) -> dict[int, Float[Tensor, "sources tokens d_model"]]:
    """Mean output of each source at each position over the corrupted prompts, separately for each prompt length.

    Lengths are not mixed because a position means different things in prompts of different lengths. If only one prompt
    has a length, the mean is that prompt's output.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for batch in batches:
        prompts, length = batch.corrupted.shape
        written = source_outputs(model, batch.corrupted).sum(1)
        sums[length] = written + sums[length] if length in sums else written
        counts[length] = counts.get(length, 0) + prompts
    return {length: total / counts[length] for length, total in sums.items()}


def top_links(
    scores: Float[Tensor, "prompts layers heads tokens tokens"], count: int, *, absolute: bool = True
) -> Bool[Tensor, "prompts layers heads tokens tokens"]:
    """Select the ``count`` links of each prompt with the largest absolute scores, or the lowest (those that help most).

    Links do not correspond across prompts of different lengths, so each prompt keeps the same number of its best links.
    """
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    ranked = (scores.abs() if absolute else -scores).masked_fill(~allowed, -torch.inf).flatten(1)
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    order = torch.argsort(ranked, dim=1, descending=True, stable=True)[:, :count]
    kept.scatter_(1, order, True)
    return kept.view_as(scores) & allowed
