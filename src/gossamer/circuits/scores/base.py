"""Interfaces of scores.

A score estimates, for each unit, how much the metric changes when the unit's value is replaced. Alternatively, it is
the result of a search for a set of units and ranks the units in the set before all others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.ablations import LinkAblation
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
            ablation: what a unit carries instead of its value.
            mean: what sources carry under mean ablation; the mean over the batch's corrupted runs if None.

        Returns:
            Scores of nodes ``[sources]`` or edges ``[sources, destinations]``.
        """
        ...


class SetSearch(Protocol):
    """A search over all prompts of a task for a set of nodes or edges that does what the model does."""

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
            means: what sources carry under mean ablation, by prompt length.
            progress: called with a short description of the current step.

        Returns:
            Scores of the units, as in :class:`UnitScores`, lowest for units in the set; and the set.
        """
        ...


LinkScores = Callable[..., Float[Tensor, "prompts layers heads tokens tokens"]]
"""Computes scores of each prompt's attention links from model, batch and ``ablation`` (``patch`` or ``zero``)."""


class LinkSearch(Protocol):
    """A search, separate for each prompt, for a set of attention links that does what the model does."""

    def __call__(
        self, model: PreTrainedModel, batch: Batch, *, ablation: LinkAblation, progress: Callable[[str], None]
    ) -> tuple[Float[Tensor, "prompts layers heads tokens tokens"], tuple[UnitSet, ...]]:
        """
        Args:
            ablation: what links outside the set carry.
            progress: called with a short description of the current step.

        Returns:
            Scores of the links, lowest for links in the set and 0 for links that carry nothing; and each prompt's set.
        """
        ...


@dataclass(frozen=True)
class Score:
    """A way to score the units of a model.

    Attributes:
        name: used in the registry, on the command line and in records.
        edges: scores component edges.
        nodes: scores nodes; if None, a node's score is the sum over its outgoing edges.
        links: scores attention links; None if the score is not defined for them.
        search: finds sets of nodes or edges, for scores that do not rate each unit separately; ``edges`` and ``nodes``
            are then None.
        link_search: the same for sets of attention links; ``links`` is then None.
    """

    name: str
    edges: UnitScores | None = None
    nodes: UnitScores | None = None
    links: LinkScores | None = None
    search: SetSearch | None = None
    link_search: LinkSearch | None = None

    @property
    def has_links(self) -> bool:
        """Whether the score is defined for attention links."""
        return self.links is not None or self.link_search is not None
