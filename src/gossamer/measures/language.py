"""Language modelling on blocks: loss, KL to the dense model, and the open links."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.measures.links import LinkCounter
from gossamer.measures.losses import cross_entropy, kl_divergence
from gossamer.models.attention import LinkCounts, counted_links
from gossamer.models.convert import is_gated

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class LanguageMetrics:
    """Means over the predicted tokens of the held-out blocks.

    Attributes:
        losses: next-token cross-entropy of each block, nats.
        kls: KL(dense || model) of the next-token distributions of each block, nats; None without a dense model.
        tokens: number of predictions that the means are over.
        links: open and allowed links; all zero for a model without gates.
    """

    losses: Float[Tensor, " blocks"]
    kls: Float[Tensor, " blocks"] | None
    tokens: int
    links: LinkCounter

    @property
    def loss(self) -> float:
        """Mean next-token cross-entropy, nats."""
        return self.losses.mean().item()

    @property
    def kl(self) -> float | None:
        """Mean KL(dense || model), nats; None without a dense model."""
        return None if self.kls is None else self.kls.mean().item()


def standard_error(values: Float[Tensor, " blocks"]) -> float | None:
    """Standard error of the mean of per-block values; None for fewer than two values.

    The sample standard deviation (n - 1 degrees of freedom) divided by sqrt(n). To compare two models on the same
    blocks, pass the differences: most of the spread of the losses comes from the text.
    """
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def standard_error_of_sums(total: float, squares: float, count: int) -> float | None:
    """:func:`standard_error` of ``count`` values, from their sum and the sum of their squares."""
    if count < 2:
        return None
    variance = max(0.0, squares - total**2 / count) / (count - 1)
    return math.sqrt(variance / count)


def plus_minus(error: float | None) -> str:
    """Format a standard error for printing after a value; an empty string if there is none."""
    return "" if error is None else f" ± {error:.4f}"


def forward_passes(
    model: PreTrainedModel,
    batches: Iterable[Int[Tensor, "batch tokens"]],
    measure: Callable[[Float[Tensor, "batch tokens vocab"], Int[Tensor, "batch tokens"]], Measured],
) -> list[tuple[Measured, LinkCounter]]:
    """Run the model on each batch and return, per batch, the result of ``measure`` and the link counts.

    The model runs without gradients, with hard gates if it has any. It is put into ``eval()`` mode and left there.

    Args:
        model: dense or gated; for a dense model no links are counted.
        batches: token ids, on any device.
        measure: called after each forward pass with the logits and the token ids, both on the model's device.
    """
    model.eval()
    device = next(model.parameters()).device
    shape = model.config.num_hidden_layers, model.config.num_attention_heads
    found = []
    with torch.no_grad():
        for batch in batches:
            ids, tally = batch.to(device), LinkCounter.empty(*shape)
            counting: AbstractContextManager[dict[int, LinkCounts]] = nullcontext({})
            if is_gated(model):
                counting = counted_links(model)
            with counting as counts:
                logits = model(input_ids=ids, use_cache=False).logits
            tally.add(counts, ids.numel())
            found.append((measure(logits, ids), tally))
    return found


def measure_language(
    model: PreTrainedModel,
    blocks: Int[Tensor, "blocks tokens"],
    *,
    dense: PreTrainedModel | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    prompt_tokens: int = 0,
) -> LanguageMetrics:
    """Measure loss and open links of ``model``, with hard gates if it has any, and its KL from ``dense``.

    Args:
        model: in any mode; it is put into ``eval()`` and left there.
        blocks: token ids.
        dense: the model to compare with; no KL if None.
        batch_size: blocks in one forward pass.
        precision: ``bf16`` runs the matrix products under autocast.
        prompt_tokens: tokens at the start of each block that are given, not predicted.
    """

    if dense is not None:
        beside = measure_beside_dense(
            model, dense, blocks, batch_size=batch_size, precision=precision, prompt_tokens=prompt_tokens
        )
        return beside[0]

    def measure(logits: Tensor, batch: Tensor) -> list[float]:
        return _losses(logits, batch, prompt_tokens)

    with _precision(model, precision):
        found = forward_passes(model, blocks.split(batch_size), measure)
    losses = torch.tensor([loss for measured, _ in found for loss in measured], dtype=torch.double)
    links = LinkCounter.total([tally for _, tally in found])
    return LanguageMetrics(losses, None, _predicted(blocks, prompt_tokens), links)


def measure_beside_dense(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    blocks: Int[Tensor, "blocks tokens"],
    *,
    batch_size: int = 8,
    precision: str = "fp32",
    prompt_tokens: int = 0,
) -> tuple[LanguageMetrics, LanguageMetrics]:
    """:func:`measure_language` of ``model`` (with KL) and of ``dense``, with one forward pass of each per batch."""

    def measure(logits: Tensor, batch: Tensor) -> list[tuple[float, float, float]]:
        dense_logits = dense(input_ids=batch, use_cache=False).logits
        pairs = zip(dense_logits.split(1), logits.split(1), strict=True)
        kls = [kl_divergence(*pair, prompt_tokens).item() for pair in pairs]
        losses = (_losses(each, batch, prompt_tokens) for each in (logits, dense_logits))
        return list(zip(*losses, kls, strict=True))

    dense.eval()
    with _precision(model, precision):
        found = forward_passes(model, blocks.split(batch_size), measure)
    rows = torch.tensor([row for measured, _ in found for row in measured], dtype=torch.double)
    losses, dense_losses, kls = rows.unbind(-1)
    predicted = _predicted(blocks, prompt_tokens)
    links = LinkCounter.total([tally for _, tally in found])
    none_open = LinkCounter.empty(dense.config.num_hidden_layers, dense.config.num_attention_heads)
    return LanguageMetrics(losses, kls, predicted, links), LanguageMetrics(dense_losses, None, predicted, none_open)


def _losses(logits: Tensor, batch: Tensor, prompt_tokens: int) -> list[float]:
    rows = zip(logits.split(1), batch.split(1), strict=True)
    return [cross_entropy(row, ids, prompt_tokens).item() for row, ids in rows]


def _precision(model: PreTrainedModel, precision: str) -> torch.autocast:
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _predicted(blocks: Tensor, prompt_tokens: int) -> int:
    return int(len(blocks) * (blocks.shape[1] - max(1, prompt_tokens)))
