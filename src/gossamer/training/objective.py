"""The objective: the logarithm of the expected open fraction.

    f = sum of expected open links / sum of allowed links                           (weighting "links")
    f = mean over queries of (expected open links / allowed links)                  (weighting "queries")

The gradient of log f equals that of f / f0, where f0 is the value of f. A step may consist of several forward passes
and processes, and a mean of logarithms is not the logarithm of the mean. So f0 is the f of the whole previous step,
which makes f / f0 linear in what each pass counts: the result does not depend on how the step is divided.

Early queries of a block have few allowed links. "links" gives them little weight; "queries" weights each query equally,
and so also keeps prompts sparse that are much shorter than a block.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.models.attention import LinkCounts
from gossamer.training.settings import Weighting


def expected_open_fraction(counts: dict[int, LinkCounts], weighting: Weighting) -> Float[Tensor, ""]:
    """Compute f of a forward pass, differentiably.

    Args:
        counts: link counts by layer, from :func:`gossamer.counted_links`.
        weighting: whether every link or every query has the same weight.
    """
    if weighting == "links":
        expected = torch.stack([count.expected_open.sum() for count in counts.values()]).sum()
        return expected / torch.stack([count.allowed_links.sum() for count in counts.values()]).sum()
    shares = [count.expected_open / count.allowed_links.clamp(min=1) for count in counts.values()]
    queries = torch.stack([(count.allowed_links > 0).sum() for count in counts.values()]).sum()
    return torch.stack([share.sum() for share in shares]).sum() / queries
