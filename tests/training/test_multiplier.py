"""The multiplier and the Lagrangian, on a problem with a known optimum."""

import json
import math

import pytest
import torch

from gossamer.training.multiplier import Multiplier, MultiplierConfig, RunningViolation, lagrangian


def test_the_proportional_part_answers_at_once_and_leaves_nothing_behind() -> None:
    multiplier = Multiplier(MultiplierConfig(initial=2.0, proportional=3.0, integral=0.0), 1)
    multiplier.dual_step(0.25)
    assert multiplier.value == pytest.approx(2 * math.exp(0.75))
    multiplier.dual_step(40.0)  # clipped to 1
    assert multiplier.value == pytest.approx(2 * math.exp(3.0))
    multiplier.dual_step(0.0)
    assert multiplier.value == pytest.approx(2.0)


def test_the_integral_part_adds_up_over_a_share_of_the_run() -> None:
    multiplier = Multiplier(MultiplierConfig(initial=1.0, proportional=0.0, integral=10.0), steps=100)
    multiplier.dual_step(0.2)
    multiplier.dual_step(-0.1)
    assert multiplier.value == pytest.approx(math.exp(0.01))
    multiplier.dual_step(7.0)  # counts as 1
    assert multiplier.value == pytest.approx(math.exp(0.11))
    multiplier.dual_step(-0.5)
    assert multiplier.value == pytest.approx(math.exp(0.06))
    multiplier.dual_step(-7.0)  # counts as -1, but the value does not fall below its start
    assert multiplier.value == pytest.approx(1.0)


def steps_outside(proportional: float) -> int:
    """Count the steps of the problem below that end more than 0.05 from the bound."""
    x, outside = torch.tensor(4.0, requires_grad=True), 0
    multiplier = Multiplier(MultiplierConfig(initial=0.1, proportional=proportional, integral=400.0), 2000)
    optimizer = torch.optim.SGD([x], lr=0.05)
    for _ in range(2000):
        constrained = (x - 2) ** 2
        optimizer.zero_grad()
        lagrangian(x.log(), constrained, multiplier.value, unit=0.25).backward()
        optimizer.step()
        multiplier.dual_step((constrained.item() - 0.25) / 0.25)
        outside += abs(constrained.item() - 0.25) > 0.05
    return outside


def test_the_proportional_part_damps_the_swing_about_the_bound() -> None:
    assert steps_outside(2.5) < 0.7 * steps_outside(0.0)


def test_constrained_descent_finds_the_known_optimum() -> None:
    """Minimise log x subject to (x - 2)^2 <= 1/4: x = 3/2 and lambda / unit = 1 / (x * 2 * (2 - x)) = 2/3."""
    x = torch.tensor(4.0, requires_grad=True)
    multiplier = Multiplier(MultiplierConfig(initial=0.05, integral=200.0), 4000)
    optimizer = torch.optim.SGD([x], lr=0.05)
    for _ in range(4000):
        constrained = (x - 2) ** 2
        optimizer.zero_grad()
        lagrangian(x.log(), constrained, multiplier.value, unit=0.25).backward()
        optimizer.step()
        multiplier.dual_step((constrained.item() - 0.25) / 0.25)
    assert x.item() == pytest.approx(1.5, abs=0.01)
    assert multiplier.value / 0.25 == pytest.approx(2 / 3, rel=0.05)


def test_the_scale_of_the_bound_changes_nothing() -> None:
    """With constrained quantity, bound and unit ten times as large, the path is the same."""
    paths = []
    for scale in (1.0, 10.0):
        x, path = torch.tensor(4.0, dtype=torch.float64, requires_grad=True), []
        multiplier = Multiplier(MultiplierConfig(), 50)
        for _ in range(50):
            constrained = scale * (x - 2) ** 2
            (gradient,) = torch.autograd.grad(lagrangian(x.log(), constrained, multiplier.value, scale * 0.25), x)
            with torch.no_grad():
                x -= 0.05 * gradient
            multiplier.dual_step((constrained.item() - scale * 0.25) / (scale * 0.25))
            path.append(x.item())
        paths.append(path)
    assert paths[0] == pytest.approx(paths[1], rel=1e-12)


def test_validation_says_how_far_the_batches_are_off() -> None:
    running = RunningViolation(decay=0.0)
    assert running.value is None
    running.add_batch(0.1)
    assert running.value == pytest.approx(0.1)
    running.add_validation(0.4)
    assert running.value == pytest.approx(0.4)
    running.add_batch(-0.2)  # the batches fell by 0.3, and validation with them
    assert running.value == pytest.approx(0.1)
    running.add_validation(0.2)  # the offset is now 0.4, before 0.3; their mean is used
    assert running.value == pytest.approx(0.15)
    running.add_validation(0.7, alone=True)
    assert running.value == pytest.approx(0.7)


def test_the_running_violation_is_a_running_mean() -> None:
    running = RunningViolation(decay=0.75)
    for violation in (1.0, 0.0, 0.0):
        running.add_batch(violation)
    assert running.value == pytest.approx(0.75**2)


def test_both_go_on_exactly_from_their_state() -> None:
    first = Multiplier(MultiplierConfig(), 50), RunningViolation(0.8)
    for violation in (0.3, -0.123456789, 0.01):
        first[0].dual_step(violation)
        first[1].add_batch(violation)
        first[1].add_validation(2 * violation)
    second = Multiplier(MultiplierConfig(), 50), RunningViolation(0.8)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    for multiplier, running in (first, second):
        running.add_batch(0.1)
        multiplier.dual_step(running.value)
    assert first[0].state_dict() == second[0].state_dict()
    assert first[1].state_dict() == second[1].state_dict()
