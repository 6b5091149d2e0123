"""Gated attention: the entry point :func:`gated_attention` and its implementations."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gossamer.ops import library, naive
from gossamer.ops.gates import MAX_POSITIONS, GatedAttentionOutput, OpenLinks, Pairs, fold_seed, make_pairs, noise_of
from gossamer.ops.options import AttentionOptions

__all__ = [
    "AttentionOptions",
    "GatedAttentionOutput",
    "Implementation",
    "OpenLinks",
    "attend",
    "fold_seed",
    "gated_attention",
    "make_pairs",
    "open_links",
]

Implementation = Literal["naive", "chunked", "triton", "triton_fused"]
"""``naive`` is the reference; the others use memory linear in the length. ``triton_fused`` needs fewer operations for
the backward pass than ``triton``, but its gradients of q differ in the last bits from run to run."""

OLDEST_CAPABILITY = (8, 0)
"""Compute capability of the oldest NVIDIA GPUs that the Triton kernels support (Ampere)."""

MAX_FEATURES = 256
"""Largest head size that the Triton kernels support."""


def gated_attention(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    v: Float[Tensor, "batch kv_heads keys d_value"],
    gate_bias: Float[Tensor, " heads"],
    *,
    scale: float | None = None,
    causal: bool = True,
    mask: Bool[Tensor, "batch keys"] | Bool[Tensor, "batch 1 queries keys"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sample: bool = False,
    seed: int | Int[Tensor, ""] = 0,
    first_row: int | Int[Tensor, ""] = 0,
    first_real: Int[Tensor, " batch"] | None = None,
    expect: bool = True,
    count: bool = True,
    implementation: Implementation | None = None,
) -> GatedAttentionOutput:
    """Attention with a hard on/off gate on every link (arXiv 2512.05865): out_i = sum_j A_ij P_ij v_j.

    ``S = scale * q k^T`` (soft-capped), ``P = softmax(S)`` over the allowed keys, ``G = S + gate_bias``;
    ``A = 1[G > 0]``, or ``1[G + n > 0]`` with logistic noise n if ``sample``. The result is not
    renormalised: closed links contribute nothing, and a row with every gate closed is zero. The gradient of A
    is that of sigma(G + n), or of sigma(G) for hard gates (straight-through).

    Args:
        q: queries, position encoding applied. The last query is aligned with the last key.
        k, v: keys and values; ``heads`` is a multiple of ``kv_heads`` (grouped queries), and each query head has its
            own gates.
        gate_bias: b per query head; ``inf`` forces a head's gates open, ``-inf`` shut.
        scale: of the logits, positive; 1/sqrt(d_head) if None.
        causal: forbid keys after the query.
        mask: True where allowed; either ``[batch, keys]`` for padding or ``[batch, 1, queries, keys]``.
            ``causal`` and ``window`` apply in addition.
        lengths: number of real tokens in each row if padding is on the right; instead of ``mask``.
        window: number of last keys that a query may read, including its own position.
        softcap: c in ``S = c tanh(S / c)`` (Gemma 2).
        sample: use sampled gates (training) instead of hard ones (evaluation).
        seed: of the noise (:mod:`gossamer.ops.gates`). A tensor (int64, no dimensions) avoids recompilation of compiled
            code for each seed and, if it is on the GPU, synchronisation.
        first_row: index of the first of these rows in a larger batch; they draw the noise that they have there.
        first_real: index of each row's first real token among the keys, from which the noise counts; negative if a
            cache has dropped it. If None, taken from ``mask`` or ``lengths``.
        expect: compute the expected open links; evaluation that does not need them is faster without.
        count: count the hard open links; the kernels are faster without.
        implementation: None picks ``triton`` on a supported NVIDIA GPU for head sizes up to 256, else ``chunked``.

    Raises:
        ValueError: on invalid or mismatched shapes or arguments.
    """
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    pairs = _pairs(q, k, gate_bias, causal, mask, lengths, window, first_real)
    noise = noise_of(seed, first_row, q.device) if sample else None
    options = AttentionOptions(_scale(scale, q), softcap, noise, expect, count)
    return attend(q, k, v, gate_bias, pairs, options, implementation)


def attend(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    v: Float[Tensor, "batch kv_heads keys d_value"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    options: AttentionOptions,
    implementation: Implementation | None = None,
) -> GatedAttentionOutput:
    """:func:`gated_attention` with precomputed pairs, shared by all layers, and with the noise as one tensor."""
    _check_softcap(options.softcap)
    if options.noise is not None and pairs.keys > MAX_POSITIONS:
        raise ValueError(f"{pairs.keys} keys: sampled gates tell at most {MAX_POSITIONS} positions apart")
    q, k, v = _of_one_dtype(q, k, v)
    name = _implementation(implementation, q, v.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        if name == "naive":
            return naive.gated_attention(q, k, v, gate_bias, pairs, options)
        return library.attend(q, k, v, gate_bias, pairs, options, name)


@torch.no_grad()
def open_links(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    gate_bias: Float[Tensor, " heads"],
    *,
    scale: float | None = None,
    causal: bool = True,
    mask: Bool[Tensor, "batch keys"] | Bool[Tensor, "batch 1 queries keys"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> OpenLinks:
    """The links that the hard gates leave open, with their attention weights, without a queries x keys matrix.

    The arguments are those of :func:`gated_attention`. The same input gives the same bits. Only ``naive`` builds the
    full matrix.

    Raises:
        ValueError: on invalid or mismatched shapes or arguments; on more than 65,536 keys.
    """
    pairs = _pairs(q, k, gate_bias, causal, mask, lengths, window)
    _check_softcap(softcap)
    if pairs.keys > MAX_POSITIONS:
        raise ValueError(f"{pairs.keys} keys: links are written down for at most {MAX_POSITIONS}")
    q, k = _of_one_dtype(q, k)
    module = import_module(f"{__name__}.{_implementation(implementation, q)}")
    result = module.open_links(q, k, gate_bias, pairs, scale=_scale(scale, q), softcap=softcap)
    assert isinstance(result, OpenLinks)
    return result


def _pairs(
    q: Tensor,
    k: Tensor,
    gate_bias: Tensor,
    causal: bool,
    mask: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
    first_real: Tensor | None = None,
) -> Pairs:
    batch, heads, queries, d_head = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != d_head:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key/value heads")
    if gate_bias.shape != (heads,):
        raise ValueError(f"gate_bias has shape {tuple(gate_bias.shape)}, not one bias per query head ({heads},)")
    if keys < queries:
        raise ValueError(f"{queries} queries but only {keys} keys")
    if mask is not None and lengths is not None:
        raise ValueError("give mask or lengths, not both")
    if mask is not None and tuple(mask.shape) not in ((batch, keys), (batch, 1, queries, keys)):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, not {(batch, keys)} or {(batch, 1, queries, keys)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, not torch.bool; give True where a pair is allowed")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, not one length per row ({batch},)")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, must be at least 1")
    if first_real is not None and first_real.shape != (batch,):
        raise ValueError(f"first_real has shape {tuple(first_real.shape)}, not one index per row ({batch},)")
    return make_pairs(
        batch, queries, keys,
        causal=causal, window=window, mask=mask, lengths=lengths, device=q.device, first_real=first_real,
    )  # fmt: skip


def _of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors unchanged if their dtypes agree; else cast to the autocast dtype, as torch's attention does.

    Outside autocast, different dtypes raise ValueError.
    """
    dtypes = {x.dtype for x in tensors}
    device = tensors[0].device.type
    if len(dtypes) > 1 and torch.is_autocast_enabled(device):
        return [x.to(torch.get_autocast_dtype(device)) for x in tensors]
    if len(dtypes) > 1:
        raise ValueError(f"q, k and v are of different dtypes ({', '.join(str(x.dtype) for x in tensors)}); cast them")
    return list(tensors)


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if not scale > 0:
        raise ValueError(f"scale is {scale}, must be positive")
    return scale


def _check_softcap(softcap: float | None) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, must be positive")


@cache
def _triton_runs(device: torch.device) -> bool:
    """Whether the kernels run on the device; tensor cores support bfloat16 from compute capability 8.0 on."""
    if find_spec("triton") is None or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def _implementation(implementation: Implementation | None, q: Tensor, value_size: int = 0) -> Implementation:
    """The requested implementation, or the default for the inputs; ``naive`` for empty batches."""
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"implementation {implementation!r} is none of {', '.join(get_args(Implementation))}")
    if q.shape[0] == 0:
        return "naive"
    if implementation is None:
        fits = q.dtype != torch.float64 and max(q.shape[-1], value_size) <= MAX_FEATURES
        return "triton" if fits and q.is_cuda and _triton_runs(q.device) else "chunked"
    if implementation in ("triton", "triton_fused") and q.is_cuda and not _triton_runs(q.device):
        oldest = ".".join(str(part) for part in OLDEST_CAPABILITY)
        raise ValueError(
            f"the Triton kernels need Triton and an NVIDIA GPU of compute capability {oldest}; use 'chunked'"
        )
    return implementation
