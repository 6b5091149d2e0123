"""Split a model's residual stream into its parts, with hooks on the model's modules.

Inside :func:`stream_hooks`, a :class:`StreamHooks` sees and can change what every part of a model reads and writes:

    read_input(x)              the initial stream: token and position embeddings
    read_attention(layer, x)   the stream that a layer's attention reads, before any norm
    project(layer, name, ...)  what enters and leaves each of the projections to q, k and v
    attend(layer, ...)         queries, keys (positions applied) and values of each head; returns the heads' outputs. If
                               read_attention() repeated the batch, the inputs cover all repetitions and the outputs a
                               single one
    norm_heads(layer, norm)    the norm between the heads and the stream, where there is one
    read_mlp(layer, x)         the stream that a layer's MLP reads, before any norm
    write_heads(layer, c)      what each head adds to the stream, including a norm after attention
    write_mlp(layer, c)        what the MLP adds
    read_logits(x)             the stream that the last norm and the unembedding read

This works for every model family whose layers consist of the parts in :mod:`gossamer.models.structure`, dense or
gated. Attention is computed here, through transformers' attention interface, from the same definition as
:mod:`gossamer.ops.naive`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gossamer.circuits.graph import Graph
from gossamer.circuits.norms import FixedNorm, fixed_norm
from gossamer.errors import GossamerError
from gossamer.models.architectures import architecture_of, attention_modules
from gossamer.models.attention import GateState, gated_mask
from gossamer.models.structure import Architecture, Branches
from gossamer.ops.weights import attention_logits, attention_weights, causal_pairs, per_query_head

IMPLEMENTATION = "gossamer_circuits"
"""Name under which the hooked attention is registered with transformers."""


Norm = Callable[[Tensor], Tensor]


class StreamHooks:
    """Base class of hooks, which changes nothing; subclasses override methods to record or change values."""

    def read_input(self, x: Float[Tensor, "batch tokens d_model"]) -> Tensor:
        """Called before the first layer."""
        return x

    def read_attention(self, layer: int, x: Float[Tensor, "batch tokens d_model"], norm: Norm) -> Tensor:
        """Called before a layer's attention; ``norm`` is what the layer applies before its projections."""
        return x

    def project(
        self, layer: int, name: str, x: Float[Tensor, "batch tokens d_model"], y: Float[Tensor, "batch tokens columns"]
    ) -> Tensor:
        """Called after the projection ``name`` of x to y."""
        return y

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: "Pattern"
    ) -> Float[Tensor, "batch heads tokens d_value"]:
        """Return the heads' outputs; ``pattern(q, k)`` returns the attention weights, 0 for closed links.

        q, k and v are ``[batch, heads, tokens, ...]``, with keys and values repeated for each query head.
        """
        return pattern(q, k) @ v

    def norm_heads(self, layer: int, norm: FixedNorm) -> None:
        """Called with the norm after attention that is applied to what the heads write, if there is one."""

    def write_heads(self, layer: int, contributions: Float[Tensor, "heads batch tokens d_model"]) -> None:
        """Called after a layer's attention."""

    def read_mlp(self, layer: int, x: Float[Tensor, "batch tokens d_model"]) -> Tensor:
        """Called before a layer's MLP."""
        return x

    def write_mlp(self, layer: int, contribution: Float[Tensor, "batch tokens d_model"]) -> None:
        """Called after a layer's MLP."""

    def read_logits(self, x: Float[Tensor, "batch tokens d_model"]) -> Tensor:
        """Called before the last norm."""
        return x


