"""The open fraction's target: falls inside the bound, rises outside, stays near f, and resumes from its state."""

import json
import math

import pytest

from gossamer.training.pace import DECAY, REACH, WIDTH, Pace


def test_without_a_rate_the_objective_has_its_full_weight() -> None:
    pace = Pace(None, 10)
    pace.step(0.5, 1.0)
    assert pace.share == 1.0


def test_the_target_moves_with_the_violation_and_no_faster_than_its_rate() -> None:
    pace = Pace(2.0, 100)
    assert pace.share == 1.0
    pace.step(0.5, -0.5)
    assert pace.target == pytest.approx(math.log(0.5) - 0.01)
    assert pace.share == pytest.approx(0.01 / WIDTH)
    pace.step(0.5, -7.0)  # clipped
    assert pace.target == pytest.approx(math.log(0.5) - 0.03)
    pace.step(0.5, 1.0)
    pace.step(0.5, 1.0)
    assert pace.target == pytest.approx(math.log(0.5) + 0.01)
    assert pace.share == 0.0


def test_the_target_stays_within_reach_of_the_open_fraction() -> None:
    pace = Pace(50.0, 100)
    for _ in range(20):
        pace.step(0.5, -1.0)
    assert pace.target == pytest.approx(math.log(0.5) - REACH)
    pace.step(0.25, 1.0)
    mean = DECAY * math.log(0.5) + (1 - DECAY) * math.log(0.25)
    assert pace.target == pytest.approx(mean + REACH)
    pace.step(0.0, 0.0)  # nothing is open
    assert math.isfinite(pace.target)


def test_it_goes_on_exactly() -> None:
    one, other = Pace(5.0, 30), Pace(5.0, 30)
    for step in range(10):
        one.step(0.4 - 0.01 * step, 0.3 - 0.1 * step)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for pace in (one, other):
        pace.step(0.2, -0.4)
    assert one.state_dict() == other.state_dict()
    assert one.share == other.share
