"""EAP-IG (activations): EAP's gradient averaged over runs in which one block's output is part clean, part corrupted.

    for each block n (embeddings, the attention and the MLP of each layer) and k = 1 .. m:
        a run on the clean prompts in which n writes  k/m a_n(clean) + (1 - k/m) a_n(corrupted)

All heads of a layer form one block, and every run counts for every edge, as in the original EAP-IG code (Hanna et al.
2024, arXiv 2403.17806). This takes (2 layers + 1)(m - 1) + 1 runs.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.graph import Graph
from gossamer.circuits.scores.base import Score
from gossamer.circuits.scores.gradients import change, products
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch

STEPS = 5
"""Number of steps m, as in MIB."""


def edge_scores(
    model: PreTrainedModel,
    batch: Batch,
    *,
    ablation: str = "patch",
    mean: Float[Tensor, "sources tokens d_model"] | None = None,
    steps: int = STEPS,
) -> Float[Tensor, "sources destinations"]:
    """EAP-IG (activations) scores of all component edges, summed over the batch."""
    difference, _, _ = change(model, batch, ablation, mean)
    blocks = list(_blocks(graph_of(model)))
    scores = products(model, batch, difference) / steps  # k = m, the clean run, is the same for every block
    for block in blocks:
        for step in range(1, steps):
            shift = (1 - step / steps) * difference[block].sum(0)
            scores = scores + products(model, batch, difference, shift=(block, shift)) / (steps * len(blocks))
    return scores


def _blocks(graph: Graph) -> Iterator[slice]:
    yield slice(0, 1)
    for layer in range(graph.layers):
        mlp = graph.mlp(layer)
        yield slice(graph.head(layer, 0), mlp)
        yield slice(mlp, mlp + 1)


EAP_IG_ACTIVATIONS = Score("eap-ig-activations", edge_scores)
