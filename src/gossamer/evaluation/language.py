"""Language modelling on held-out blocks: loss, and KL to the dense model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.training.losses import cross_entropy, kl_divergence


@dataclass(frozen=True)
class LanguageFigures:
    """Means over the predicted tokens of the held-out blocks.

    Attributes:
        loss: next-token cross-entropy, nats.
        kl: KL(dense || model) of the next-token distributions, nats; None without a dense model.
        tokens: how many predictions the means are over.
    """

    loss: float
    kl: float | None
    tokens: int


def measure_language(
    model: PreTrainedModel,
    blocks: Int[Tensor, "blocks tokens"],
    *,
    dense: PreTrainedModel | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    prompt_tokens: int = 0,
    after_batch: Callable[[], None] = lambda: None,
) -> LanguageFigures:
    """Loss of ``model``, with hard gates if it has any, and its KL from ``dense``.

    Args:
        model: in any mode; measured in ``eval()``.
        blocks: token ids.
        dense: what to compare with.
        batch_size: blocks in one forward pass.
        precision: ``bf16`` runs the matrix products under autocast.
        prompt_tokens: tokens at the start of each block that are given, not predicted.
        after_batch: called after each forward pass of ``model``.
    """
    model.eval()
    device = next(model.parameters()).device
    loss = kl = 0.0
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        for cpu_batch in blocks.split(batch_size):
            batch = cpu_batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            after_batch()
            loss += cross_entropy(logits, batch, prompt_tokens).item() * len(batch)
            if dense is not None:
                dense_logits = dense(input_ids=batch, use_cache=False).logits
                kl += kl_divergence(dense_logits, logits, prompt_tokens).item() * len(batch)
    predicted = len(blocks) * (blocks.shape[1] - max(1, prompt_tokens))
    return LanguageFigures(loss / len(blocks), kl / len(blocks) if dense is not None else None, predicted)
