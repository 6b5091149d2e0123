"""The units of a transformer and the edges between them: tensors and pure functions.

Sources write into the residual stream: the input (token and position embeddings), each attention head, each MLP.
Destinations read from it: q, k and v of each head, each MLP, the logits. Edges go from each source to every later
destination. If attention and MLP of a layer run in parallel, there are none from its heads to its MLP.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Graph:
    """The units of a model with ``layers`` layers of ``heads`` query heads.

    Sources are numbered: input, then for each layer its heads and its MLP. Destinations are numbered: for each layer q
    of all heads, k of all heads, v of all heads and the MLP, then the logits. With grouped-query attention, k and v
    count once for each query head.

    Attributes:
        layers, heads: number of layers, and of query heads per layer.
        parallel: whether attention and MLP of a layer run in parallel, so that the MLP does not read the attention.
    """

    layers: int
    heads: int
    parallel: bool = False

    @property
    def sources(self) -> int:
        """Number of sources, 1 + L (H + 1)."""
        return 1 + self.layers * (self.heads + 1)

    @property
    def destinations(self) -> int:
        """Number of destinations, L (3 H + 1) + 1."""
        return self.layers * (3 * self.heads + 1) + 1

    def sources_before(self, layer: int) -> int:
        """Number of sources that a layer's attention can read: all of the previous layers."""
        return 1 + layer * (self.heads + 1)

    def head(self, layer: int, head: int) -> int:
        """Source index of a head."""
        return self.sources_before(layer) + head

    def mlp(self, layer: int) -> int:
        """Source index of an MLP."""
        return self.sources_before(layer) + self.heads

    def read(self, layer: int, kind: str, head: int = 0) -> int:
        """Destination index of a head's ``q``, ``k`` or ``v``, a layer's ``mlp``, or the ``logits``."""
        if kind == "logits":
            return self.logits
        start = layer * (3 * self.heads + 1)
        return start + (3 * self.heads if kind == "mlp" else "qkv".index(kind) * self.heads + head)

    def attention_reads(self, layer: int) -> slice:
        """Destination indices of q, k and v of all heads in a layer."""
        start = layer * (3 * self.heads + 1)
        return slice(start, start + 3 * self.heads)

    @property
    def logits(self) -> int:
        """Destination index of the logits, the last one."""
        return self.destinations - 1

    def sources_of(self, destination: int) -> int:
        """Number n of sources that the destination can read; they are sources 0 to n - 1."""
        if destination == self.logits:
            return self.sources
        layer, place = divmod(destination, 3 * self.heads + 1)
        before = self.sources_before(layer)
        return before + self.heads if place == 3 * self.heads and not self.parallel else before

    def possible(self) -> Bool[Tensor, "sources destinations"]:
        """Mask of the edges that exist."""
        reach = torch.tensor([self.sources_of(destination) for destination in range(self.destinations)])
        return torch.arange(self.sources)[:, None] < reach

    def source_name(self, source: int) -> str:
        """Name of a source as in EAP-IG's graph files: ``input``, ``a3.h5`` or ``m3``."""
        if source == 0:
            return "input"
        layer, place = divmod(source - 1, self.heads + 1)
        return f"m{layer}" if place == self.heads else f"a{layer}.h{place}"

    def destination_name(self, destination: int) -> str:
        """Name of a destination: ``a3.h5<q>``, ``m3`` or ``logits``."""
        if destination == self.logits:
            return "logits"
        layer, place = divmod(destination, 3 * self.heads + 1)
        if place == 3 * self.heads:
            return f"m{layer}"
        kind, head = divmod(place, self.heads)
        return f"a{layer}.h{head}<{'qkv'[kind]}>"

    def source_of_destination(self) -> Int[Tensor, " destinations"]:
        """Source index that each destination feeds; -1 for the logits."""
        owners = torch.full((self.destinations,), -1)
        for layer in range(self.layers):
            heads = torch.arange(self.head(layer, 0), self.head(layer, self.heads))
            owners[self.attention_reads(layer)] = heads.repeat(3)
            owners[self.read(layer, "mlp")] = self.mlp(layer)
        return owners


def prune(
    graph: Graph, kept: Bool[Tensor, "sources destinations"], *, fed: Bool[Tensor, " sources"] | None = None
) -> Bool[Tensor, "sources destinations"]:
    """Keep only the edges on a path of kept edges from the input to the logits.

    Such a path may also start at the sources in ``fed``.
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
    """Keep only the attention links whose query reaches the last position through kept links.

    Every position reads the input, so no link is cut off from the input.
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
    """Select the ``count`` edges with the largest absolute scores, or the lowest scores; ties go to the lower index.

    A score estimates how much the metric changes when the edge is patched: edges with the lowest scores help most.
    """
    possible = graph.possible()
    ranked = (scores.abs() if absolute else -scores).masked_fill(~possible, -torch.inf).flatten()
    kept = torch.zeros(ranked.shape, dtype=torch.bool)
    kept[torch.argsort(ranked, descending=True, stable=True)[: min(count, int(possible.sum()))]] = True
    return kept.view_as(possible)
