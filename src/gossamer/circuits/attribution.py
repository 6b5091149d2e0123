"""Scores by attribution patching: how much the metric would change if one unit's value were the corrupted run's.

    EAP      score(u -> v) = sum over batch and positions of (a_u(corrupted) - a_u(clean)) . dm/din_v
    EAP-IG   the same with the gradient averaged over m runs whose embeddings are
             corrupted + k/m (clean - corrupted), k = 0 .. m - 1  (Hanna et al. 2024, arXiv 2403.17806; "inputs")
    links    w'_ij (v'_j . g_i) - w_ij (v_j . g_i), g the gradient at the head's output, primes the corrupted run

Gradients are taken before the norm of the destination, on the clean run (EAP). All edges of a batch need one forward
and one backward pass. The gradient at q, k or v of one head is its gradient in the attention, carried back through
rotation, projection and norm, a few destinations at a time: the memory is that of what the sources wrote.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.graph import Graph
from gossamer.circuits.recording import Recording, record
from gossamer.circuits.streams import Pattern, Visitor, graph_of, visited
from gossamer.circuits.tasks.base import Batch

AT_ONCE = 8
"""Destinations whose gradients are held at once."""


@dataclass
class _Taps(Visitor):
    """Keeps the places at which gradients are wanted, each a node of its own in the graph of autograd."""

    begin: Tensor | None = None
    streams: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    inner: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def _tap(self, kind: str, layer: int, x: Tensor) -> Tensor:
        branch = x.clone()
        branch.retain_grad()
        self.streams[kind, layer] = branch
        return branch

    def read_input(self, x: Tensor) -> Tensor:
        start = x if self.begin is None else self.begin
        return start.detach().requires_grad_()

    def read_attention(self, layer: int, x: Tensor) -> Tensor:
        return self._tap("q", layer, x)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        expanded = (q.clone(), k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        output = pattern(*expanded[:2]) @ expanded[2]
        for x in (*expanded, output):
            x.retain_grad()
        self.inner.append(expanded)
        self.outputs.append(output)
        return output

    def read_mlp(self, layer: int, x: Tensor) -> Tensor:
        return self._tap("mlp", layer, x)

    def read_logits(self, x: Tensor) -> Tensor:
        return self._tap("logits", 0, x)


def edge_scores(model: PreTrainedModel, batch: Batch, *, steps: int = 0) -> Float[Tensor, "sources destinations"]:
    """EAP scores of all component edges, summed over the batch; EAP-IG with ``steps`` > 0.

    The score of an edge estimates how much the batch's summed metric changes when the edge is patched. The score of a
    node is the sum over its outgoing edges.
    """
    graph = graph_of(model)
    clean, corrupted = record(model, batch.clean), record(model, batch.corrupted)
    difference = corrupted.written - clean.written
    ends = (clean.written[0], corrupted.written[0])
    del clean, corrupted
    scores = difference.new_zeros(graph.sources, graph.destinations)
    for step in range(max(steps, 1)):
        begin = None if steps == 0 else ends[1] + step / steps * (ends[0] - ends[1])
        scores += _scores_of_run(model, batch, graph, difference, begin) / max(steps, 1)
    return scores


def _scores_of_run(
    model: PreTrainedModel, batch: Batch, graph: Graph, difference: Tensor, begin: Tensor | None
) -> Tensor:
    taps = _Taps(begin)
    _run(model, batch, taps, retain_graph=True)
    scores = difference.new_zeros(graph.sources, graph.destinations)
    for layer, inner in enumerate(taps.inner):
        stream = taps.streams["q", layer]
        changes = difference[: graph.sources_before(layer)].flatten(1)
        reads = range(*graph.attention_reads(layer).indices(graph.destinations))
        for first in range(0, len(reads), AT_ONCE):
            some = range(len(reads))[first : first + AT_ONCE]
            gradients = torch.stack([_carried_back(inner, stream, *divmod(place, graph.heads)) for place in some])
            scores[: len(changes), reads[first] : reads[first] + len(some)] = changes @ gradients.flatten(1).mT
        mlp = graph.read(layer, "mlp")
        scores[:, mlp] = _column(graph, difference, taps.streams["mlp", layer], mlp)
    scores[:, graph.logits] = _column(graph, difference, taps.streams["logits", 0], graph.logits)
    return scores


def _run(model: PreTrainedModel, batch: Batch, taps: _Taps, *, retain_graph: bool) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with visited(model, taps), torch.enable_grad():
            logits = model(input_ids=batch.clean, use_cache=False, logits_to_keep=1).logits[:, -1]
            batch.measure(logits).sum().backward(retain_graph=retain_graph)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _carried_back(inner: tuple[Tensor, Tensor, Tensor], stream: Tensor, kind: int, head: int) -> Tensor:
    """The gradient at the stream by way of q (0), k (1) or v (2) of one head only."""
    x = inner[kind]
    only = torch.zeros_like(x)
    assert x.grad is not None
    only[:, head] = x.grad[:, head]
    (gradient,) = torch.autograd.grad(x, stream, only, retain_graph=True)
    return gradient


def _column(graph: Graph, difference: Tensor, stream: Tensor, destination: int) -> Tensor:
    assert stream.grad is not None
    column = difference.new_zeros(graph.sources)
    sources = graph.sources_of(destination)
    column[:sources] = difference[:sources].flatten(1) @ stream.grad.flatten()
    return column


def link_scores(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "prompts layers heads tokens tokens"]:
    """Attribution scores of all attention links, by prompt; gradient on the clean run."""
    clean, corrupted = (record(model, ids, links=True) for ids in (batch.clean, batch.corrupted))
    taps = _Taps()
    _run(model, batch, taps, retain_graph=False)
    layers = []
    for layer, output in enumerate(taps.outputs):
        gradient = output.grad
        assert gradient is not None
        layers.append(_link_value(corrupted, layer, gradient) - _link_value(clean, layer, gradient))
    return torch.stack(layers, 1)


def _link_value(run: Recording, layer: int, gradient: Int[Tensor, "..."]) -> Tensor:
    return run.weights[layer] * (gradient @ run.values[layer].mT)
