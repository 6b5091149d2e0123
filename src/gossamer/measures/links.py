"""Count the attention links that the hard gates leave open: in total, per layer, per head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from gossamer.models.attention import LinkCounts


@dataclass
class LinkCounter:
    """Links counted over any number of forward passes.

    Attributes:
        open_links: ``[layers, heads]``, allowed pairs with G > 0.
        allowed_links: ``[layers, heads]``, pairs that causality, padding and window allow, diagonal included.
        queries: real tokens seen.
    """

    open_links: Int[Tensor, "layers heads"]
    allowed_links: Int[Tensor, "layers heads"]
    queries: int = 0

    @classmethod
    def empty(cls, layers: int, heads: int) -> "LinkCounter":
        """A counter with all counts zero."""
        zeros = torch.zeros(layers, heads, dtype=torch.long)
        return cls(zeros, zeros.clone())

    @classmethod
    def total(cls, tallies: Sequence["LinkCounter"]) -> "LinkCounter":
        """Sum of the counters of one model; needs at least one."""
        return cls(
            torch.stack([tally.open_links for tally in tallies]).sum(0),
            torch.stack([tally.allowed_links for tally in tallies]).sum(0),
            sum(tally.queries for tally in tallies),
        )

    def add(self, counts: dict[int, LinkCounts], queries: int) -> None:
        """Add the counts that :func:`gossamer.counted_links` yielded for one pass over ``queries`` real tokens."""
        for layer, count in counts.items():
            self.open_links[layer] += count.open_links.sum((0, 2)).cpu()
            self.allowed_links[layer] += count.allowed_links.sum((0, 2)).cpu()
        self.queries += queries

    @property
    def open_fraction(self) -> float:
        """Open links / allowed links, over all layers, heads and queries."""
        return self.open_links.sum().item() / self.allowed_links.sum().item()

    @property
    def open_fraction_per_layer(self) -> list[float]:
        """:attr:`open_fraction` of each layer."""
        return (self.open_links.sum(-1) / self.allowed_links.sum(-1)).tolist()

    @property
    def open_fraction_per_head(self) -> list[list[float]]:
        """:attr:`open_fraction` of each head of each layer."""
        return (self.open_links / self.allowed_links).tolist()

    @property
    def open_links_per_query(self) -> float:
        """Mean number of open links per query and head, over all layers."""
        return self.open_links.sum().item() / (self.queries * self.open_links.numel())
