"""The gated attention op for transformers' attention and mask interfaces, and the state of the gates.

Both interfaces are needed: with the attention function alone, transformers builds no causal mask.

With activation checkpointing, the backward pass runs a layer again, and the state of the gates may have changed by
then. So each forward pass carries its state: a hook on the module that holds the layers adds it to the keyword
arguments. The layers pass these on to the attention function, and checkpointing keeps them for the recomputation.
:class:`_SameGates` detects recomputation that does not keep them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_tracing

from gossamer.errors import GossamerError
from gossamer.models.architectures import attention_modules
from gossamer.ops import AttentionOptions, Pairs, attend, fold_seed, make_pairs, noise_of

IMPLEMENTATION = "gossamer"
"""The name under which the op is registered with transformers."""


@dataclass(frozen=True)
class LinkCounts:
    """Link counts of each query in one layer and one forward pass; see :class:`gossamer.GatedAttentionOutput`."""

    expected_open: Float[Tensor, "batch heads queries"]
    open_links: Int[Tensor, "batch heads queries"]
    allowed_links: Int[Tensor, "batch heads queries"]
    log_sum_exp: Float[Tensor, "batch heads queries"]


class GatePass:
    """The gate state of one forward pass, also used when its layers are recomputed.

    It is passed to the layers as an argument. It is not a dataclass because FSDP2 copies dataclasses among a layer's
    arguments, and counts written to a copy are lost.

    Args:
        state: the gate state when the pass begins.

    Attributes:
        sampled, noise, forced_open, counts: as in :class:`GateState` when the pass began.
        key: hash that distinguishes passes with different gates; 0 in compiled code, which must serve all passes.
        graded: whether gradients were enabled when the pass began.
        counted: layers whose links were counted; recomputing a layer does not count them again.
    """

    def __init__(self, state: "GateState") -> None:
        self.sampled, self.noise = state.sampled, state.noise
        self.forced_open, self.counts = state.forced_open, state.counts
        self.key = 0
        if not torch.compiler.is_compiling():
            self.key = hash((state.sampled, state.seed, state.first_row, state.forced_open))
        self.graded = torch.is_grad_enabled()
        self.counted: set[int] = set()
        self._pairs: dict[tuple[object, ...], tuple[Tensor | None, Pairs]] = {}

    def pairs(self, mask: Tensor | None, query: Tensor, key: Tensor, window: int | None) -> Pairs:
        """The allowed pairs, made once for all layers with the same mask."""
        if torch.compiler.is_compiling():
            return _pairs(mask, query, key, window)
        name = (id(mask), query.shape[2], key.shape[2], window, query.device)
        if name not in self._pairs:  # keep the mask too, so that its id is not reused
            self._pairs[name] = (mask, _pairs(mask, query, key, window))
        return self._pairs[name][1]


@dataclass
class GateState:
    """The current state of the gates of one model; shared by all its attention modules.

    Attributes:
        dense_implementation: transformers' attention implementation before gates were added.
        sampled: sample the gates instead of using the hard gates of evaluation.
        seed: of the noise; each layer folds its index into it.
        first_row: index of the first row of a forward pass within the batch of a whole training step.
        noise: ``[layers, 2]``, seed and first row as the op takes them; a tensor, so that compiled code serves every
            seed.
        forced_open: every gate is open, whatever its logit; this is the dense model's attention.
        switched_off: attention deliberately uses the dense model's implementation.
        counts: link counts by layer, filled if not None.
    """

    dense_implementation: str = "eager"
    sampled: bool = False
    seed: int = 0
    first_row: int = 0
    noise: Int[Tensor, "layers 2"] | None = field(default=None, repr=False)
    forced_open: bool = False
    switched_off: bool = False
    counts: dict[int, LinkCounts] | None = field(default=None, repr=False)

    def new_pass(self) -> GatePass:
        """The state for a forward pass that starts now."""
        return GatePass(self)


class GatePassHook:
    """The forward pre-hook that gives each forward pass its :class:`GatePass`."""

    def __init__(self, state: GateState) -> None:
        self.state = state

    def __call__(
        self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add the pass to the arguments; not in compiled code, which recomputes what it traced.

        Raises:
            GossamerError: if the gates would silently have no effect, or attention weights are requested.
        """
        implementation = str(module.config._attn_implementation)
        if not implementation.startswith(IMPLEMENTATION) and not self.state.switched_off:
            raise GossamerError(
                f"the attention implementation of this gated model was set to {implementation}, so its gates would do "
                f"nothing: model.set_attn_implementation({IMPLEMENTATION!r}) brings them back, "
                "gossamer.as_dense(model) runs it without them, gossamer.remove_gates(model) takes them off"
            )
        if kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)):
            raise GossamerError(
                "a gated model returns no attention weights; gossamer.circuits.activation_cache.run_with_cache(model, "
                "ids, links=True).weights has them, closed links at 0"
            )
        if torch.compiler.is_compiling() or implementation != IMPLEMENTATION:
            return None
        return args, {**kwargs, "gate_pass": self.state.new_pass()}


