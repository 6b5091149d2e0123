"""Shared parts of the attribution scores: gradients of the metric at every destination, and their products.

    edges    (a_u(other) - a_u(clean)) . dm/din_v, summed over batch and positions
    links    w'_ij (v'_j . g_i) - w_ij (v_j . g_i), g the gradient at the head's output, primes the corrupted run

If units outside a circuit carry zero or a mean, it replaces the corrupted run's values.

Gradients are taken before the norm of the destination. All edges of a batch need one forward and one backward pass.
The gradient at each head's q, k or v is then propagated back through that head's rows of the projection and through the
norm, a few destinations at a time. Memory is thus bounded by what the sources write in one run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.ablations import LinkAblation, find_ablation
from gossamer.circuits.activation_cache import ActivationCache, run_with_cache, source_outputs
from gossamer.circuits.graph import Graph
from gossamer.circuits.projections import Projection, Projections, projections_of
from gossamer.circuits.streams import Norm, Pattern, StreamHooks, graph_of, stream_hooks
from gossamer.circuits.tasks.base import Batch
from gossamer.models.frozen import frozen

AT_ONCE = 32
"""Number of destinations whose gradients at the stream are held at once."""


@dataclass
class _Taps(StreamHooks):
    """Keeps the tensors whose gradients are needed, each as a separate node of the autograd graph.

    Attributes:
        links: whether gradients are needed at the heads' outputs, instead of at what heads and MLPs read.
        begin: initial stream that replaces the prompts' embeddings.
        difference: tensor from which each source's output is subtracted in place; cannot be combined with ``begin``.
        shift: sources, and what to add to every stream that all of them have written to.
    """

    graph: Graph
    places: list[Projections] = field(default_factory=list)
    links: bool = False
    begin: Tensor | None = None
    difference: Tensor | None = None
    shift: tuple[slice, Tensor] | None = None
    streams: list[Tensor] = field(default_factory=list)
    normed: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    projected: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    wanted: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def _subtract(self, sources: slice, values: Tensor) -> None:
        if self.difference is not None:
            self.difference[sources] -= values.detach()

    def _shifted(self, kind: str, layer: int, x: Tensor) -> Tensor:
        if self.shift is None or self.graph.sources_of(self.graph.read(layer, kind)) < self.shift[0].stop:
            return x
        return x + self.shift[1]

    def read_input(self, x: Tensor) -> Tensor:
        self._subtract(slice(0, 1), x[None])
        start = x if self.begin is None else self.begin
        return start.detach().requires_grad_()

    def write_heads(self, layer: int, contributions: Tensor) -> None:
        self._subtract(slice(self.graph.head(layer, 0), self.graph.mlp(layer)), contributions)

    def write_mlp(self, layer: int, contribution: Tensor) -> None:
        mlp = self.graph.mlp(layer)
        self._subtract(slice(mlp, mlp + 1), contribution[None])

    def read_attention(self, layer: int, x: Tensor, norm: Norm) -> Tensor:
        self.streams.append(self._shifted("q", layer, x).clone())
        return self.streams[layer]

    def project(self, layer: int, name: str, x: Tensor, y: Tensor) -> Tensor:
        self.normed[name, layer], self.projected[name, layer] = x, y
        return y

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        q = q.clone()
        output = pattern(q, k) @ v
        if self.links:
            self.wanted["output", layer] = output
        else:
            self.wanted.update({("q", layer): q, ("k", layer): k, ("v", layer): v})
        return output

    def _want(self, kind: str, layer: int, x: Tensor) -> Tensor:
        if self.links:
            return x
        self.wanted[kind, layer] = branch = x.clone()
        return branch

    def read_mlp(self, layer: int, x: Tensor) -> Tensor:
        return self._want("mlp", layer, self._shifted("mlp", layer, x))

    def read_logits(self, x: Tensor) -> Tensor:
        return self._want("logits", 0, self._shifted("logits", 0, x))


def products(
    model: PreTrainedModel,
    batch: Batch,
    difference: Float[Tensor, "sources batch tokens d_model"],
    *,
    begin: Float[Tensor, "batch tokens d_model"] | None = None,
    shift: tuple[slice, Float[Tensor, "batch tokens d_model"]] | None = None,
) -> Float[Tensor, "sources destinations"]:
    """Multiply each source's ``difference`` by the gradient at each destination, in one run on the clean prompts.

    Args:
        begin: initial stream; the prompts' embeddings if None.
        shift: sources whose outputs are replaced in this run, and the resulting change of their sum.
    """
    taps = _Taps(graph_of(model), projections_of(model), begin=begin, shift=shift)
    _run(model, batch, taps)
    return _scores_of_run(taps, difference)


def change(
    model: PreTrainedModel,
    batch: Batch,
    ablation: str,
    mean: Float[Tensor, "sources tokens d_model"] | None,
) -> tuple[Float[Tensor, "sources batch tokens d_model"], Tensor, Tensor]:
    """Change of each source's output under ablation, and the embeddings of the clean and the corrupted prompts."""
    corrupted = source_outputs(model, batch.corrupted)
    start = corrupted[0].clone()
    difference = find_ablation(ablation).replace(corrupted, mean)
    del corrupted
    clean = source_outputs(model, batch.clean)
    difference -= clean
    return difference, clean[0].clone(), start


