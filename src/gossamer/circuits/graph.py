"""The units of a transformer and the edges between them: tensors and pure functions.

Sources write into the residual stream: the input (token and position embeddings), each attention head, each MLP.
Destinations read from it: q, k and v of each head, each MLP, the logits. An edge goes from a source to any destination
that comes after it; where attention and MLP of a layer run in parallel, not from its heads to its own MLP.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Graph:
    """The units of a model with ``layers`` layers of ``heads`` query heads.

    Sources are numbered input, then layer by layer heads and MLP; destinations layer by layer q of all heads, k of all
    heads, v of all heads, MLP, and last the logits. With grouped queries k and v count once for each query head.

    Attributes:
        layers, heads: how many.
        parallel: whether the MLP of a layer does not read its attention.
    """

    layers: int
    heads: int
    parallel: bool = False

    @property
    def sources(self) -> int:
        """1 + L (H + 1)."""
        return 1 + self.layers * (self.heads + 1)

    @property
    def destinations(self) -> int:
        """L (3 H + 1) + 1."""
        return self.layers * (3 * self.heads + 1) + 1

    def sources_before(self, layer: int) -> int:
        """How many sources a layer's attention can read: all up to the layer before."""
        return 1 + layer * (self.heads + 1)

    def head(self, layer: int, head: int) -> int:
        """The source that a head is."""
        return self.sources_before(layer) + head

    def mlp(self, layer: int) -> int:
        """The source that an MLP is."""
        return self.sources_before(layer) + self.heads

    def read(self, layer: int, kind: str, head: int = 0) -> int:
        """The destination that ``q``, ``k``, ``v`` of a head, the ``mlp`` of a layer, or the ``logits`` are."""
        if kind == "logits":
            return self.logits
        start = layer * (3 * self.heads + 1)
        return start + (3 * self.heads if kind == "mlp" else "qkv".index(kind) * self.heads + head)

    def attention_reads(self, layer: int) -> slice:
        """The destinations q, k and v of all heads of a layer."""
        start = layer * (3 * self.heads + 1)
        return slice(start, start + 3 * self.heads)

    @property
    def logits(self) -> int:
        """The last destination."""
        return self.destinations - 1

    def sources_of(self, destination: int) -> int:
        """How many sources the destination can read; they are the first so many."""
        if destination == self.logits:
            return self.sources
        layer, place = divmod(destination, 3 * self.heads + 1)
        before = self.sources_before(layer)
        return before + self.heads if place == 3 * self.heads and not self.parallel else before

    def possible(self) -> Bool[Tensor, "sources destinations"]:
        """Which edges there are."""
        reach = torch.tensor([self.sources_of(destination) for destination in range(self.destinations)])
        return torch.arange(self.sources)[:, None] < reach

    def source_name(self, source: int) -> str:
        """``input``, ``a3.h5`` or ``m3``, as EAP-IG's graph files have it."""
        if source == 0:
            return "input"
        layer, place = divmod(source - 1, self.heads + 1)
        return f"m{layer}" if place == self.heads else f"a{layer}.h{place}"

    def destination_name(self, destination: int) -> str:
        """``a3.h5<q>``, ``m3`` or ``logits``."""
        if destination == self.logits:
            return "logits"
        layer, place = divmod(destination, 3 * self.heads + 1)
        if place == 3 * self.heads:
            return f"m{layer}"
        kind, head = divmod(place, self.heads)
        return f"a{layer}.h{head}<{'qkv'[kind]}>"

    def source_of_destination(self) -> Int[Tensor, " destinations"]:
        """The source that each destination feeds; -1 for the logits."""
        owners = torch.full((self.destinations,), -1)
        for layer in range(self.layers):
            heads = torch.arange(self.head(layer, 0), self.head(layer, self.heads))
            owners[self.attention_reads(layer)] = heads.repeat(3)
            owners[self.read(layer, "mlp")] = self.mlp(layer)
        return owners


def prune(
    graph: Graph, kept: Bool[Tensor, "sources destinations"], *, fed: Bool[Tensor, " sources"] | None = None
) -> Bool[Tensor, "sources destinations"]:
    """The kept edges that lie on a path from the input to the logits through kept edges.

    ``fed`` are sources beside the input at which such a path may begin.
    """
    kept = kept & graph.possible()
    begins = torch.arange(graph.sources) == 0
    if fed is not None:
        begins = begins | fed
    owners = graph.source_of_destination()
    inner = owners >= 0
    while True:
        reached = begins.clone()
        reached[owners[inner & kept.any(0)]] = True
        used = kept.any(1)
        heard = torch.ones(graph.destinations, dtype=torch.bool)
        heard[inner] = used[owners[inner]]
        pruned = kept & reached[:, None] & heard[None]
        if torch.equal(pruned, kept):
            return kept
        kept = pruned


def between_nodes(graph: Graph, kept: Bool[Tensor, "sources destinations"]) -> Bool[Tensor, "sources destinations"]:
    """All edges between the nodes of a pruned circuit, and from them to the logits."""
    sources, owners = kept.any(1), graph.source_of_destination()
    heard = torch.ones(graph.destinations, dtype=torch.bool)
    heard[owners >= 0] = sources[owners[owners >= 0]]
    return graph.possible() & sources[:, None] & heard


def prune_links(
    kept: Bool[Tensor, "*prompts layers heads tokens tokens"],
) -> Bool[Tensor, "*prompts layers heads tokens tokens"]:
    """The kept attention links from whose query a path of kept links leads on to the last position.

    Every position reads the input, so no link is cut off from there.
    """
    pruned = torch.zeros_like(kept)
    heard = torch.zeros(*kept.shape[:-4], kept.shape[-1], dtype=torch.bool, device=kept.device)
    heard[..., -1] = True
    for layer in reversed(range(kept.shape[-4])):
        links = kept[..., layer, :, :, :] & heard[..., None, :, None]
        pruned[..., layer, :, :, :] = links
        heard = heard | links.any(-3).any(-2)
    return pruned


def top_edges(
    graph: Graph, scores: Tensor, count: int, *, absolute: bool = True
) -> Bool[Tensor, "sources destinations"]:
    """The ``count`` edges with the largest absolute scores, or the lowest ones; ties by number.

    A score says how much the metric changes when the edge is patched: the lowest are those that help most.
    """
    possible = graph.possible()
    ranked = (scores.abs() if absolute else -scores).masked_fill(~possible, -torch.inf).flatten()
    kept = torch.zeros(ranked.shape, dtype=torch.bool)
    kept[torch.argsort(ranked, descending=True, stable=True)[: min(count, int(possible.sum()))]] = True
    return kept.view_as(possible)