class LayerPassHook:
    """Forward pre-hook for a layer that does not pass on its keyword arguments: sets the pass on the attention module.

    Args:
        attention: the attention module of that layer.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the pass; also runs before a layer is recomputed, with the arguments of its first run."""
        self.attention.gate_pass = kwargs.get("gate_pass")  # type: ignore[assignment]


class _SameGates(torch.autograd.Function):
    """Identity that checks, in the backward pass, whether activations were recomputed under other gates.

    In a checkpointed layer, the saved tensor comes from the recomputation, but ``ctx.key`` from the first run.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, key: int) -> Tensor:
        ctx.key = key
        ctx.save_for_backward(torch.tensor(key))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, None]:
        if int(ctx.saved_tensors[0]) != ctx.key:
            raise GossamerError(
                "activations were recomputed under other gates than those of the forward pass; call backward() within "
                "the same sampled_gates or forced_open"
            )
        return d_output, None


class _NoGradient(torch.autograd.Function):
    """Identity for expected links without a gradient: raises in the backward pass instead of returning zero."""

    @staticmethod
    def forward(ctx: Any, expected: Tensor, _: Tensor) -> Tensor:
        return expected.view_as(expected)

    @staticmethod
    def backward(ctx: Any, d_expected: Tensor) -> NoReturn:
        raise GossamerError(
            "expected links have no gradient under reentrant activation checkpointing; enable it with "
            "use_reentrant=False"
        )


def gate_state(model: PreTrainedModel) -> GateState:
    """The gate state of a gated model.

    Raises:
        GossamerError: if the model has no gates.
    """
    for module in attention_modules(model):
        if isinstance(state := getattr(module, "gate_state", None), GateState):
            return state
        break
    raise GossamerError("this model has no gates; gossamer.add_gates(model) puts them in")


@contextmanager
def _set(state: GateState, **values: Any) -> Iterator[None]:
    before = {name: getattr(state, name) for name in values}
    for name, value in values.items():
        setattr(state, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(state, name, value)


@contextmanager
def sampled_gates(model: PreTrainedModel, seed: int, first_row: int = 0) -> Iterator[None]:
    """Sample the gates with the noise of ``seed`` inside the context; outside, they are hard.

    A forward pass keeps its gates: ``backward()`` may be called outside the context, with activation checkpointing or
    without. Forward passes over parts of a batch draw the same noise as one over the whole batch if each is given the
    index ``first_row`` of its first row.
    """
    layers = list(attention_modules(model))
    noise = [noise_of(fold_seed(seed, layer), first_row, torch.device("cpu")) for layer in range(len(layers))]
    device = next(layers[0].parameters()).device
    with _set(gate_state(model), sampled=True, seed=seed, first_row=first_row, noise=torch.stack(noise).to(device)):
        yield


@contextmanager
def forced_open(model: PreTrainedModel) -> Iterator[None]:
    """Open every gate inside the context: the model computes the same as without gates."""
    with _set(gate_state(model), forced_open=True):
        yield


@contextmanager
def counted_links(model: PreTrainedModel) -> Iterator[dict[int, LinkCounts]]:
    """Write the link counts of each forward pass inside the context to the yielded dict, by layer."""
    counts: dict[int, LinkCounts] = {}
    with _set(gate_state(model), counts=counts):
        yield counts


def gated_attention_forward(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries d_head"],
    key: Float[Tensor, "batch kv_heads keys d_head"],
    value: Float[Tensor, "batch kv_heads keys d_value"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    gate_pass: GatePass | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch queries heads d_value"], None]:
    """Attention function for transformers: apply gates, record counts, return the output in transformers' layout.

    ``attention_mask`` is the result of :func:`padding_mask`. Attention dropout is not applied: the noise of the gates
    takes its place, and the loss must be comparable with the dense model's.
    """
    if s_aux is not None:
        raise GossamerError("attention sinks (s_aux) cannot be gated")
    state = getattr(module, "gate_state", None)
    if not isinstance(state, GateState):
        raise GossamerError("this attention module has no gates; gossamer.add_gates(model) puts them in")
    gates = gate_pass or getattr(module, "gate_pass", None) or state.new_pass()
    bias = module.gate_bias
    layer = int(module.gate_layer)  # type: ignore[arg-type]
    counted = gates.counts is not None and layer not in gates.counted
    noise = gates.noise[layer].to(query.device) if gates.sampled and gates.noise is not None else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    result = attend(
        query,
        key,
        value,
        torch.full_like(bias, torch.inf) if gates.forced_open else bias,  # type: ignore[arg-type]
        gates.pairs(attention_mask, query, key, sliding_window),
        AttentionOptions(scale, softcap, noise, expect=counted, counted=counted),
    )
    if gates.counts is not None and counted:
        expected = result.expected_open
        assert expected is not None
        assert result.open_links is not None
        if gates.graded and not torch.is_grad_enabled():
            with torch.enable_grad():
                expected = _NoGradient.apply(expected, torch.zeros((), requires_grad=True))
        gates.counts[layer] = LinkCounts(expected, result.open_links, result.allowed_links, result.log_sum_exp)
        gates.counted.add(layer)
    output = result.output
    if output.requires_grad and not torch.compiler.is_compiling():
        output = _SameGates.apply(output, gates.key)
    return output.transpose(1, 2), None


def _pairs(mask: Tensor | None, query: Tensor, key: Tensor, window: int | None) -> Pairs:
    """The allowed pairs: causal, within the window and real by :func:`padding_mask`; or those of a full mask."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    full = mask is not None and mask.ndim == 4
    first_real = None
    if mask is not None and full:
        mask = _as_bool(mask, batch)
    elif mask is not None and (dropped := mask.shape[-1] - keys):
        first_real = mask.int().argmax(-1) - dropped
        mask = mask[:, dropped:]
    return make_pairs(
        batch, queries, keys,
        causal=not full, window=None if full else window, mask=mask, lengths=None, device=query.device,
        first_real=first_real,
    )  # fmt: skip


