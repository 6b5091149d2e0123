"""What is minimised: the logarithm of the expected open fraction.

    f = sum over queries of the expected open links / sum of the allowed ones       (weighting "links")
    f = mean over queries of (expected open links / allowed links)                  (weighting "queries")

The gradient of log f is that of f / f0 with f0 the value of f. A step's batch may be spread over forward passes and
processes, and the mean of logarithms is not the logarithm of the mean: so f0 is the whole step's f, that of the step
before, and f / f0 is linear in what each pass counts. However a step is divided, it is the same step.

Early queries of a block have few allowed links. "links" hardly counts them; "queries" counts each query alike, and
with it what is open on prompts much shorter than a block.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.models.attention import LinkCounts
from gossamer.training.settings import Weighting


def expected_open_fraction(counts: dict[int, LinkCounts], weighting: Weighting) -> Float[Tensor, ""]:
    """f of a forward pass, differentiable.

    Args:
        counts: by layer, as :func:`gossamer.counted_links` gives them.
        weighting: whether every link or every query counts alike.
    """
    if weighting == "links":
        expected = torch.stack([count.expected_open.sum() for count in counts.values()]).sum()
        return expected / torch.stack([count.allowed_links.sum() for count in counts.values()]).sum()
    shares = [count.expected_open / count.allowed_links.clamp(min=1) for count in counts.values()]
    queries = torch.stack([(count.allowed_links > 0).sum() for count in counts.values()]).sum()
    return torch.stack([share.sum() for share in shares]).sum() / queries
