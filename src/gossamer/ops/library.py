"""The fast implementations as PyTorch custom operators: ``gossamer::gated_attention`` and its backward pass.

The operators are opaque to PyTorch. Fake implementations give the shapes, dtypes and strides of their results, and
gradients are registered, so ``torch.compile`` includes them in its graphs. There is no second derivative.
"""

from importlib import import_module
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.ops.gates import GatedAttentionOutput, Pairs, empty_rows
from gossamer.ops.options import AttentionOptions, BackwardInputs


def attend(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    v: Float[Tensor, "batch kv_heads keys d_value"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    options: AttentionOptions,
    implementation: str,
) -> GatedAttentionOutput:
    """The same as :func:`gossamer.ops.naive.gated_attention`, by the module named ``implementation``."""
    scale, softcap, noise, expect, count = options
    output, expected, opened, log_sum_exp = _forward(
        q, k, v, gate_bias, pairs.real, pairs.mask, pairs.extents, noise,
        scale, pairs.causal, pairs.window, softcap, expect, count, implementation,
    )  # fmt: skip
    return GatedAttentionOutput(
        output,
        expected if expect else None,
        opened if count else None,
        pairs.allowed_links(q.shape[1]),
        log_sum_exp,
    )


def _pairs(
    q: Tensor, k: Tensor, causal: bool, window: int | None, real: Tensor | None, mask: Tensor | None,
    extents: Tensor | None,
) -> Pairs:  # fmt: skip
    return Pairs(q.shape[0], q.shape[2], k.shape[2], causal, window, real, mask, extents, q.device)


@torch.library.custom_op("gossamer::gated_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_bias: Tensor,
    real: Tensor | None,
    mask: Tensor | None,
    extents: Tensor | None,
    noise: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    expect: bool,
    count: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, expected and hard open links (empty unless requested), and log-sum-exp."""
    pairs = _pairs(q, k, causal, window, real, mask, extents)
    module = import_module(f"gossamer.ops.{implementation}")
    options = AttentionOptions(scale, softcap, noise, expect, count)
    output, expected, opened, log_sum_exp = module.forward(q, k, v, gate_bias, pairs, options)
    return (
        output,
        log_sum_exp.new_empty(0) if expected is None else expected,
        log_sum_exp.new_empty(0, dtype=torch.long) if opened is None else opened,
        log_sum_exp,
    )


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gate_bias: Tensor, real: Tensor | None, mask: Tensor | None,
    extents: Tensor | None, noise: Tensor | None, scale: float, causal: bool, window: int | None,
    softcap: float | None, expect: bool, count: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, queries, _ = q.shape
    output = empty_rows(q, v.shape[-1])
    log_sum_exp = q.new_empty(batch, heads, queries, dtype=torch.promote_types(q.dtype, torch.float32))
    expected = torch.empty_like(log_sum_exp) if expect else log_sum_exp.new_empty(0)
    opened = log_sum_exp.new_empty(log_sum_exp.shape if count else 0, dtype=torch.long)
    return output, expected, opened, log_sum_exp


@torch.library.custom_op("gossamer::gated_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_bias: Tensor,
    real: Tensor | None,
    mask: Tensor | None,
    extents: Tensor | None,
    noise: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    d_output: Tensor,
    d_expected: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias."""
    pairs = _pairs(q, k, causal, window, real, mask, extents)
    module = import_module(f"gossamer.ops.{implementation}")
    options = AttentionOptions(scale, softcap, noise)
    given = BackwardInputs(output, log_sum_exp, d_output, d_expected)
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = module.backward(q, k, v, gate_bias, pairs, options, given)
    return gradients


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gate_bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (empty_rows(x, x.shape[-1]) for x in (q, k, v))
    return dq, dk, dv, torch.empty_like(gate_bias)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, noise, scale, causal, window, softcap, expect, _, implementation = inputs
    # Save the same number of tensors for sampled and hard gates. Otherwise, activation checkpointing would fail on the
    # number of tensors before the check for recomputation under other gates could raise its error.
    saved_noise = tensors[0].new_empty(2, dtype=torch.int64) if noise is None else noise
    ctx.save_for_backward(*tensors, saved_noise, output[0], output[3])
    ctx.settings = (scale, causal, window, softcap, implementation)
    ctx.sampled, ctx.expect = noise is not None, expect
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_output: Tensor | None, d_expected: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *tensors, noise, output, log_sum_exp = ctx.saved_tensors
    gradients = _backward(
        *tensors,
        noise if ctx.sampled else None,
        output,
        log_sum_exp,
        torch.zeros_like(output) if d_output is None else d_output,
        d_expected if ctx.expect else None,
        *ctx.settings,
    )
    return (*gradients, *[None] * 11)


_forward.register_autograd(_differentiate, setup_context=_remember)


def _refuse_second(ctx: Any, *_: Tensor) -> NoReturn:
    raise RuntimeError("gated attention has no second derivative; implementation='naive' has one")


_backward.register_autograd(_refuse_second)
