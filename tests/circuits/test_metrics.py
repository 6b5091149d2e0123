"""Faithfulness, its integrals and circuit sizes on curves known by hand."""

import pytest

from gossamer.circuits.metrics import SHARES, Curve, Point, measure_curve
from gossamer.errors import GossamerError


def test_a_linear_curve() -> None:
    """f(k) = k: CPR and CMD are the areas of the trapezoid from 0.001 to 1 below k and 1 - k."""
    curve = measure_curve(1000, lambda sizes: [2.0 + 3.0 * size / 1000 for size in sizes])
    assert (curve.nothing, curve.everything) == (2.0, 5.0)
    assert [point.size for point in curve.shares] == [round(1000 * share) for share in SHARES]
    assert curve.cpr == pytest.approx((1 - 0.001**2) / 2)
    assert curve.cmd == pytest.approx((1 - 0.001) ** 2 / 2)
    assert curve.first_size == pytest.approx(900, rel=0.02)
    assert curve.first_size >= 900


def test_the_first_crossing_is_found_exactly_where_the_rounds_reach() -> None:
    curve = measure_curve(1000, lambda sizes: [float(size >= 37) for size in sizes], rounds=6)
    assert curve.first_size == curve.lasting_size == 37


def test_a_curve_that_falls_again_has_two_sizes() -> None:
    values = {1: 0.2, 10: 0.95, 100: 0.5, 1000: 1.0}
    points = tuple(Point(size, f, f) for size, f in values.items())
    curve = Curve(1000, 0.0, 1.0, points, points)
    assert (curve.first_size, curve.lasting_size) == (10, 1000)
    expected = (9 * (0.2 + 0.95) + 90 * (0.95 + 0.5) + 900 * 1.5) / 2000
    assert curve.cpr == pytest.approx(expected)
    assert curve.cmd == pytest.approx((9 * (0.8 + 0.05) + 90 * (0.05 + 0.5) + 900 * 0.5) / 2000)


def test_faithfulness_above_one_counts_in_both_integrals() -> None:
    points = (Point(0, 0.0, 2.0), Point(1, 0.0, 2.0))
    curve = Curve(1, 0.0, 1.0, points, points)
    assert (curve.cpr, curve.cmd) == (2.0, 1.0)


def test_few_units_are_measured_once_each() -> None:
    asked: list[int] = []

    def measure(sizes: list[int]) -> list[float]:
        asked.extend(sizes)
        return [float(size) for size in sizes]

    curve = measure_curve(3, measure)
    assert sorted(asked) == sorted(set(asked))
    assert [point.size for point in curve.shares] == [1, 2, 3]
    assert curve.first_size == 3


def test_a_metric_that_never_changes_is_refused() -> None:
    with pytest.raises(GossamerError, match="does not tell the prompts apart"):
        measure_curve(10, lambda sizes: [1.0 for _ in sizes])
