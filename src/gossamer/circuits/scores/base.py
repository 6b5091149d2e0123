"""What a score is: an estimate, for each unit, of how much the metric changes when the unit carries something else.

Or the result of a search for a set of units, which ranks those of the set before all others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.mask_search import UnitSet
from gossamer.circuits.task_masks import Units
from gossamer.circuits.tasks.base import Batch


class UnitScores(Protocol):
    """Scores of nodes or edges, summed over the batch."""

    def __call__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        *,
        ablation: str = "patch",
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


class SetSearch(Protocol):
    """A search, on all prompts of a task together, for a set of nodes or edges that does what the model does."""

    def __call__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        units: Units,
        *,
        ablation: str,
        means: Mapping[int, Float[Tensor, "sources tokens d_model"]],
        progress: Callable[[str], None],
    ) -> tuple[Tensor, UnitSet]:
        """
        Args:
            units: ``nodes`` or ``edges``.
            ablation: what units outside the set carry.
            means: what sources carry under mean ablation, by the prompts' length.
            progress: is told in a few words what is being done.

        Returns:
            Scores of the units, as :class:`UnitScores` gives them, lowest for the set's own; and the set.
        """
        ...


LinkScores = Callable[..., Float[Tensor, "prompts layers heads tokens tokens"]]
"""Scores of the attention links of each prompt, from model, batch and ``ablation``, which is ``patch`` or ``zero``."""


@dataclass(frozen=True)
class Score:
    """A way to score the units of a model.

    Attributes:
        name: in the registry, on the command line and in records.
        edges: of component edges.
        nodes: of nodes; None where a node's score is the sum over the edges that leave it.
        links: of attention links; None if it is not defined for them.
        search: finds sets of nodes and of edges, where the score is not one of each unit by itself; then ``edges`` and
            ``nodes`` are None.
    """

    name: str
    edges: UnitScores | None = None
    nodes: UnitScores | None = None
    links: LinkScores | None = None
    search: SetSearch | None = None