def _as_bool(mask: Tensor, batch: int) -> Bool[Tensor, "batch 1 queries keys"]:
    if mask.dtype != torch.bool:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        if mask[allowed].any():
            raise GossamerError("an attention mask with additive biases cannot be gated; give 0 and -inf only")
        mask = allowed
    if mask.shape[1] != 1:
        raise GossamerError("an attention mask of its own for each head cannot be gated")
    return mask.expand(batch, -1, -1, -1)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Bool[Tensor, "batch tokens"] | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Bool[Tensor, "batch tokens"] | Bool[Tensor, "batch 1 queries keys"] | None:
    """Mask function for transformers: which tokens are real, including those that a cache has dropped.

    The op handles causality and the window itself; as with flash attention, the layer passes the window to the
    attention function. None means that every token is real. If other rules restrict the allowed pairs, or if a static
    cache has room after the last query, the result is that of :func:`gated_mask`.
    """
    tokens = kv_offset + kv_length
    windowed = local_size is None or (
        local_size == getattr(config, "sliding_window", None) and getattr(config, "attention_chunk_size", None) is None
    )
    at_the_end = isinstance(q_offset, int) and q_offset + q_length == tokens
    fits = attention_mask is None or attention_mask.shape[-1] == tokens
    if not (allow_is_causal_skip and windowed and at_the_end and fits):
        return gated_mask(
            batch_size, q_length, kv_length, q_offset, attention_mask, allow_is_causal_skip,
            kv_offset=kv_offset, local_size=local_size, config=config, **kwargs,
        )  # fmt: skip
    if attention_mask is None or (not is_tracing(attention_mask) and bool(attention_mask.all())):
        if not kv_offset:
            return None
        attention_mask = torch.ones(batch_size, tokens, dtype=torch.bool, device=kwargs.get("device"))
    return attention_mask


def gated_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    attention_mask: Bool[Tensor, "batch keys"] | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Bool[Tensor, "batch 1 queries keys"] | None:
    """The full mask of allowed pairs: sdpa's boolean mask, with no allowed pairs for padding queries.

    None means a plain causal mask whose last query is aligned with the last key. sdpa interprets None differently if a
    static cache has room after the last query, so in that case the full mask is built.
    """
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
        **kwargs,
    )
    if mask is None or attention_mask is None:
        return mask
    real = attention_mask[:, q_offset : q_offset + q_length]
    return mask & real[:, None, :, None]


# Register on import, so that unpickling a gated model finds the implementation.
AttentionInterface.register(IMPLEMENTATION, gated_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
