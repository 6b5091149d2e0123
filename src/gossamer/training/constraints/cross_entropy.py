"""Constraint on the cross-entropy of the sparse model: at most tau."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gossamer.fields import documented, setting
from gossamer.training.constraints.base import Constraint, Outcome

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from gossamer.measures.language import LanguageMetrics


@documented
@dataclass(frozen=True)
class CrossEntropy(Constraint):
    """Next-token cross-entropy at most tau, by default the dense model's plus a small slack."""

    name: ClassVar[str] = "ce"
    symbol: ClassVar[str] = "τ"
    label: ClassVar[str] = "loss"
    bound_name: ClassVar[str] = "tau"
    needs_dense: ClassVar[bool] = True
    relative_to_dense: ClassVar[bool] = True
    summary: ClassVar[str] = "cross-entropy at most tau"

    slack: float = setting("Nats by which the loss may exceed the dense model's.", 0.01, least=0.0, most=1e4)
    tau: float | None = setting(
        "Bound on the cross-entropy in nats. Unset: the dense model's plus slack.", None, least=0.0, most=1e4
    )

    distillation: float = setting(
        "Share of the weights' loss that is KL(dense || sparse); the rest is the cross-entropy.",
        0.0,
        least=0.0,
        most=1.0,
    )

    def bound(self, dense_loss: float) -> float:
        return self.tau if self.tau is not None else dense_loss + self.slack

    def measure(
        self,
        logits: Float[Tensor, "batch tokens vocab"],
        dense_logits: Float[Tensor, "batch tokens vocab"] | None,
        input_ids: Int[Tensor, "batch tokens"],
        prompt_tokens: int = 0,
    ) -> Float[Tensor, ""]:
        from gossamer.measures.losses import cross_entropy

        return cross_entropy(logits, input_ids, prompt_tokens)

    def training_loss(
        self,
        measured: Float[Tensor, ""],
        logits: Float[Tensor, "batch tokens vocab"],
        dense_logits: Float[Tensor, "batch tokens vocab"] | None,
        input_ids: Int[Tensor, "batch tokens"],
        prompt_tokens: int = 0,
    ) -> Float[Tensor, ""]:
        if self.distillation == 0:
            return measured
        from gossamer.measures.losses import kl_divergence

        assert dense_logits is not None
        taught = kl_divergence(dense_logits, logits, prompt_tokens)
        return measured.lerp(taught, self.distillation)

    def outcome(self, sparse: LanguageMetrics, dense: LanguageMetrics) -> Outcome:
        from gossamer.measures.language import standard_error

        # Both losses vary with the text, so the difference has less variance if the bound depends on the dense loss.
        spread = sparse.losses - dense.losses if self.tau is None else sparse.losses
        return Outcome(sparse.loss, self.bound(dense.loss), standard_error(spread))

    def warnings(self, dense_loss: float) -> list[str]:
        bound = self.bound(dense_loss)
        if bound >= dense_loss:
            return []
        return [
            f"tau {bound:.3f} is below the dense model's held-out loss {dense_loss:.3f}: "
            "the constraint may be out of reach"
        ]
