"""The multiplier and the Lagrangian against an optimum known by hand."""

import json
import math

import pytest
import torch

from gossamer.training.multiplier import Multiplier, MultiplierConfig, ObjectiveKind, lagrangian


def test_multiplier_rises_above_the_bound_and_falls_below() -> None:
    multiplier = Multiplier(MultiplierConfig(initial=1.0, rate=0.5, decay=0.0, largest_violation=0.1))
    multiplier.dual_step(0.04)
    assert multiplier.value == pytest.approx(math.exp(0.02))
    multiplier.dual_step(-3.0)
    assert multiplier.value == pytest.approx(math.exp(0.02 - 0.05))


def test_the_proportional_part_answers_at_once_and_leaves_nothing_behind() -> None:
    multiplier = Multiplier(MultiplierConfig(initial=1.0, rate=0.5, proportional=10.0, decay=0.0))
    multiplier.dual_step(0.04)
    assert multiplier.value == pytest.approx(math.exp(0.02 + 0.4))
    multiplier.dual_step(3.0)  # clipped to 0.1
    assert multiplier.value == pytest.approx(math.exp(0.07 + 1.0))
    multiplier.dual_step(0.0)
    assert multiplier.value == pytest.approx(math.exp(0.07))


def time_outside(proportional: float) -> int:
    """Steps of the problem below that end more than 0.05 outside the bound."""
    x, outside = torch.tensor(4.0, requires_grad=True), 0
    multiplier = Multiplier(MultiplierConfig(initial=0.01, rate=0.5, proportional=proportional))
    optimizer = torch.optim.SGD([x], lr=0.05)
    for _ in range(2000):
        violation = (x - 2) ** 2 - 0.25
        optimizer.zero_grad()
        lagrangian(x, violation, multiplier.value).backward()
        optimizer.step()
        multiplier.dual_step(violation.item())
        outside += abs(violation.item()) > 0.05
    return outside


def test_the_proportional_part_damps_the_swing_about_the_bound() -> None:
    assert time_outside(5.0) < 0.7 * time_outside(0.0)


def test_multiplier_stays_within_its_limits() -> None:
    multiplier = Multiplier(MultiplierConfig(rate=100.0, decay=0.0))
    for _ in range(10):
        multiplier.dual_step(1.0)
    assert multiplier.value == pytest.approx(1e4)
    for _ in range(10):
        multiplier.dual_step(-1.0)
    assert multiplier.value == pytest.approx(1e-4)


def test_multiplier_goes_on_exactly_from_its_state() -> None:
    first = Multiplier(MultiplierConfig())
    for violation in (0.3, -0.123456789, 0.01):
        first.dual_step(violation)
    second = Multiplier(MultiplierConfig())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    first.dual_step(0.1)
    second.dual_step(0.1)
    assert first.log_value == second.log_value
    assert first.mean_violation == second.mean_violation


@pytest.mark.parametrize(("objective", "multiplier_there"), [("fraction", 1.0), ("log", 2 / 3)])
def test_constrained_descent_finds_the_known_optimum(objective: ObjectiveKind, multiplier_there: float) -> None:
    """minimise x, or log x, subject to (x - 2)^2 <= 1/4: x = 3/2, and there lambda = 1 / (2 * 1/2) = 1, or 2/3."""
    x = torch.tensor(4.0, requires_grad=True)
    multiplier = Multiplier(MultiplierConfig(initial=0.01, rate=0.05, decay=0.5))
    optimizer = torch.optim.SGD([x], lr=0.05)
    for _ in range(8000):
        violation = (x - 2) ** 2 - 0.25
        optimizer.zero_grad()
        lagrangian(x, violation, multiplier.value, objective).backward()
        optimizer.step()
        multiplier.dual_step(violation.item())
    assert x.item() == pytest.approx(1.5, abs=0.02)
    assert multiplier.value == pytest.approx(multiplier_there, rel=0.1)


def test_the_log_of_nothing_open_is_finite() -> None:
    nothing = torch.tensor(0.0, requires_grad=True)
    value = lagrangian(nothing, torch.tensor(1.0), 7.0, "log")
    value.backward()
    assert math.isfinite(value.item())
    assert nothing.grad == 0
