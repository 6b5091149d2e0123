"""Edge attribution patching, with gradients on the clean run (Syed et al. 2023, arXiv 2310.10348; signs as in EAP-IG).

score(u -> v) = sum over batch and positions of (a_u(corrupted) - a_u(clean)) . dm/din_v
"""

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.ablations import LinkAblation
from gossamer.circuits.scores.base import Score
from gossamer.circuits.scores.gradients import link_products, products_of_clean_run
from gossamer.circuits.tasks.base import Batch


def edge_scores(
    model: PreTrainedModel,
    batch: Batch,
    *,
    ablation: str = "patch",
    mean: Float[Tensor, "sources tokens d_model"] | None = None,
) -> Float[Tensor, "sources destinations"]:
    """EAP scores of all component edges, summed over the batch."""
    return products_of_clean_run(model, batch, ablation, mean)


def link_scores(
    model: PreTrainedModel, batch: Batch, *, ablation: LinkAblation = "patch"
) -> Float[Tensor, "prompts layers heads tokens tokens"]:
    """Gradient x value of every attention link, gradients on the clean run."""
    return link_products(model, batch, ablation)


EAP = Score("eap", edge_scores, links=link_scores)
