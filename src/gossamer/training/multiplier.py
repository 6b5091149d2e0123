"""The constrained objective: minimise the expected open links subject to a bound on the loss.

    minimise   E / allowed links   subject to   c <= bound
    primal     (E / allowed + lambda * (c - bound)) / (1 + lambda)
    dual       I += rate * v,  log lambda = I + proportional * v,  v = clip(running mean of (c - bound), -limit, limit)

with c what the constraint measures (:mod:`gossamer.training.constraints`) and v the violation. The dual step is
multiplicative as in GECO (Rezende & Viola 2018, arXiv 1810.00597); dividing by 1 + lambda keeps the size
of the gradient steady while lambda moves over orders of magnitude.

The sum I alone lags behind: while the weights still recover from closed gates it keeps rising, and it comes down only
after the bound has long been held. The proportional part answers at once (Sohrabi et al. 2024, arXiv 2406.04558).

With the objective ``log``, log(E / allowed) stands for E / allowed. The optimum is the same, but lambda is another:
the relative saving of links that a nat is worth, which need not fall as links get few.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.fields import documented, setting

ObjectiveKind = Literal["fraction", "log"]


@documented
@dataclass(frozen=True)
class MultiplierConfig:
    """How the multiplier moves."""

    initial: float = setting(
        "lambda before the first step; a low one closes the gates before the bound counts.", 0.02, least=1e-4, most=1e4
    )
    rate: float = setting("How fast lambda follows: change of log lambda per step and nat of violation.", 0.5)
    proportional: float = setting(
        "How much log lambda answers at once to each nat of violation; damps its swing.", 0.0, least=0.0
    )
    decay: float = setting("Of the running mean of the violation, per dual step.", 0.5, least=0.0, most=1.0)
    largest_violation: float = setting(
        "The running mean of the violation is clipped to it, nats, so that the first steps, far from the bound on "
        "either side, do not carry lambda away.",
        0.1,
        least=0.0,
    )
    smallest: float = setting("lambda is at least this.", 1e-4, least=1e-30)
    largest: float = setting("lambda is at most this.", 1e4, least=1e-30)


class Multiplier:
    """The Lagrange multiplier lambda: the sum ``log_value`` (I) and the running mean of the violation that moves it."""

    def __init__(self, config: MultiplierConfig) -> None:
        self.config = config
        self.log_value = math.log(config.initial)
        self.mean_violation: float | None = None

    @property
    def value(self) -> float:
        """lambda."""
        return math.exp(self._within(self.log_value + self.config.proportional * self._clipped()))

    def _clipped(self) -> float:
        limit = self.config.largest_violation
        return min(max(self.mean_violation or 0.0, -limit), limit)

    def _within(self, log_value: float) -> float:
        return min(max(log_value, math.log(self.config.smallest)), math.log(self.config.largest))

    def dual_step(self, violation: float) -> None:
        """Move along the violation c - bound that was measured last."""
        config = self.config
        if self.mean_violation is None:
            self.mean_violation = violation
        self.mean_violation = config.decay * self.mean_violation + (1 - config.decay) * violation
        self.log_value = self._within(self.log_value + config.rate * self._clipped())

    def state_dict(self) -> dict[str, float | None]:
        """Everything that :meth:`load_state_dict` needs to go on exactly; JSON keeps it exactly."""
        return {"log_value": self.log_value, "mean_violation": self.mean_violation}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on from :meth:`state_dict`."""
        log_value = state["log_value"]
        assert log_value is not None
        self.log_value, self.mean_violation = log_value, state["mean_violation"]

    def __repr__(self) -> str:
        return f"Multiplier({self.value:.4g}, {asdict(self.config)})"


def lagrangian(
    open_fraction: Float[Tensor, ""],
    violation: Float[Tensor, ""],
    multiplier: float,
    objective: ObjectiveKind = "fraction",
) -> Float[Tensor, ""]:
    """(f + lambda * violation) / (1 + lambda), f the expected open fraction or its logarithm."""
    if objective == "log":
        open_fraction = open_fraction.clamp(min=torch.finfo(open_fraction.dtype).tiny).log()
    return (open_fraction + multiplier * violation) / (1 + multiplier)
