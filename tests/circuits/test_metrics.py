"""Faithfulness, its integrals and circuit sizes on curves with known values."""

import pytest

from gossamer.circuits.metrics import SHARES, Curve, Point, measure_curve
from gossamer.errors import GossamerError


def test_a_linear_curve() -> None:
    """f(k) = k: CPR and CMD are the areas below k and 1 - k from 0.001 to 1."""
    curve = measure_curve(1000, lambda sizes: [2.0 + 3.0 * size / 1000 for size in sizes])
    assert (curve.nothing, curve.everything) == (2.0, 5.0)
    assert [point.size for point in curve.shares] == [int(share * 1000) for share in SHARES]
    assert curve.cpr == pytest.approx((1 - 0.001**2) / 2)
    assert curve.cmd == pytest.approx((1 - 0.001) ** 2 / 2)
    assert curve.first_size == pytest.approx(900, rel=0.02)
    assert curve.first_size >= 900


@pytest.mark.parametrize("total", [7, 157, 1999, 32491])
def test_sizes_and_integrals_are_those_of_the_mib_benchmark(total: int) -> None:
    """MIB keeps int(p N) units but integrates over the nominal p, although the kept share is smaller."""

    def metric(size: int) -> float:
        return 1.5 * (size / total) ** 0.3 - 0.2 * (size > total / 3)

    curve = measure_curve(total, lambda sizes: list(map(metric, sizes)))
    shares = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    f = [metric(int(p * total)) / metric(total) for p in shares]
    cpr = sum((shares[i + 1] - shares[i]) * (f[i] + f[i + 1]) / 2 for i in range(9))
    cmd = sum((shares[i + 1] - shares[i]) * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2 for i in range(9))
    assert [point.size for point in curve.shares] == [int(p * total) for p in shares]
    assert [point.faithfulness for point in curve.shares] == pytest.approx(f)
    assert (curve.cpr, curve.cmd) == (pytest.approx(cpr, rel=1e-12), pytest.approx(cmd, rel=1e-12))


def test_the_first_crossing_is_found_exactly_where_the_rounds_reach() -> None:
    curve = measure_curve(1000, lambda sizes: [float(size >= 37) for size in sizes], rounds=6)
    assert curve.first_size == curve.lasting_size == 37


def test_a_curve_that_falls_again_has_two_sizes() -> None:
    values = {1: 0.2, 10: 0.95, 100: 0.5, 1000: 1.0}
    points = tuple(Point(size, f, f) for size, f in values.items())
    curve = Curve(1000, 0.0, 1.0, points, points)
    assert (curve.first_size, curve.lasting_size) == (10, 1000)


def test_faithfulness_above_one_counts_in_both_integrals() -> None:
    points = tuple(Point(int(1000 * share), 0.0, 2.0) for share in SHARES)
    curve = Curve(1000, 0.0, 1.0, points, points)
    assert (curve.cpr, curve.cmd) == (pytest.approx(2 * 0.999), pytest.approx(0.999))


def test_few_units_are_measured_once_each() -> None:
    asked: list[int] = []

    def measure(sizes: list[int]) -> list[float]:
        asked.extend(sizes)
        return [float(size) for size in sizes]

    curve = measure_curve(3, measure)
    assert sorted(asked) == sorted(set(asked))
    assert [point.size for point in curve.shares] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 3]
    assert [point.size for point in curve.points] == [1, 2, 3]
    assert curve.first_size == 3


def test_a_metric_that_never_changes_is_refused() -> None:
    with pytest.raises(GossamerError, match="does not tell the prompts apart"):
        measure_curve(10, lambda sizes: [1.0 for _ in sizes])
