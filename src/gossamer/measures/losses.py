"""The two losses that can be constrained, computed in chunks of positions.

With a vocabulary of 50,000, the logits are the largest tensor of a training step, and log-softmax in float32 allocates
several more tensors of that size. Here only :data:`POSITIONS` rows are in float32 at once, forward and backward, and
only the logits are kept for the backward pass. The gradient of both losses with respect to the logits is
softmax(logits) minus a distribution: the one-hot next token, or the dense model's prediction.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

POSITIONS = 256
"""Rows of logits per chunk."""

_NONE = -100
"""Target of a position without a next token to predict; ignored by the losses."""


def cross_entropy(
    logits: Float[Tensor, "batch tokens vocab"], input_ids: Int[Tensor, "batch tokens"], prompt_tokens: int = 0
) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy in nats, over all positions but the last of each row.

    The first ``prompt_tokens`` tokens of each row are given: predictions of them do not count.
    """
    return _TokenLoss.apply(logits.flatten(0, 1), _next_tokens(input_ids, prompt_tokens), None)


def kl_divergence(
    dense_logits: Float[Tensor, "batch tokens vocab"],
    sparse_logits: Float[Tensor, "batch tokens vocab"],
    prompt_tokens: int = 0,
) -> Float[Tensor, ""]:
    """Mean KL(dense || sparse) of the next-token distributions in nats, over the positions of :func:`cross_entropy`.

    No gradient flows to ``dense_logits``.
    """
    places = torch.zeros(sparse_logits.shape[:2], dtype=torch.long, device=sparse_logits.device)
    return _TokenLoss.apply(
        sparse_logits.flatten(0, 1), _next_tokens(places, prompt_tokens), dense_logits.detach().flatten(0, 1)
    )


def _next_tokens(input_ids: Tensor, prompt_tokens: int) -> Tensor:
    targets = functional.pad(input_ids[:, 1:], (0, 1), value=_NONE)
    targets[:, : max(0, prompt_tokens - 1)] = _NONE
    return targets.flatten()


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy with the targets, or KL from ``dense`` if it is given; targets equal to _NONE are ignored."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, dense: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, targets, dense)
        total = torch.zeros((), device=logits.device)
        for rows in _chunks(len(targets)):
            log_probabilities = torch.log_softmax(logits[rows].float(), dim=-1)
            if dense is None:
                total += functional.nll_loss(log_probabilities, targets[rows], reduction="sum", ignore_index=_NONE)
            else:
                wanted = torch.log_softmax(dense[rows].float(), dim=-1)
                each = functional.kl_div(log_probabilities, wanted, log_target=True, reduction="none").sum(-1)
                total += each[targets[rows] != _NONE].sum()
        return total / (targets != _NONE).sum()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, dense = ctx.saved_tensors
        counted = targets != _NONE
        share = d_loss / counted.sum()
        d_logits = torch.empty_like(logits)
        for rows in _chunks(len(targets)):
            difference = torch.softmax(logits[rows].float(), dim=-1)
            if dense is None:
                own = targets[rows].clamp(min=0)[:, None]
                difference.scatter_add_(1, own, torch.full_like(own, -1, dtype=difference.dtype))
            else:
                difference -= torch.softmax(dense[rows].float(), dim=-1)
            d_logits[rows] = difference.mul_((share * counted[rows])[:, None])
        return d_logits, None, None


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + POSITIONS) for start in range(0, rows, POSITIONS)]
