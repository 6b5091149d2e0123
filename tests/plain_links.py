"""A prediction under cut attention links, from the plain definition of the op, without code from gossamer."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def plainly(model, ids: Sequence[int], target: int, kept: Tensor) -> Tensor:
    """Compute log p(target) after the tokens with the attention below: hard gates, softmax, and only ``kept`` links.

    ``kept``: [layers, heads, tokens, tokens].
    """

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if attention_mask is None else attention_mask
        weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
        if hasattr(module, "gate_bias"):
            weights = weights * (scores + module.gate_bias[:, None, None] > 0)
        weights = weights * kept[module.layer_idx]
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    AttentionInterface.register("gossamer_plain_links", attend)
    AttentionMaskInterface.register("gossamer_plain_links", sdpa_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = "gossamer_plain_links"
    try:
        with torch.no_grad():
            return (
                model(input_ids=torch.tensor([list(ids)]), use_cache=False)
                .logits[0, -1]
                .float()
                .log_softmax(-1)[target]
            )
    finally:
        model.config._attn_implementation = before
