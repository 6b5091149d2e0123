"""Learned hard masks: search for small sets of units, of nodes or edges for all prompts of a task, of links for each.

The method is :mod:`gossamer.circuits.mask_search`, whose objective is gossamer's training objective with masks instead
of gates. Edge pruning learned masks on edges before (Bhaskar et al. 2024, arXiv 2406.16778).

A sufficient set keeps nine tenths of the metric when all other units are replaced. A complete set is also necessary: at
most one tenth is left when the set itself is replaced.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.ablations import LinkAblation
from gossamer.circuits.link_masks import LinkMasks
from gossamer.circuits.mask_search import MaskSearch, UnitSet
from gossamer.circuits.metrics import EXPLAINED
from gossamer.circuits.scores.base import Score
from gossamer.circuits.task_masks import TaskMasks, Units
from gossamer.circuits.tasks.base import Batch
from gossamer.errors import GossamerError
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
    scores = _scores(search, found)
    if units == "edges":
        return masks.scattered(scores), found
    return torch.cat([3 * scores.min()[None], scores]), found  # the input first


def search_links(
    model: PreTrainedModel,
    batch: Batch,
    *,
    complete: bool,
    ablation: LinkAblation,
    progress: Callable[[str], None],
) -> tuple[Float[Tensor, "prompts layers heads tokens tokens"], tuple[UnitSet, ...]]:
    """Search for a set of links of each prompt; return negative scores that rank its links first, and the sets.

    Args:
        complete: whether the sets must also be necessary.

    Raises:
        GossamerError: if cutting every link of a prompt does not change its metric.
    """
    sets: list[UnitSet] = []
    tokens = batch.clean.shape[1]
    shape = model.config.num_hidden_layers, model.config.num_attention_heads, tokens, tokens
    scores = torch.zeros(len(batch.clean), *shape)
    for at, (clean, corrupted) in enumerate(zip(batch.clean.tolist(), batch.corrupted.tolist(), strict=True)):

        def show(done: float, size: int, prompt: str = f"prompt {at + 1} of {len(batch.clean)}") -> None:
            progress(f"mask on links, {prompt}: {100 * done:.0f} %, smallest set {size:,}")

        with frozen(model):
            prompt = _TaskPrompt(tuple(clean), batch.rows(slice(at, at + 1)))
            try:
                masks = LinkMasks(model, prompt, tuple(corrupted) if ablation == "patch" else None)
            except GossamerError as error:
                raise GossamerError(f"prompt {at + 1} of {len(batch.clean)} with {tokens} tokens: {error}") from error
            search = MaskSearch(masks, share=EXPLAINED, complete=complete, progress=show)
            sets.append(search.run())
        scores[at][tuple(masks.links.T)] = _scores(search, sets[-1])
    return scores, tuple(sets)


@dataclass(frozen=True)
class _TaskPrompt:
    """One prompt of a task, with the task's metric."""

    ids: tuple[int, ...]
    batch: Batch

    @property
    def metric_name(self) -> str:
        return self.batch.metric.replace("_", " ")

    def metric(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
        return torch.cat([self.batch.measure(row[None]) for row in logits])


def _scores(search: MaskSearch, found: UnitSet) -> Float[Tensor, " units"]:
    """Negative scores: lowest for the units of the set, each part ordered by theta."""
    assert search.ranking is not None
    ranks = search.ranking - search.ranking.min() + 1
    return -(ranks + ranks.max() * found.chosen)


LEARNED_MASK = Score(
    "learned-mask", search=partial(search_set, complete=False), link_search=partial(search_links, complete=False)
)
LEARNED_MASK_COMPLETE = Score(
    "learned-mask-complete", search=partial(search_set, complete=True), link_search=partial(search_links, complete=True)
)
