"""Top-k baseline, which is expected to collapse: keep the k largest attention weights of each query in the dense model.

The weights are not renormalised, as with gates; a second curve renormalises them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from gossamer.measures.language import measure_language
from gossamer.models.attention import gated_mask
from gossamer.ops.weights import attention_logits, attention_weights, causal_pairs, per_query_head

IMPLEMENTATION = "gossamer_topk"


@dataclass(frozen=True)
class TopkPoint:
    """One point of the curve: ``loss`` in nats when the ``k`` largest weights of each query are kept."""

    k: int
    renormalised: bool
    open_fraction: float
    loss: float


def topk_pattern(
    pattern: Float[Tensor, "*rows keys"], allowed: Bool[Tensor, "*rows keys"], k: int, renormalise: bool
) -> Float[Tensor, "*rows keys"]:
    """Set all but the k largest allowed weights in each row of an attention pattern to zero."""
    kept = pattern.masked_fill(~allowed, -1.0).topk(min(k, pattern.shape[-1]), dim=-1).indices
    sparse = pattern * torch.zeros_like(pattern).scatter_(-1, kept, 1.0) * allowed
    return sparse / sparse.sum(-1, keepdim=True).clamp_min(1e-30) if renormalise else sparse


@contextmanager
def topk_attention(model: PreTrainedModel, k: int, *, renormalise: bool) -> Iterator[list[tuple[int, int]]]:
    """Context manager in which a dense model attends only to the k strongest keys of each query.

    Yields:
        A list that receives (open links, allowed links) of one head over the batch, for each layer and forward pass.
    """
    links: list[tuple[int, int]] = []

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        key, value = (per_query_head(x, query.shape[1]) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        logits = attention_logits(query.float(), key.float(), scale, softcap)
        allowed = attention_mask
        if allowed is None:
            queries, keys = logits.shape[-2:]
            allowed = causal_pairs(queries, keys, logits.device)[None, None]
        pattern = attention_weights(logits, allowed)
        pattern = topk_pattern(pattern, allowed.expand_as(pattern), k, renormalise)
        per_query = allowed.expand(query.shape[0], 1, *logits.shape[-2:]).sum(-1)
        links.append((int(per_query.clamp(max=k).sum()), int(per_query.sum())))
        return (pattern.to(value.dtype) @ value).transpose(1, 2), None

    before = model.config._attn_implementation
    AttentionInterface.register(IMPLEMENTATION, forward)
    AttentionMaskInterface.register(IMPLEMENTATION, gated_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield links
    finally:
        model.set_attn_implementation(before)


def topk_curve(
    dense: PreTrainedModel,
    blocks: Int[Tensor, "blocks tokens"],
    ks: tuple[int, ...],
    *,
    batch_size: int = 8,
    precision: str = "fp32",
    prompt_tokens: int = 0,
) -> list[TopkPoint]:
    """Measure loss and open fraction of the dense model under top-k attention, without and with renormalisation."""
    points = []
    for renormalise in (False, True):
        for k in ks:
            with topk_attention(dense, k, renormalise=renormalise) as links:
                measured = measure_language(
                    dense, blocks, batch_size=batch_size, precision=precision, prompt_tokens=prompt_tokens
                )
            opened, allowed = (sum(column) for column in zip(*links, strict=True))
            points.append(TopkPoint(k, renormalise, opened / allowed, measured.loss))
    return points
