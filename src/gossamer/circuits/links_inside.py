"""Count the attention links inside a circuit of nodes: the links of its heads on the task's prompts.

In the dense model all allowed links count, in the sparse model the open ones. The ratio of the two is therefore the
saving in heads times the saving in links per head. It is not a circuit size measured by keeping and cutting links.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.search import Circuits
from gossamer.circuits.tasks.base import Prompts
from gossamer.measures.language import forward_passes
from gossamer.measures.links import LinkCounter


def links_of_heads(
    sparse: PreTrainedModel, prompts: Prompts, batch_size: int
) -> dict[str, Float[Tensor, "layers heads"]]:
    """Mean number of links of each head on a clean prompt: allowed links for ``dense``, open links for ``sparse``.

    Both are measured on the gated model: gates only close links, so the allowed links are those of the dense model.

    Args:
        sparse: the gated model.
        prompts: the task's prompts.
        batch_size: prompts per forward pass.
    """
    batches = [batch.clean for batch in prompts.batches(batch_size)]
    passes = forward_passes(sparse, batches, lambda logits, ids: len(ids))
    links = LinkCounter.total([tally for _, tally in passes])
    count = sum(rows for rows, _ in passes)
    return {"dense": links.allowed_links / count, "sparse": links.open_links / count}


def links_inside(found: Circuits, links: Float[Tensor, "layers heads"]) -> float:
    """Links per prompt of the heads in the smallest node circuit that explains 90 %."""
    graph, nodes = found.graph, found.nodes(found.curves["nodes"].first_size or 0)
    heads = [[nodes[graph.head(layer, head)] for head in range(graph.heads)] for layer in range(graph.layers)]
    return links[torch.tensor(heads)].sum().item()
