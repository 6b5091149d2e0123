"""The Lagrange multiplier of the constraint, updated by a PI controller on the running violation.

    minimise   log f   subject to   c <= bound
    primal     (log f + lambda * c / unit) / (1 + lambda)
    dual       log lambda = I + proportional * v,   I += integral / steps * v

with f the open fraction (:mod:`gossamer.training.objective`), c what the constraint measures, ``unit`` the
constraint's own scale (epsilon, or a tenth of a nat of cross-entropy) and v the running violation (c - bound) /
tolerance, clipped to [-1, 1]; the tolerance is the unit, or the bound if that is smaller. lambda says how many per cent
of the links one per cent of the unit is worth. At the end of training it is near 1, whatever the bound (docs/LOG.md),
so users do not have to tune it. It starts lower, since weights can compensate for links that closed early.

The proportional part responds to the current violation only; I finds the lambda that the run needs over part of its
steps. Both gains are small: single steps are noisy, and closing gates that a high lambda opens again wastes steps. I
does not fall below its start, because what it lost while the run is inside the bound would be missing when the gates
have used up that room. The dual step is multiplicative as in GECO (Rezende & Viola 2018, arXiv 1810.00597), the
controller that of Sohrabi et al. 2024 (arXiv 2406.04558), and dividing by 1 + lambda keeps the size of the gradient
steady.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gossamer.fields import documented, setting

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LARGEST_VIOLATION = 1.0
"""Violations are clipped to this absolute value."""


@documented
@dataclass(frozen=True)
class MultiplierConfig:
    """Settings of the multiplier."""

    initial: float = setting(
        "lambda before the first step, and the lower limit of its integral part.", 0.3, least=1e-4, most=1e4
    )
    proportional: float = setting(
        "How far log lambda moves at once for a violation of one tolerance (epsilon, or 0.1 nats for ce).",
        0.5,
        least=0.0,
        most=1e3,
    )
    integral: float = setting(
        "How far log lambda moves over a whole run that stays one tolerance outside the bound.",
        6.0,
        least=0.0,
        most=1e3,
    )
    decay: float = setting("Decay per step of the running means of what the batches measure.", 0.8, least=0.0, most=1.0)


class Multiplier:
    """lambda, computed from ``log_value`` (I) and the latest violation, in tolerances of the constraint.

    Args:
        config: its settings.
        steps: number of steps of the whole run.
    """

    def __init__(self, config: MultiplierConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.log_value = math.log(config.initial)
        self.violation = 0.0

    @property
    def value(self) -> float:
        """lambda."""
        return math.exp(self.log_value + self.config.proportional * self.violation)

    def dual_step(self, violation: float) -> None:
        """Update with the running violation (c - bound) / tolerance."""
        self.violation = min(max(violation, -LARGEST_VIOLATION), LARGEST_VIOLATION)
        moved = self.log_value + self.config.integral / self.steps * self.violation
        self.log_value = max(moved, math.log(self.config.initial))

    def state_dict(self) -> dict[str, float]:
        """The complete state, for :meth:`load_state_dict`; JSON represents it exactly."""
        return {"log_value": self.log_value, "violation": self.violation}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.log_value, self.violation = state["log_value"], state["violation"]

    def __repr__(self) -> str:
        return f"Multiplier({self.value:.4g}, {asdict(self.config)})"


class RunningViolation:
    """Estimate of the violation on unseen text after each step, in tolerances of the constraint.

    A training batch is unseen text until its update, and measuring it costs nothing. But a batch is small, and comes
    from the documents that the model trains on. So the running mean over batches tracks changes of the violation, and
    each measurement on the validation blocks corrects its offset.

    Args:
        decay: decay of the running mean per step.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.mean: float | None = None
        self.slow_mean: float | None = None
        self.offset: float | None = None

    @property
    def value(self) -> float | None:
        """The violation; None before the first measurement."""
        return None if self.mean is None else self.mean + (self.offset or 0.0)

    def add_batch(self, violation: float) -> None:
        """Add what a training step measured before its update."""
        self.mean = self._averaged(self.mean, violation, self.decay)
        self.slow_mean = self._averaged(self.slow_mean, violation, math.sqrt(self.decay))

    def add_validation(self, violation: float, *, alone: bool = False) -> None:
        """Add a measurement on the validation blocks; ``alone`` ignores the batches, as with sampled gates."""
        if alone or self.slow_mean is None:
            self.mean, self.slow_mean, self.offset = violation, violation, 0.0
        else:
            self.offset = self._averaged(self.offset, violation - self.slow_mean, 0.5)

    @staticmethod
    def _averaged(before: float | None, now: float, decay: float) -> float:
        return now if before is None else decay * before + (1 - decay) * now

    def state_dict(self) -> dict[str, Any]:
        """The complete state, for :meth:`load_state_dict`; JSON represents it exactly."""
        return {"mean": self.mean, "slow_mean": self.slow_mean, "offset": self.offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.mean, self.slow_mean, self.offset = state["mean"], state["slow_mean"], state["offset"]


def lagrangian(
    objective: Float[Tensor, ""], constrained: Float[Tensor, ""], multiplier: float, unit: float
) -> Float[Tensor, ""]:
    """(objective + lambda * constrained / unit) / (1 + lambda)."""
    return (objective + multiplier / unit * constrained) / (1 + multiplier)
