"""What a constraint is: something measured of the sparse model that has to stay at or below a bound.

The words are those of cooper (github.com/cooper-org/cooper): the violation is the measurement less the bound, the
primal step moves the weights to lower the Lagrangian, the dual step moves the multiplier along the violation.
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
"""Nats."""


@dataclass(frozen=True)
class Outcome:
    """A constraint held against a finished model.

    Attributes:
        value: what was measured, nats.
        bound: what it may be at most, nats.
        stderr: standard error of the value's distance from the bound; None where there is too little text for one.
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
    """A kind of constraint; an instance has the user's settings of it, which are its fields.

    A new kind is a file beside this one with a frozen dataclass, each field made by :func:`gossamer.fields.setting`,
    and a line in the registry (:mod:`gossamer.training.constraints`). Its settings then are settings of a run, and
    options of ``gossamer sparsify``.

    Attributes:
        name: what it is called in settings and records.
        symbol: of its bound, for plots and progress.
        label: what it measures, in a word or two: "loss".
        bound_name: what its bound is called in words, and in ``metrics.json``.
        summary: one sentence for help.
        needs_dense: whether the dense model runs beside the sparse one in training.
        relative_to_dense: whether the bound comes from the dense model's own loss, so that a batch is held against the
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
        """Stop at settings that cannot be held, beyond the ranges of the fields.

        Raises:
            GossamerError: naming the setting.
        """

    @abstractmethod
    def bound(self, dense_loss: float) -> float:
        """What the measurement may be at most, nats.

        Args:
            dense_loss: cross-entropy of the dense model on the same blocks, nats.
        """

    @abstractmethod
    def measure(
        self,
        logits: Float[Tensor, "batch tokens vocab"],
        dense_logits: Float[Tensor, "batch tokens vocab"] | None,
        input_ids: Int[Tensor, "batch tokens"],
        prompt_tokens: int = 0,
    ) -> Float[Tensor, ""]:
        """What is bounded, nats, on a batch; differentiable by the sparse model's logits.

        Args:
            logits: of the sparse model.
            dense_logits: of the dense one; None unless ``needs_dense``.
            input_ids: the tokens.
            prompt_tokens: tokens at the start of each row that are given, not predicted.
        """

    @property
    def unit(self) -> float:
        """Nats of the measurement that are worth as much as all links, at a multiplier of 1."""
        return 0.1

    def tolerance(self, dense_loss: float) -> float:
        """A violation that counts as 1 in dual steps, nats.

        A unit is a lot of a language model's loss; where the dense model is almost always right, the bound itself is
        less.

        Args:
            dense_loss: as that of :meth:`bound`.
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
        """What pulls the weights towards the bound, nats; ``measured`` itself unless a kind says otherwise."""
        return measured

    @abstractmethod
    def outcome(self, sparse: LanguageMetrics, dense: LanguageMetrics) -> Outcome:
        """Value, bound and standard error from what was measured of both models on the same blocks, with hard gates."""

    def warnings(self, dense_loss: float) -> list[str]:
        """What the user should know before training, a line each."""
        return []

    def words(self, dense_loss: float) -> dict[str, str | float]:
        """What a reader of a run's records needs to know of it: ``name``, ``symbol``, ``label`` and ``bound``."""
        return {"name": self.name, "symbol": self.symbol, "label": self.label, "bound": self.bound(dense_loss)}
