"""The gate biases before training and after it: where they start, and the shift that brings a run inside its bound."""

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
"""Between these attention weights lies the one above which gates are open at the start."""

START_STEPS = 7
"""Halvings of that range, on a logarithmic scale."""

LARGEST_SHIFT = 8.0
"""Of the biases, in :func:`calibrate`: almost every gate is open then."""

SMALLEST_SHIFT, SHIFT_GROWTH = 0.125, 4.0
"""The first shift that is tried, and the factor to the next."""

CALIBRATION_STEPS = 4
"""Halvings of the range in which the smallest shift lies."""


def gate_biases(model: nn.Module) -> list[nn.Parameter]:
    """The gate biases of a gated model, ``[heads]`` each, by layer."""
    return [module.gate_bias for module in attention_modules(model)]  # type: ignore[misc]


@torch.no_grad()
def mean_log_sum_exp(model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "layers heads"]:
    """The mean over all queries of the log of attention's denominator, of the model with every gate open."""
    with forced_open(model), counted_links(model) as counts:
        model(input_ids=input_ids, use_cache=False)
    return torch.stack([counts[layer].log_sum_exp.float().mean((0, 2)) for layer in sorted(counts)])


@torch.no_grad()
def open_above(model: PreTrainedModel, weight: float, log_sum_exp: Float[Tensor, "layers heads"]) -> None:
    """Set the biases so that gates are open where attention weights exceed ``weight``.

    log P = S - log_sum_exp, so with b = -log(weight) - log_sum_exp the gate logit S + b is positive exactly where
    P > weight; a head has one bias, so the mean of its queries' log_sum_exp stands for each.
    """
    for bias, own in zip(gate_biases(model), log_sum_exp, strict=True):
        bias.copy_(-math.log(weight) - own)


def open_to(model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"], violation: Callable[[], float]) -> float:
    """Open the gates, all at one attention weight, as few as keep the violation at or below 0.

    Args:
        model: a gated model, in ``eval()`` mode.
        input_ids: text on which the heads' denominators are measured.
        violation: measures the model with the biases it has.

    Returns:
        The attention weight: the largest in the range that does, or the smallest if none does.
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
    """Within it, every gate bias is larger by ``shift``."""
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
    """What :func:`calibrate` found.

    Attributes:
        shift: was added to every gate bias; 0 if none was needed, None if none helps (nothing was changed then).
        violation: before it.
    """

    shift: float | None
    violation: float


def calibrate(model: PreTrainedModel, violation: Callable[[], float]) -> Calibration:
    """Shift all gate biases by the smallest common amount that brings the violation to 0 or below, by bisection.

    The violation need not fall all the way as gates open, so the shift that is kept is one that was measured.

    Args:
        model: a gated model, in ``eval()`` mode.
        violation: measures the model, hard gates, with the biases it has.
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
