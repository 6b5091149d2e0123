"""How fast gates may close: the open fraction follows a target, which moves with the violation.

    target += rate / steps * v                      v the running violation, clipped to one either way
    target  within REACH of the running log f
    share   = (log f - target) / WIDTH, between 0 and 1

log f is minimised with that share of its weight in the Lagrangian, with none while f is at its target or below. Gates
so stop closing as soon as the constraint is violated and close slowly near the bound, while weights make good. Without
it gates run far past the bound while lambda is low, and no lambda brings them back within the run (docs/LOG.md). It is
the integral part of a controller of log f itself, as where L0 pruning ramps to a target. The target stays near f, so
that it does not wind up.
"""

import math

from gossamer.training.multiplier import LARGEST_VIOLATION

REACH = 0.1
"""Largest distance of the target from the running log f."""

WIDTH = 0.05
"""How far log f has to be above its target to be minimised with its full weight."""

DECAY = 0.4
"""Of the running mean of log f, per step: batches differ by some per cent."""

GATE_BETAS = (0.5, 0.9)
"""Of Adam for the gate biases: with a longer memory they go on closing for ten steps after they should have stopped."""


class Pace:
    """The target of log f, and the share of the objective's weight that follows from it.

    Args:
        rate: how far log f may fall over a run that stays one tolerance inside its bound; None for no limit.
        steps: of the whole run.
    """

    def __init__(self, rate: float | None, steps: int) -> None:
        self.rate, self.steps = rate, steps
        self.mean: float | None = None
        self.target: float | None = None

    @property
    def share(self) -> float:
        """Of the objective's weight in the Lagrangian; 1 before the first step."""
        if self.mean is None or self.target is None:
            return 1.0
        return min(max((self.mean - self.target) / WIDTH, 0.0), 1.0)

    def step(self, fraction: float, violation: float) -> None:
        """Take in a step's open fraction and the running violation, in tolerances."""
        if self.rate is None:
            return
        now = math.log(max(fraction, 1e-12))
        self.mean = now if self.mean is None else DECAY * self.mean + (1 - DECAY) * now
        clipped = min(max(violation, -LARGEST_VIOLATION), LARGEST_VIOLATION)
        target = (self.mean if self.target is None else self.target) + self.rate / self.steps * clipped
        self.target = min(max(target, self.mean - REACH), self.mean + REACH)

    def state_dict(self) -> dict[str, float | None]:
        """Everything that :meth:`load_state_dict` needs to go on exactly; JSON keeps it exactly."""
        return {"mean": self.mean, "target": self.target}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on from :meth:`state_dict`."""
        self.mean, self.target = state["mean"], state["target"]
