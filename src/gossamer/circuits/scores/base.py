"""What a score is: an estimate, for each unit, of how much the metric changes when the unit carries something else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.activation_cache import Ablation
from gossamer.circuits.tasks.base import Batch


class UnitScores(Protocol):
    """Scores of nodes or edges, summed over the batch."""

    def __call__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        *,
        ablation: Ablation = "patch",
        mean: Float[Tensor, "sources tokens d_model"] | None = None,
    ) -> Tensor:
        """
        Args:
            ablation: what a unit would carry instead of its own value.
            mean: what sources carry under mean ablation; the mean over the batch's corrupted runs if None.

        Returns:
            nodes ``[sources]``, edges ``[sources, destinations]``.
        """
        ...


LinkScores = Callable[..., Float[Tensor, "prompts layers heads tokens tokens"]]
"""Scores of the attention links of each prompt: a function of model, batch and ``ablation``, "patch" or "zero"."""


@dataclass(frozen=True)
class Score:
    """A way to score the units of a model.

    Attributes:
        name: in the registry, on the command line and in records.
        edges: of component edges.
        nodes: of nodes; None where a node's score is the sum over the edges that leave it.
        links: of attention links; None if it is not defined for them.
    """

    name: str
    edges: UnitScores
    nodes: UnitScores | None = None
    links: LinkScores | None = None