class Pattern:
    """The attention weights of one layer in one forward pass: A P, or P in a dense model."""

    def __init__(self, module: nn.Module, mask: Bool[Tensor, "..."] | None, scale: float, softcap: float | None):
        self.mask, self.scale, self.softcap = mask, scale, softcap
        state = getattr(module, "gate_state", None)
        gated = isinstance(state, GateState) and not state.forced_open
        self.bias: Tensor | None = module.gate_bias.detach() if gated else None  # type: ignore[operator]

    def __call__(
        self, q: Float[Tensor, "batch heads tokens d"], k: Float[Tensor, "batch heads tokens d"]
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """Return the attention weights; keys must be repeated for each query head."""
        logits = attention_logits(q, k, self.scale, self.softcap)
        allowed = causal_pairs(q.shape[2], k.shape[2], q.device) if self.mask is None else self.mask
        weights = attention_weights(logits, allowed)
        if self.bias is not None:
            weights = weights * (logits.detach() + self.bias[:, None, None] > 0)
        return weights


def graph_of(model: PreTrainedModel) -> Graph:
    """Return the graph of a supported model.

    Raises:
        GossamerError: naming the part of the model that cannot be split.
    """
    branches = branches_of(model)
    return Graph(model.config.num_hidden_layers, model.config.num_attention_heads, branches.parallel)


def branches_of(model: PreTrainedModel) -> Branches:
    """Return where the layers of a model read and write the residual stream.

    Raises:
        GossamerError: naming the part of the model that cannot be split.
    """
    architecture = architecture_of(model)
    if architecture.opaque is not None or architecture.branches is None:
        raise GossamerError(
            f"{model.config.model_type} {architecture.opaque}, so its residual stream cannot be split into what heads "
            "and MLPs write; circuits and explanations need that, sparsify and evaluate do not"
        )
    return architecture.branches


@contextmanager
def stream_hooks(model: PreTrainedModel, hooks: StreamHooks) -> Iterator[None]:
    """Context manager in which forward passes of the model call the hooks; the model is restored on exit.

    Sequences must not be padded, and no cache may be used.
    """
    architecture, branches = architecture_of(model), branches_of(model)
    before = model.config._attn_implementation
    with ExitStack() as stack:
        layers = list(model.get_submodule(architecture.layers))
        begin = layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: _replace_first(args, kwargs, hooks.read_input), with_kwargs=True
        )
        stack.callback(begin.remove)
        for layer, module in enumerate(layers):
            _Layer(architecture, branches, module, layer, hooks).attach(stack)
        assert architecture.final_norm is not None
        final = model.get_submodule(architecture.final_norm)
        after = _AfterLast(hooks)
        for hook in (layers[-1].register_forward_hook(after.note), final.register_forward_pre_hook(after.read)):
            stack.callback(hook.remove)
        model.config._attn_implementation = IMPLEMENTATION
        stack.callback(setattr, model.config, "_attn_implementation", before)
        yield


@contextmanager
def attention_hooks(model: PreTrainedModel, hooks: StreamHooks) -> Iterator[None]:
    """:func:`stream_hooks` for ``attend`` only, which is faster when no other hook is needed."""
    before = model.config._attn_implementation
    with ExitStack() as stack:
        for layer, module in enumerate(attention_modules(model)):
            module.visited_layer = _Attention(layer, hooks)  # type: ignore[assignment]
            stack.callback(delattr, module, "visited_layer")
        model.config._attn_implementation = IMPLEMENTATION
        stack.callback(setattr, model.config, "_attn_implementation", before)
        yield


