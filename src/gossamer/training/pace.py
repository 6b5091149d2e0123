"""Limit how fast gates close: the open fraction follows a target that moves with the violation.

    target += rate / steps * v                      v the running violation, clipped to [-1, 1]
    target  within REACH of the running log f
    share   = (log f - target) / WIDTH, between 0 and 1

log f enters the Lagrangian with that share of its weight, and not at all while f is at or below its target. So gates
stop closing as soon as the constraint is violated, and close slowly near the bound while the weights adapt. Without a
limit, gates overshoot the bound while lambda is low, and no lambda brings them back within the run (docs/LOG.md). This
is integral control of log f itself, similar to L0 pruning that ramps to a target. The target stays close to f, which
prevents wind-up.
"""

import math

from gossamer.training.multiplier import LARGEST_VIOLATION

REACH = 0.1
"""Largest distance of the target from the running log f."""

WIDTH = 0.05
"""Distance of log f above its target at which it gets its full weight."""

DECAY = 0.4
"""Decay of the running mean of log f per step; batches differ by a few per cent."""

GATE_BETAS = (0.5, 0.9)
"""Adam's betas for the gate biases; with a longer memory, gates keep closing for ten steps after they should stop."""


class Pace:
    """The target of log f, and the resulting share of the objective's weight.

    Args:
        rate: how far log f may fall over a run that stays one tolerance inside its bound; None for no limit.
        steps: number of steps of the whole run.
    """

    def __init__(self, rate: float | None, steps: int) -> None:
        self.rate, self.steps = rate, steps
        self.mean: float | None = None
        self.target: float | None = None

    @property
    def share(self) -> float:
        """Share of the objective's weight in the Lagrangian; 1 before the first step."""
        if self.mean is None or self.target is None:
            return 1.0
        return min(max((self.mean - self.target) / WIDTH, 0.0), 1.0)

    def step(self, fraction: float, violation: float) -> None:
        """Update with a step's open fraction and the running violation, in tolerances."""
        if self.rate is None:
            return
        now = math.log(max(fraction, 1e-12))
        self.mean = now if self.mean is None else DECAY * self.mean + (1 - DECAY) * now
        clipped = min(max(violation, -LARGEST_VIOLATION), LARGEST_VIOLATION)
        target = (self.mean if self.target is None else self.target) + self.rate / self.steps * clipped
        self.target = min(max(target, self.mean - REACH), self.mean + REACH)

    def state_dict(self) -> dict[str, float | None]:
        """The complete state, for :meth:`load_state_dict`; JSON represents it exactly."""
        return {"mean": self.mean, "target": self.target}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.mean, self.target = state["mean"], state["target"]
