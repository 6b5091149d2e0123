"""Record what every source writes and every destination reads in one run of a model."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.graph import Graph
from gossamer.circuits.streams import Norm, Pattern, StreamHooks, graph_of, stream_hooks
from gossamer.errors import GossamerError
from gossamer.models.architectures import PROVEN


@dataclass
class ActivationCache:
    """Activations of one run without gradients.

    Attributes:
        written: what each source added to the stream.
        read: the full stream before the attention and the MLP of each layer, and before the logits; by (kind, layer).
        weights, values: attention weights and values of each layer, with keys and values repeated for each query
            head; empty unless requested.
        logits: logits at the last position.
        mean: mean output of each source, for mean ablation; if None, the mean over this batch is used.
    """

    written: Float[Tensor, "sources batch tokens d_model"]
    read: dict[tuple[str, int], Float[Tensor, "batch tokens d_model"]]
    weights: list[Float[Tensor, "batch heads tokens tokens"]]
    values: list[Float[Tensor, "batch heads tokens d_value"]]
    logits: Float[Tensor, "batch vocab"]
    mean: Float[Tensor, "sources tokens d_model"] | None = None

    def constant(self, graph: Graph, kind: str, layer: int) -> Tensor:
        """Return the part of a stream that no source wrote: the output biases."""
        sources = graph.sources_of(graph.read(layer, kind))
        return self.read[kind, layer] - self.written[:sources].sum(0)


@dataclass
class LinkRecorder(StreamHooks):
    """Records attention weights (0 for closed links) and values of each layer.

    Attributes:
        links: whether to store them; a subclass can override :meth:`keep` to process them without storing.
    """

    links: bool = True
    weights: list[Float[Tensor, "batch heads tokens tokens"]] = field(default_factory=list)
    values: list[Float[Tensor, "batch heads tokens d_value"]] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        weights = pattern(q, k)
        self.keep(weights, v)
        return weights @ v

    def keep(self, weights: Tensor, values: Tensor) -> None:
        """Receive the weights and values of one layer; called in layer order."""
        if self.links:
            self.weights.append(weights)
            self.values.append(values)


@dataclass(kw_only=True)
class _Recorder(LinkRecorder):
    graph: Graph
    streams: bool = True
    written: Tensor | None = None
    read: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def read_input(self, x: Tensor) -> Tensor:
        self.written = x.new_empty(self.graph.sources, *x.shape)
        self.written[0] = x
        return x

    def read_attention(self, layer: int, x: Tensor, norm: Norm) -> Tensor:
        if self.streams:
            self.read["q", layer] = x
        return x

    def write_heads(self, layer: int, contributions: Tensor) -> None:
        assert self.written is not None
        self.written[self.graph.head(layer, 0) : self.graph.mlp(layer)] = contributions

    def read_mlp(self, layer: int, x: Tensor) -> Tensor:
        if self.streams:
            self.read["mlp", layer] = x
        return x

    def write_mlp(self, layer: int, contribution: Tensor) -> None:
        assert self.written is not None
        self.written[self.graph.mlp(layer)] = contribution

    def read_logits(self, x: Tensor) -> Tensor:
        if self.streams:
            self.read["logits", 0] = x
        return x


@torch.no_grad()
def run_with_cache(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"], *, links: bool = False
) -> ActivationCache:
    """Run the model and record its activations; with ``links``, attention weights and values too."""
    recorder = _Recorder(graph=graph_of(model), links=links)
    with stream_hooks(model, recorder):
        logits = model(input_ids=input_ids.to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1]
    assert recorder.written is not None
    cache = ActivationCache(recorder.written, recorder.read, recorder.weights, recorder.values, logits)
    if model.config.model_type not in PROVEN:
        _check(model, cache)
    return cache


def _check(model: PreTrainedModel, cache: ActivationCache) -> None:
    """Check that only heads, MLPs and constant biases write into the residual stream.

    Raises:
        GossamerError: if anything else does; the message names the model family.
    """
    graph = graph_of(model)
    for kind, layer in cache.read:
        rest = cache.constant(graph, kind, layer)
        limit = max(1e-3, 8 * torch.finfo(rest.dtype).eps) * cache.read[kind, layer].abs().max()
        if not (rest - rest[:1, :1]).abs().max() <= limit:
            raise GossamerError(
                f"heads and MLPs of {model.config.model_type} are not all that writes into its residual stream, so it "
                "cannot be split; circuits and explanations need that, sparsify and evaluate do not"
            )


@torch.no_grad()
def source_outputs(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "sources batch tokens d_model"]:
    """Run the model and record only what each source adds to the stream."""
    recorder = _Recorder(graph=graph_of(model), links=False, streams=False)
    with stream_hooks(model, recorder):
        model(input_ids=input_ids.to(model.device), use_cache=False, logits_to_keep=1)
    assert recorder.written is not None
    return recorder.written