class _AfterLast:
    """Calls ``read_logits`` at the last norm, but not where a family also uses it before the first layer."""

    def __init__(self, hooks: StreamHooks) -> None:
        self.hooks, self.due = hooks, False

    def note(self, *_: Any) -> None:
        """Note that the last layer has run."""
        self.due = True

    def read(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Called before the norm runs."""
        if not self.due:
            return None
        self.due = False
        return self.hooks.read_logits(args[0]), *args[1:]


class _Attention:
    """Attention of one layer with hooks."""

    def __init__(self, layer: int, hooks: StreamHooks) -> None:
        self.layer, self.hooks = layer, hooks

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        """Return the heads' outputs as transformers' attention functions do: ``[rows, tokens, heads, d_value]``."""
        heads = q.shape[1]
        outputs = self.hooks.attend(self.layer, q, per_query_head(k, heads), per_query_head(v, heads), pattern)
        return outputs.transpose(1, 2).contiguous()  # as eager attention; some models view it


class _Layer(_Attention):
    """The hooks of one layer."""

    def __init__(
        self, architecture: Architecture, branches: Branches, module: nn.Module, layer: int, hooks: StreamHooks
    ) -> None:
        super().__init__(layer, hooks)
        self.multiplier, self.shared_norm = branches.multiplier, branches.shared_norm
        self.attention = module.get_submodule(architecture.attention)
        *self.projections, out = architecture.projections
        self.projection = self.attention.get_submodule(out)
        self.attention_in, self.attention_out, self.mlp_in = (
            module.get_submodule(name) for name in (branches.attention_in, branches.attention_out, branches.mlp_in)
        )
        self.mlp_out = [module.get_submodule(name) for name in branches.mlp_out]
        self.stream: Tensor | None = None
        self.repetitions = 1
        self.written: list[Tensor] = []
        self.outputs: Tensor | None = None

    def attach(self, stack: ExitStack) -> None:
        """Register the hooks; they are removed when the stack exits."""
        hooks = [
            self.attention_in.register_forward_pre_hook(self._read_attention, with_kwargs=True),
            self.attention.register_forward_pre_hook(self._repeat_positions, with_kwargs=True),
            self.projection.register_forward_pre_hook(self._merge),
            self.attention_out.register_forward_hook(self._write_heads),
            self.mlp_in.register_forward_pre_hook(self._read_mlp, with_kwargs=True),
            *(part.register_forward_hook(self._write_mlp) for part in self.mlp_out),
        ]
        for name in self.projections:
            hook = self.attention.get_submodule(name).register_forward_hook(partial(self._project, name))
            hooks.append(hook)
        for hook in hooks:
            stack.callback(hook.remove)
        self.attention.visited_layer = self  # type: ignore[assignment]
        stack.callback(delattr, self.attention, "visited_layer")

    def _read_attention(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def read(x: Tensor) -> Tensor:
            self.stream, self.written = x, []
            norm = _same if self.attention_in is self.attention else self.attention_in.forward
            changed = self.hooks.read_attention(self.layer, x, norm)
            self.repetitions = len(changed) // len(x)
            return changed

        return _replace_first(args, kwargs, read)

    def _repeat_positions(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Repeat rotary position embeddings with the batch if they differ between rows."""
        positions = kwargs.get("position_embeddings")
        if self.repetitions == 1 or not isinstance(positions, tuple) or len(positions[0]) == 1:
            return None
        repeated = tuple(each.repeat(self.repetitions, *[1] * (each.ndim - 1)) for each in positions)
        return args, {**kwargs, "position_embeddings": repeated}

    def _project(self, name: str, _: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
        return self.hooks.project(self.layer, name, args[0], result)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        """Return the outputs, expanded to the rows of all repetitions."""
        outputs = super().attend(q, k, v, pattern)
        self.outputs = outputs
        # With a repeated batch these rows are placeholders; _merge inserts the outputs.
        return outputs if len(outputs) == len(q) else outputs.new_zeros(()).expand(len(q), *outputs.shape[1:])

    def _merge(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        assert self.outputs is not None
        return (self.outputs.flatten(2),)

    def _write_heads(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        assert self.outputs is not None
        contributions = torch.einsum("bthv,hvd->hbtd", self.outputs, self.output_map(self.outputs.shape[2]))
        if self.attention_out is not self.attention:
            norm = fixed_norm(module, args[0])
            self.hooks.norm_heads(self.layer, norm)
            contributions = norm.linear(contributions)
        self.outputs = None
        self.hooks.write_heads(self.layer, contributions)

    def output_map(self, heads: int) -> Float[Tensor, "heads d_value d_model"]:
        """Matrices that map each head's output to what it adds to the stream, without a norm after attention."""
        weight: Tensor = self.projection.weight  # type: ignore[assignment]
        rows = weight if isinstance(self.projection, Conv1D) else weight.mT
        return rows.reshape(heads, -1, rows.shape[-1]) * self.multiplier

    def _read_mlp(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def read(x: Tensor) -> Tensor:
            assert self.stream is not None
            if self.shared_norm:
                return self.attention_in.forward(self.hooks.read_mlp(self.layer, self.stream))
            # In some families batch and tokens are one dimension here.
            return self.hooks.read_mlp(self.layer, x.view_as(self.stream)).view_as(x)

        return _replace_first(args, kwargs, read)

    def _write_mlp(self, _: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        assert self.stream is not None
        output = result[0] if isinstance(result, tuple) else result
        self.written.append(output.view_as(self.stream))
        if len(self.written) == len(self.mlp_out):
            self.hooks.write_mlp(self.layer, sum(self.written[1:], self.written[0]) * self.multiplier)


def _replace_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _same(x: Tensor) -> Tensor:
    return x


def output_maps(model: PreTrainedModel) -> list[Float[Tensor, "heads d_value d_model"]]:
    """Matrices from each head's output to what it adds to the stream, by layer, without a norm after attention."""
    architecture, branches = architecture_of(model), branches_of(model)
    layers = enumerate(model.get_submodule(architecture.layers))
    heads = model.config.num_attention_heads
    return [
        _Layer(architecture, branches, module, at, StreamHooks()).output_map(heads).detach() for at, module in layers
    ]


def _visited_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    layer = module.visited_layer
    assert isinstance(layer, _Attention)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, key, value, Pattern(module, attention_mask, scale, softcap)), None


AttentionInterface.register(IMPLEMENTATION, _visited_attention)
AttentionMaskInterface.register(IMPLEMENTATION, gated_mask)
