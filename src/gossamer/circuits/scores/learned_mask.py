"""Learned hard masks: search for one small set of nodes or edges on all prompts of a task.

The method is :mod:`gossamer.circuits.mask_search`, whose objective is gossamer's training objective with masks instead
of gates. Edge pruning learned masks on edges before (Bhaskar et al. 2024, arXiv 2406.16778).

A sufficient set keeps nine tenths of the metric when all other units are replaced. A complete set is also necessary: at
most one tenth is left when the set itself is replaced.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.mask_search import MaskSearch, UnitSet
from gossamer.circuits.metrics import EXPLAINED
from gossamer.circuits.scores.base import Score
from gossamer.circuits.task_masks import TaskMasks, Units
from gossamer.circuits.tasks.base import Batch
from gossamer.models.frozen import frozen


def search_set(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    units: Units,
    *,
    complete: bool,
    ablation: str,
    means: Mapping[int, Tensor],
    progress: Callable[[str], None],
) -> tuple[Tensor, UnitSet]:
    """Search for a set; return negative scores that rank its units first, each part ordered by theta, and the set.

    Args:
        complete: whether the set must also be necessary.
    """

    def show(done: float, size: int) -> None:
        progress(f"mask on {units}: {100 * done:.0f} %, smallest set {size:,}")

    with frozen(model):
        masks = TaskMasks(model, batches, units, ablation, means)
        search = MaskSearch(masks, share=EXPLAINED, complete=complete, progress=show)
        found = search.run()
    assert search.ranking is not None
    ranks = search.ranking - search.ranking.min() + 1
    scores = -(ranks + ranks.max() * found.chosen)
    if units == "edges":
        return masks.scattered(scores), found
    return torch.cat([3 * scores.min()[None], scores]), found  # the input first


LEARNED_MASK = Score("learned-mask", search=partial(search_set, complete=False))
LEARNED_MASK_COMPLETE = Score("learned-mask-complete", search=partial(search_set, complete=True))
