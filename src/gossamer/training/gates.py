"""Initial values of the gate biases, and the shift after training that brings a run inside its bound."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.models.architectures import attention_modules
from gossamer.models.attention import counted_links, forced_open

SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1.0
"""Range of the attention weight above which gates are initially open."""

START_STEPS = 7
"""Number of bisection steps over that range, on a logarithmic scale."""

LARGEST_SHIFT = 8.0
"""Largest shift of the biases in :func:`calibrate`; it opens almost every gate."""

SMALLEST_SHIFT, SHIFT_GROWTH = 0.125, 4.0
"""The first shift tried, and the factor between successive ones."""

CALIBRATION_STEPS = 4
"""Number of bisection steps over the range that contains the smallest shift."""


def gate_biases(model: nn.Module) -> list[nn.Parameter]:
    """The gate biases of a gated model, ``[heads]`` each, by layer."""
    return [module.gate_bias for module in attention_modules(model)]  # type: ignore[misc]


@torch.no_grad()
def mean_log_sum_exp(model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "layers heads"]:
    """Mean over all queries of the log of the softmax denominator, with every gate open."""
    with forced_open(model), counted_links(model) as counts:
        model(input_ids=input_ids, use_cache=False)
    return torch.stack([counts[layer].log_sum_exp.float().mean((0, 2)) for layer in sorted(counts)])


@torch.no_grad()
def open_above(model: PreTrainedModel, weight: float, log_sum_exp: Float[Tensor, "layers heads"]) -> None:
    """Set the biases so that gates are open where attention weights exceed ``weight``.

    log P = S - log_sum_exp, so with b = -log(weight) - log_sum_exp the gate logit S + b is positive exactly where
    P > weight. A head has one bias, so the mean over its queries is used for log_sum_exp.
    """
    for bias, own in zip(gate_biases(model), log_sum_exp, strict=True):
        bias.copy_(-math.log(weight) - own)


def open_to(model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"], violation: Callable[[], float]) -> float:
    """Open as few gates as keep the violation at or below 0, with one attention weight as the threshold for all.

    Args:
        model: a gated model, in ``eval()`` mode.
        input_ids: text on which the softmax denominators are measured.
        violation: measures the model with its current biases.

    Returns:
        The threshold: the largest one in the range that does so, or the smallest if none does.
    """
    log_sum_exp = mean_log_sum_exp(model, input_ids)
    low, high = math.log(SMALLEST_WEIGHT), math.log(LARGEST_WEIGHT)
    for _ in range(START_STEPS):
        middle = (low + high) / 2
        open_above(model, math.exp(middle), log_sum_exp)
        low, high = (middle, high) if violation() <= 0 else (low, middle)
    open_above(model, math.exp(low), log_sum_exp)
    return math.exp(low)


@contextmanager
def shifted(model: PreTrainedModel, shift: float) -> Iterator[None]:
    """Context manager that adds ``shift`` to every gate bias."""
    before = [bias.detach().clone() for bias in gate_biases(model)]
    with torch.no_grad():
        for bias in gate_biases(model):
            bias.add_(shift)
    try:
        yield
    finally:
        with torch.no_grad():
            for bias, own in zip(gate_biases(model), before, strict=True):
                bias.copy_(own)


@dataclass(frozen=True)
class Calibration:
    """Result of :func:`calibrate`.

    Attributes:
        shift: what was added to every gate bias; 0 if nothing was needed, None if no shift helps and none was applied.
        violation: the violation before the shift.
    """

    shift: float | None
    violation: float


def calibrate(model: PreTrainedModel, violation: Callable[[], float]) -> Calibration:
    """Shift all gate biases by the smallest common amount that brings the violation to 0 or below, by bisection.

    The violation need not fall monotonically as gates open, so the returned shift is always one that was measured.

    Args:
        model: a gated model, in ``eval()`` mode.
        violation: measures the model with hard gates and its current biases.
    """
    before = violation()
    if before <= 0:
        return Calibration(0.0, before)

    def holds(shift: float) -> bool:
        with shifted(model, shift):
            return violation() <= 0

    low, high = 0.0, SMALLEST_SHIFT
    while not holds(high):
        low, high = high, SHIFT_GROWTH * high
        if high > LARGEST_SHIFT:
            return Calibration(None, before)
    for _ in range(CALIBRATION_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    with torch.no_grad():
        for bias in gate_biases(model):
            bias.add_(high)
    return Calibration(high, before)
