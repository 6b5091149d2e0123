"""Attention weights by their definition, shared by all plain, quadratic computations.

S = softcap(scale q k^T)        P = softmax of S over the allowed keys; 0 where none is allowed
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def per_query_head(x: Float[Tensor, "batch kv_heads *rest"], heads: int) -> Float[Tensor, "batch heads *rest"]:
    """Repeat grouped keys or values, once for each query head."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def causal_pairs(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """The pairs that causality allows; the last query is aligned with the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attention_logits(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "batch heads queries keys"]:
    """The logits S; the keys are already repeated for each query head."""
    logits = q @ k.mT * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def attention_weights(
    logits: Float[Tensor, "batch heads queries keys"], allowed: Bool[Tensor, "..."]
) -> Float[Tensor, "batch heads queries keys"]:
    """The attention weights P; ``allowed`` is broadcast to the logits."""
    weights = torch.softmax(logits.masked_fill(~allowed, -torch.inf), dim=-1)
    return torch.where(allowed, weights, 0.0)
