"""The attention links inside a circuit of nodes: those of its heads on the task's prompts.

All allowed links count in the dense model, the open ones in the sparse model. So the ratio of the two is the saving in
heads times the saving in links a head; it is not a size found by keeping and cutting links.
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
    """How many links each head has on a clean prompt, on average: those allowed in ``dense``, those open in ``sparse``.

    Both come from the gated model: gates close links and allow none that the dense model has not.

    Args:
        sparse: the gated model.
        prompts: of the task.
        batch_size: prompts in one forward pass.
    """
    batches = [batch.clean for batch in prompts.batches(batch_size)]
    passes = forward_passes(sparse, batches, lambda logits, ids: len(ids))
    links = LinkCounter.total([tally for _, tally in passes])
    count = sum(rows for rows, _ in passes)
    return {"dense": links.allowed_links / count, "sparse": links.open_links / count}


def links_inside(found: Circuits, links: Float[Tensor, "layers heads"]) -> float:
    """The links of the heads in the smallest circuit of nodes that explains enough, a prompt."""
    graph, nodes = found.graph, found.nodes(found.curves["nodes"].first_size or 0)
    heads = [[nodes[graph.head(layer, head)] for head in range(graph.heads)] for layer in range(graph.layers)]
    return links[torch.tensor(heads)].sum().item()
