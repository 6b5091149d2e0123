"""Language modelling on held-out blocks: loss, and KL to the dense model."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.training.losses import cross_entropy, kl_divergence


@dataclass(frozen=True)
class LanguageFigures:
    """Means over the predicted tokens of the held-out blocks.

    Attributes:
        losses: next-token cross-entropy of each block, nats.
        kls: KL(dense || model) of the next-token distributions of each block, nats; None without a dense model.
        tokens: how many predictions the means are over.
    """

    losses: Float[Tensor, " blocks"]
    kls: Float[Tensor, " blocks"] | None
    tokens: int

    @property
    def loss(self) -> float:
        """Mean next-token cross-entropy, nats."""
        return self.losses.mean().item()

    @property
    def kl(self) -> float | None:
        """Mean KL(dense || model), nats; None without a dense model."""
        return None if self.kls is None else self.kls.mean().item()


def standard_error(values: Float[Tensor, " blocks"]) -> float | None:
    """Of the mean of values that each come from a block of their own; None for fewer than two, which tell of no spread.

    The standard deviation over the blocks, with one degree of freedom less than blocks, by the root of their number. To
    compare two models on the same blocks, give the differences: most of the spread of the losses is the text's.
    """
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def plus_minus(error: float | None) -> str:
    """A standard error as it stands behind a figure; nothing where there is none."""
    return "" if error is None else f" ± {error:.4f}"


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
    losses: list[float] = []
    kls: list[float] = []
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        for cpu_batch in blocks.split(batch_size):
            batch = cpu_batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            after_batch()
            rows = list(zip(logits.split(1), batch.split(1), strict=True))
            losses += [cross_entropy(row, ids, prompt_tokens).item() for row, ids in rows]
            if dense is not None:
                dense_rows = dense(input_ids=batch, use_cache=False).logits.split(1)
                pairs = zip(dense_rows, (row for row, _ in rows), strict=True)
                kls += [kl_divergence(*pair, prompt_tokens).item() for pair in pairs]
    predicted = len(blocks) * (blocks.shape[1] - max(1, prompt_tokens))
    of_blocks = [torch.tensor(figures, dtype=torch.double) for figures in (losses, kls)]
    return LanguageFigures(of_blocks[0], of_blocks[1] if dense is not None else None, predicted)
