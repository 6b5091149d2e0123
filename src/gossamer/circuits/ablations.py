"""Ablations by name: what units outside a circuit carry. The command line reads them, so heavy imports are avoided."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gossamer.errors import GossamerError

if TYPE_CHECKING:
    from torch import Tensor


LinkAblation = Literal["patch", "zero"]
"""What ablated attention links carry: the corrupted run's weight and value of the same link, or nothing."""


@dataclass(frozen=True)
class Ablation:
    """A way to replace what a unit writes.

    Attributes:
        name: used in the registry, on the command line and in records.
        replace: computes what sources carry instead, ``[sources, batch, tokens, d_model]``, from what they wrote in the
            corrupted run (same shape) and their mean, ``[sources, tokens, d_model]`` or None.
        links: what attention links carry instead; None if the ablation is not defined for links.
        averages: whether ``replace`` uses the mean over all corrupted prompts of a task.
    """

    name: str
    replace: Callable[["Tensor", "Tensor | None"], "Tensor"]
    links: LinkAblation | None
    averages: bool = False


def _patch(corrupted: "Tensor", mean: "Tensor | None") -> "Tensor":
    return corrupted


def _zero(corrupted: "Tensor", mean: "Tensor | None") -> "Tensor":
    return corrupted.new_zeros(corrupted.shape)


def _mean(corrupted: "Tensor", mean: "Tensor | None") -> "Tensor":
    """Use the mean at each position; if none is given, average over the batch."""
    average = corrupted.mean(1) if mean is None else mean
    return average[:, None].repeat(1, corrupted.shape[1], 1, 1)


ABLATIONS: dict[str, Ablation] = {
    ablation.name: ablation
    for ablation in (
        Ablation("patch", _patch, links="patch"),
        Ablation("zero", _zero, links="zero"),
        Ablation("mean", _mean, links=None, averages=True),
    )
}


def find_ablation(name: str) -> Ablation:
    """Look up an ablation by name.

    Raises:
        GossamerError: if there is no ablation of that name.
    """
    if name not in ABLATIONS:
        raise GossamerError(f"there is no ablation {name!r}; there are {', '.join(ABLATIONS)}")
    return ABLATIONS[name]
