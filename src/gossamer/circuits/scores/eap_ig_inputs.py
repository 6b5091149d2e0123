"""EAP-IG (inputs): the gradient of EAP averaged over runs between the corrupted and the clean embeddings.

    begin_k = e(corrupted) + k/m (e(clean) - e(corrupted)),  k = 0 .. m - 1

(Hanna et al. 2024, arXiv 2403.17806.) For links this is the path integral of gradient x value.
"""

from functools import partial

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.ablations import LinkAblation
from gossamer.circuits.scores.base import Score
from gossamer.circuits.scores.gradients import change, link_products, products
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
    """EAP-IG scores of all component edges, summed over the batch."""
    difference, clean, corrupted = change(model, batch, ablation, mean)
    scores = difference.new_zeros(())
    for begin in _beginnings(clean, corrupted, steps):
        scores = scores + products(model, batch, difference, begin=begin) / steps
    return scores


def link_scores(
    model: PreTrainedModel, batch: Batch, *, ablation: LinkAblation = "patch", steps: int = STEPS
) -> Float[Tensor, "prompts layers heads tokens tokens"]:
    """Gradient x value of every attention link, gradients averaged as for edges."""
    return link_products(model, batch, ablation, partial(_beginnings, steps=steps))


def _beginnings(clean: Tensor, corrupted: Tensor, steps: int) -> list[Tensor]:
    return [corrupted + step / steps * (clean - corrupted) for step in range(steps)]


EAP_IG_INPUTS = Score("eap-ig-inputs", edge_scores, links=link_scores)
