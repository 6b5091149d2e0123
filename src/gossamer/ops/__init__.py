"""Gated attention: one door, :func:`gated_attention`, and the implementations behind it."""

from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from gossamer.ops.chunked import gated_attention_chunked
from gossamer.ops.gates import MAX_POSITIONS, GatedAttention, fold_seed, make_pairs, noise_keys
from gossamer.ops.naive import gated_attention_naive

__all__ = ["GatedAttention", "fold_seed", "gated_attention"]


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
    seed: int = 0,
    implementation: Literal["naive", "chunked"] = "chunked",
) -> GatedAttention:
    """Attention with a hard on/off gate on every link (arXiv 2512.05865): out_i = sum_j A_ij P_ij v_j.

    ``S = scale * q k^T`` (soft-capped), ``P = softmax(S)`` over the allowed keys, ``G = S + gate_bias``;
    ``A = 1[G > 0]``, or ``1[G + n > 0]`` with logistic noise n when ``sample``. The result is not
    renormalised: closed links contribute nothing, a row with every gate closed is zero. The gradient of A
    is that of sigma(G + n) (straight-through).

    Args:
        q: queries, position encoding applied. The last query stands at the last key.
        k, v: keys and values; ``heads`` is a multiple of ``kv_heads`` (grouped queries), and gates belong
            to query heads.
        gate_bias: b per query head; ``inf`` forces a head's gates open, ``-inf`` shut.
        scale: of the logits; 1/sqrt(d_head) if None.
        causal: forbid keys after the query.
        mask: True where allowed; either ``[batch, keys]`` for padding or ``[batch, 1, queries, keys]``.
            ``causal`` and ``window`` hold besides.
        lengths: real tokens of each row when padding is on the right; instead of ``mask``.
        window: how many last keys a query may read, its own included.
        softcap: c in ``S = c tanh(S / c)`` (Gemma 2).
        sample: sampled gates (training) rather than hard ones (evaluation).
        seed: of the noise; see :mod:`gossamer.ops.gates` for its formula.
        implementation: ``naive`` is the definition, ``chunked`` takes memory linear in the length.

    Returns:
        A :class:`GatedAttention`.

    Raises:
        ValueError: on shapes or arguments that do not fit.
    """
    batch, heads, queries, d_head = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if k.shape[0] != batch or v.shape[:3] != k.shape[:3] or k.shape[3] != d_head:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
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
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, must be at least 1")
    if sample and keys > MAX_POSITIONS:
        raise ValueError(f"{keys} keys: sampled gates tell at most {MAX_POSITIONS} positions apart")
    pairs = make_pairs(batch, queries, keys, causal=causal, window=window, mask=mask, lengths=lengths, device=q.device)
    implementations = {"naive": gated_attention_naive, "chunked": gated_attention_chunked}
    return implementations[implementation](
        q,
        k,
        v,
        gate_bias,
        pairs,
        scale=d_head**-0.5 if scale is None else scale,
        softcap=softcap,
        noise_keys=noise_keys(seed, batch, heads, q.device) if sample else None,
    )
