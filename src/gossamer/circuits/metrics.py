"""How well a circuit explains a behaviour.

    faithfulness  f(C) = (m(C) - m(nothing)) / (m(everything) - m(nothing)),  m the mean metric on the clean prompts
    CPR           integral of f over the kept share k, higher is better
    CMD           integral of |1 - f|, 0 is best  (Mueller et al. 2025, arXiv 2504.13151)
    size at 90 %  the smallest circuit with f >= 0.9: the first in order of size, and the first after which none falls
                  below any more

The integrals are trapezoids on a linear axis over the shares at which f was measured, from the smallest of them on.
"""

from collections.abc import Callable
from dataclasses import dataclass

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of the units kept, those of the MIB benchmark."""

EXPLAINED = 0.9
"""Faithfulness at which the size of a circuit is reported."""


@dataclass(frozen=True)
class Point:
    """``size`` units of ``total`` kept give the mean metric ``metric`` and the faithfulness ``faithfulness``."""

    size: int
    metric: float
    faithfulness: float


@dataclass(frozen=True)
class Curve:
    """Faithfulness by size, in ascending order of size.

    Attributes:
        total: how many units there are.
        nothing, everything: mean metric with no unit and with all units kept.
        shares: the points at :data:`SHARES`; the others only narrow down the size at 90 %.
    """

    total: int
    nothing: float
    everything: float
    shares: tuple[Point, ...]
    points: tuple[Point, ...]

    @property
    def cpr(self) -> float:
        """Integral of f."""
        return self._integral(lambda f: f)

    @property
    def cmd(self) -> float:
        """Integral of \\|1 - f\\|."""
        return self._integral(lambda f: abs(1 - f))

    def _integral(self, function: Callable[[float], float]) -> float:
        pairs = zip(self.shares, self.shares[1:], strict=False)
        return sum(
            (b.size - a.size) / self.total * (function(a.faithfulness) + function(b.faithfulness)) / 2 for a, b in pairs
        )

    @property
    def first_size(self) -> int | None:
        """The smallest measured size with f >= 0.9."""
        return next((point.size for point in self.points if point.faithfulness >= EXPLAINED), None)

    @property
    def lasting_size(self) -> int | None:
        """The smallest measured size from which on f >= 0.9 for good."""
        size = None
        for point in reversed(self.points):
            if point.faithfulness < EXPLAINED:
                break
            size = point.size
        return size


def measure_curve(total: int, measure: Callable[[int], float], *, refine: int = 6) -> Curve:
    """Faithfulness at :data:`SHARES`, and between the two around the first crossing of 90 % by bisection.

    Args:
        total: how many units there are.
        measure: mean metric when the best ``size`` units are kept.
        refine: halvings, on a logarithmic axis, of the interval that holds the first crossing.

    Raises:
        ZeroDivisionError: if nothing and everything measure the same.
    """
    nothing, everything = measure(0), measure(total)
    found: dict[int, Point] = {}

    def point(size: int) -> Point:
        if size not in found:
            metric = everything if size == total else measure(size)
            found[size] = Point(size, metric, (metric - nothing) / (everything - nothing))
        return found[size]

    shares = tuple(point(size) for size in sorted({max(1, round(share * total)) for share in SHARES}))
    high = next((p.size for p in shares if p.faithfulness >= EXPLAINED), total)
    low = max((p.size for p in shares if p.size < high), default=0)
    for _ in range(refine):
        middle = max(low + 1, round((max(low, 1) * high) ** 0.5))
        if middle >= high:
            break
        low, high = (low, middle) if point(middle).faithfulness >= EXPLAINED else (middle, high)
    points = tuple(found[size] for size in sorted(found))
    return Curve(total, nothing, everything, shares, points)
