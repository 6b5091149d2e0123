"""Reference implementation of gated attention in plain PyTorch; memory is quadratic in the length.

    S = scale q k^T,  soft-capped        P = softmax of S over the allowed keys        G = S + b
    A = 1[G + n > 0] if sampled, else 1[G > 0];  its gradient is that of sigma(G + n), or sigma(G)
    output = (A * P) v                   expected open links = sum of sigma(G)

Every other implementation is tested against this one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.ops.gates import GatedAttentionOutput, OpenLinks, Pairs, noise_keys
from gossamer.ops.options import AttentionOptions
from gossamer.ops.weights import attention_logits, attention_weights, per_query_head


def gated_attention(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    v: Float[Tensor, "batch kv_heads keys d_value"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    options: AttentionOptions,
) -> GatedAttentionOutput:
    """Gated attention over the given pairs, computed in float32 or wider."""
    scale, softcap, noise, expect, count = options
    exact = torch.promote_types(q.dtype, torch.float32)
    value = per_query_head(v.to(exact), q.shape[1])
    gate_logits, pattern, allowed, log_sum_exp = _links(q, k, gate_bias, pairs, scale, softcap)
    noisy = gate_logits
    if noise is not None:
        uniforms = pairs.uniforms(noise_keys(noise, *q.shape[:2]), slice(0, pairs.queries), slice(0, pairs.keys))
        noisy = gate_logits + torch.logit(uniforms.to(exact))
    soft = torch.sigmoid(noisy)
    gates = (noisy > 0).to(exact) + soft - soft.detach()

    return GatedAttentionOutput(
        output=((gates * pattern) @ value).to(q.dtype),
        expected_open=torch.where(allowed, torch.sigmoid(gate_logits), 0.0).sum(-1) if expect else None,
        open_links=((gate_logits > 0) & allowed).sum(-1) if count else None,
        allowed_links=allowed.sum(-1),
        log_sum_exp=log_sum_exp.detach(),
    )


def open_links(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    *,
    scale: float,
    softcap: float | None,
) -> OpenLinks:
    """The open links and their attention weights."""
    gate_logits, pattern, allowed, _ = _links(q, k, gate_bias, pairs, scale, softcap)
    opened = (gate_logits > 0) & allowed
    _, _, query, key = opened.nonzero(as_tuple=True)
    return OpenLinks(opened.sum((-1, -2)), (query << 16 | key).to(torch.int32), pattern[opened].float())


def _links(
    q: Tensor, k: Tensor, gate_bias: Tensor, pairs: Pairs, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G, P and the allowed pairs, each ``[batch, heads, queries, keys]``, and the log of P's denominator."""
    exact = torch.promote_types(q.dtype, torch.float32)
    key = per_query_head(k.to(exact), q.shape[1])
    allowed = pairs.allowed(slice(0, pairs.queries), slice(0, pairs.keys))
    allowed = allowed.expand(q.shape[0], q.shape[1], -1, -1)
    logits = attention_logits(q.to(exact), key, scale, softcap)
    log_sum_exp = logits.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    return logits + gate_bias.to(exact)[:, None, None], attention_weights(logits, allowed), allowed, log_sum_exp
