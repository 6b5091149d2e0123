"""How well a circuit explains a behaviour.

    faithfulness  f(C) = (m(C) - m(nothing)) / (m(everything) - m(nothing)),  m the mean metric on the clean prompts
    CPR           integral of f over the kept share p, higher is better
    CMD           integral of |1 - f|, 0 is best  (Mueller et al. 2025, arXiv 2504.13151)
    size at 90 %  the smallest circuit with f >= 0.9: the first in order of size, and the first from which on no larger
                  circuit falls below

The integrals follow the MIB benchmark: int(p N) of N units are kept, and the trapezoidal rule is applied on a linear
axis over p, starting at the smallest share. With few units, a small share can round down to no unit, where f is 0.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from gossamer.errors import GossamerError

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of units kept, as in the MIB benchmark."""

EXPLAINED = 0.9
"""Faithfulness at which the size of a circuit is reported."""


@dataclass(frozen=True)
class Point:
    """Mean metric and faithfulness when ``size`` units are kept."""

    size: int
    metric: float
    faithfulness: float


@dataclass(frozen=True)
class Curve:
    """Faithfulness by size, in ascending order of size.

    Attributes:
        total: number of units.
        nothing, everything: mean metric with no unit and with all units kept.
        shares: a point for each of :data:`SHARES`.
        points: each measured size once, except the empty circuit; some only narrow down the size at 90 %.
    """

    total: int
    nothing: float
    everything: float
    shares: tuple[Point, ...]
    points: tuple[Point, ...]

    @property
    def cpr(self) -> float:
        """Integral of f over the kept share."""
        return self._integral(lambda f: f)

    @property
    def cmd(self) -> float:
        """Integral of \\|1 - f\\|."""
        return self._integral(lambda f: abs(1 - f))

    def _integral(self, function: Callable[[float], float]) -> float:
        values = [function(point.faithfulness) for point in self.shares]
        return sum((q - p) * (a + b) / 2 for (p, q), (a, b) in zip(pairwise(SHARES), pairwise(values), strict=True))

    @property
    def first_size(self) -> int | None:
        """The smallest measured size with f >= 0.9."""
        return next((point.size for point in self.points if point.faithfulness >= EXPLAINED), None)

    @property
    def lasting_size(self) -> int | None:
        """The smallest measured size such that f >= 0.9 at it and at all larger measured sizes."""
        size = None
        for point in reversed(self.points):
            if point.faithfulness < EXPLAINED:
                break
            size = point.size
        return size


def measure_curve(total: int, measure: Callable[[list[int]], list[float]], *, rounds: int = 3) -> Curve:
    """Measure faithfulness at :data:`SHARES`, then refine around the first crossing of 90 %.

    Args:
        total: number of units.
        measure: returns, for several sizes at once, the mean metric when that many of the best units are kept.
        rounds: how often the interval with the first crossing is split into four, on a logarithmic axis.

    Raises:
        GossamerError: if the metric is the same with everything and with nothing kept.
    """
    metrics: dict[int, float] = {}

    def add(sizes: Iterable[int]) -> None:
        new = sorted(set(sizes) - metrics.keys())
        metrics.update(zip(new, measure(new) if new else [], strict=True))

    shares = [int(share * total) for share in SHARES]
    add([0, *shares])
    nothing, everything = metrics[0], metrics[total]

    def point(size: int) -> Point:
        return Point(size, metrics[size], (metrics[size] - nothing) / (everything - nothing))

    if everything == nothing:
        raise GossamerError("patching everything changes nothing: the metric does not tell the prompts apart")
    for _ in range(rounds):
        high = next(size for size in sorted(metrics) if point(size).faithfulness >= EXPLAINED)
        low = max(size for size in metrics if size < high)
        between = (round(max(low, 1) * (high / max(low, 1)) ** (part / 4)) for part in (1, 2, 3))
        add(size for size in between if low < size < high)
    return Curve(
        total, nothing, everything, tuple(map(point, shares)), tuple(point(size) for size in sorted(metrics) if size)
    )
