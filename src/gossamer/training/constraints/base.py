"""The interface of a constraint: a quantity measured on the sparse model that must not exceed a bound.

The terms are those of cooper (github.com/cooper-org/cooper): the violation is the measurement minus the bound, the
primal step changes the weights to lower the Lagrangian, the dual step changes the multiplier along the violation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from gossamer.measures.language import LanguageMetrics

SMALLEST_TOLERANCE = 1e-5
"""Lower limit of a tolerance, in nats."""


@dataclass(frozen=True)
class Outcome:
    """Result of checking a constraint on a finished model.

    Attributes:
        value: the measured value, in nats.
        bound: its upper bound, in nats.
        stderr: standard error of the value's distance from the bound; None if there is too little text.
    """

    value: float
    bound: float
    stderr: float | None

    @property
    def met(self) -> bool:
        """Whether the constraint holds."""
        return self.value <= self.bound


@dataclass(frozen=True)
class Constraint(ABC):
    """A kind of constraint; the fields of an instance are the user's settings.

    To add a kind, write a frozen dataclass in a file beside this one, with each field created by
    :func:`gossamer.fields.setting`, and add a line to the registry (:mod:`gossamer.training.constraints`). Its settings
    then become settings of a run and options of ``gossamer sparsify``.

    Attributes:
        name: its name in settings and records.
        symbol: symbol of its bound, for plots and progress.
        label: short name of the measured quantity, such as "loss".
        bound_name: name of its bound in text and in ``metrics.json``.
        summary: one sentence for help.
        needs_dense: whether the dense model runs beside the sparse one in training.
        relative_to_dense: whether the bound depends on the dense model's loss, so that a batch is compared with the
            dense model's loss on the same tokens.
    """

    name: ClassVar[str]
    symbol: ClassVar[str]
    label: ClassVar[str]
    bound_name: ClassVar[str]
    summary: ClassVar[str]
    needs_dense: ClassVar[bool] = False
    relative_to_dense: ClassVar[bool] = False

    def check(self) -> None:  # noqa: B027
        """Raise if the settings cannot be satisfied; the ranges of the fields are checked elsewhere.

        Raises:
            GossamerError: naming the setting.
        """

    @abstractmethod
    def bound(self, dense_loss: float) -> float:
        """The upper bound of the measurement, in nats.

        Args:
            dense_loss: cross-entropy of the dense model on the same blocks, in nats.
        """

    @abstractmethod
    def measure(
        self,
        logits: Float[Tensor, "batch tokens vocab"],
        dense_logits: Float[Tensor, "batch tokens vocab"] | None,
        input_ids: Int[Tensor, "batch tokens"],
        prompt_tokens: int = 0,
    ) -> Float[Tensor, ""]:
        """Measure the bounded quantity on a batch, in nats; differentiable in the sparse model's logits.

        Args:
            logits: logits of the sparse model.
            dense_logits: logits of the dense model; None unless ``needs_dense``.
            input_ids: the tokens.
            prompt_tokens: number of tokens at the start of each row that are given, not predicted.
        """

    @property
    def unit(self) -> float:
        """The amount, in nats, that is worth as much as all links at a multiplier of 1."""
        return 0.1

    def tolerance(self, dense_loss: float) -> float:
        """The violation that counts as 1 in dual steps, in nats.

        It is the unit, or the bound if that is smaller, as where the dense model is almost always right.

        Args:
            dense_loss: as for :meth:`bound`.
        """
        return min(self.unit, max(self.bound(dense_loss), SMALLEST_TOLERANCE))

    def training_loss(
        self,
        measured: Float[Tensor, ""],
        logits: Float[Tensor, "batch tokens vocab"],
        dense_logits: Float[Tensor, "batch tokens vocab"] | None,
        input_ids: Int[Tensor, "batch tokens"],
        prompt_tokens: int = 0,
    ) -> Float[Tensor, ""]:
        """The loss that moves the weights towards the bound, in nats; by default ``measured`` itself."""
        return measured

    @abstractmethod
    def outcome(self, sparse: LanguageMetrics, dense: LanguageMetrics) -> Outcome:
        """Compute value, bound and standard error from both models' metrics on the same blocks, with hard gates."""

    def warnings(self, dense_loss: float) -> list[str]:
        """Warnings for the user before training, one line each."""
        return []

    def words(self, dense_loss: float) -> dict[str, str | float]:
        """The constraint as stored in a run's records: ``name``, ``symbol``, ``label`` and ``bound``."""
        return {"name": self.name, "symbol": self.symbol, "label": self.label, "bound": self.bound(dense_loss)}
