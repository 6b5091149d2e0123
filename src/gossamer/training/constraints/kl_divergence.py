"""Constraint on the divergence of the sparse model's predictions from the dense model's: at most epsilon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gossamer.errors import GossamerError
from gossamer.fields import documented, setting
from gossamer.training.constraints.base import Constraint, Outcome

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from gossamer.measures.language import LanguageMetrics


@documented
@dataclass(frozen=True)
class KLDivergence(Constraint):
    """KL(dense || sparse) of the next-token distributions at most epsilon."""

    name: ClassVar[str] = "kl"
    symbol: ClassVar[str] = "ε"
    label: ClassVar[str] = "KL"
    bound_name: ClassVar[str] = "epsilon"
    summary: ClassVar[str] = "KL(dense || sparse) at most epsilon"
    needs_dense: ClassVar[bool] = True

    epsilon: float = setting("Bound on KL(dense || sparse) in nats.", 0.05, least=0.0, most=1e4)

    def check(self) -> None:
        if self.epsilon <= 0:
            raise GossamerError(f"--epsilon {self.epsilon:g} cannot be held: no KL is below 0; give for example 0.05")

    def bound(self, dense_loss: float) -> float:
        return self.epsilon

    @property
    def unit(self) -> float:
        return self.epsilon

    def measure(
        self,
        logits: Float[Tensor, "batch tokens vocab"],
        dense_logits: Float[Tensor, "batch tokens vocab"] | None,
        input_ids: Int[Tensor, "batch tokens"],
        prompt_tokens: int = 0,
    ) -> Float[Tensor, ""]:
        from gossamer.measures.losses import kl_divergence

        assert dense_logits is not None
        return kl_divergence(dense_logits, logits, prompt_tokens)

    def outcome(self, sparse: LanguageMetrics, dense: LanguageMetrics) -> Outcome:
        from gossamer.measures.language import standard_error

        assert sparse.kl is not None
        assert sparse.kls is not None
        return Outcome(sparse.kl, self.epsilon, standard_error(sparse.kls))