def products_of_clean_run(
    model: PreTrainedModel,
    batch: Batch,
    ablation: str,
    mean: Float[Tensor, "sources tokens d_model"] | None,
) -> Float[Tensor, "sources destinations"]:
    """:func:`products` of :func:`change`, without an extra run for what the sources write on clean prompts."""
    difference = find_ablation(ablation).replace(source_outputs(model, batch.corrupted), mean)
    taps = _Taps(graph_of(model), projections_of(model), difference=difference)
    _run(model, batch, taps)
    return _scores_of_run(taps, difference)


def _scores_of_run(taps: _Taps, difference: Tensor) -> Tensor:
    graph, places = taps.graph, taps.places
    scores = difference.new_zeros(graph.sources, graph.destinations)
    for layer in range(graph.layers):
        changes = difference[: graph.sources_before(layer)].flatten(1)
        reads = [(kind, head) for kind in "qkv" for head in range(graph.heads)]
        for first in range(0, len(reads), AT_ONCE):
            some = reads[first : first + AT_ONCE]
            gradients = torch.cat([
                _at_stream(taps, layer, kind, places[layer][kind], [head for _, head in of_kind])
                for kind, of_kind in groupby(some, key=lambda read: read[0])
            ])  # fmt: skip
            read = graph.read(layer, *some[0])
            scores[: len(changes), read : read + len(some)] = changes @ gradients.flatten(1).mT
        mlp = graph.read(layer, "mlp")
        scores[:, mlp] = _column(graph, difference, taps.gradients["mlp", layer], mlp)
    scores[:, graph.logits] = _column(graph, difference, taps.gradients["logits", 0], graph.logits)
    return scores


def _run(model: PreTrainedModel, batch: Batch, taps: _Taps) -> None:
    """Run one forward and one backward pass; the autograd graph is kept to go from q, k and v to the stream."""
    with frozen(model), stream_hooks(model, taps), torch.enable_grad():
        logits = model(input_ids=batch.clean.to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1]
        total = batch.measure(logits).sum()
        found = torch.autograd.grad(total, list(taps.wanted.values()), retain_graph=not taps.links)
    taps.gradients.update(zip(taps.wanted, found, strict=True))


def _at_stream(
    taps: _Taps, layer: int, kind: str, place: Projection, heads: list[int]
) -> Float[Tensor, "heads batch tokens d_model"]:
    """For each of the heads, the gradient at the stream through q, k or v of that head only."""
    inner, projected = taps.wanted[kind, layer], taps.projected[place.name, layer]
    gradients = inner.new_empty(len(heads), *inner.shape[:1], *taps.streams[layer].shape[1:])
    for turn in _turns(place, heads):
        only = torch.zeros_like(inner)
        only[:, turn] = taps.gradients[kind, layer][:, turn]
        (outputs,) = torch.autograd.grad(inner, projected, only, retain_graph=True)
        columns = place.columns[turn]
        own = outputs[..., columns].flatten(0, 1).transpose(0, 1)  # heads, batch and tokens, columns
        gradients[[head - heads[0] for head in turn]] = (own @ place.weight(columns)).view(
            len(turn), *gradients.shape[1:]
        )
    normed, stream = taps.normed[place.name, layer], taps.streams[layer]
    if normed is not stream:
        (gradients,) = torch.autograd.grad(normed, stream, gradients, retain_graph=True, is_grads_batched=True)
    return gradients


def _turns(place: Projection, heads: list[int]) -> list[list[int]]:
    """Group heads for the backward step, such that no two heads in a group share columns of the projection."""
    shared = place.sharing()
    turns: list[list[int]] = []
    for head in heads:
        free = (turn for turn in turns if not shared[head, turn].any())
        turn = next(free, None)
        if turn is None:
            turns.append([head])
        else:
            turn.append(head)
    return turns


def _column(graph: Graph, difference: Tensor, gradient: Tensor, destination: int) -> Tensor:
    column = difference.new_zeros(graph.sources)
    sources = graph.sources_of(destination)
    column[:sources] = difference[:sources].flatten(1) @ gradient.flatten()
    return column


def link_products(
    model: PreTrainedModel,
    batch: Batch,
    ablation: LinkAblation,
    beginnings: Callable[[Tensor, Tensor], Sequence[Tensor]] = lambda clean, corrupted: [clean],
) -> Float[Tensor, "prompts layers heads tokens tokens"]:
    """Compute attribution scores of all attention links, for each prompt, with the gradient averaged over several runs.

    Under ``zero``, the corrupted run's links are taken as zero: the score estimates the effect of cutting the link.

    Args:
        beginnings: returns the initial stream of each run from the embeddings of the clean and the corrupted prompts,
            each ``[batch, tokens, d_model]``.
    """
    clean, corrupted = (run_with_cache(model, ids, links=True) for ids in (batch.clean, batch.corrupted))
    total: Tensor | None = None
    runs = beginnings(clean.written[0], corrupted.written[0])
    for begin in runs:
        taps = _Taps(graph_of(model), links=True, begin=begin)
        _run(model, batch, taps)
        layers = []
        for layer in range(taps.graph.layers):
            gradient = taps.gradients["output", layer]
            own = _link_value(clean, layer, gradient)
            layers.append(-own if ablation == "zero" else _link_value(corrupted, layer, gradient) - own)
        found = torch.stack(layers, 1) / len(runs)
        total = found if total is None else total + found
    assert total is not None
    return total


def _link_value(run: ActivationCache, layer: int, gradient: Int[Tensor, "..."]) -> Tensor:
    return run.weights[layer] * (gradient @ run.values[layer].mT)
