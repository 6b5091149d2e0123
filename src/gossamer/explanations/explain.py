"""Explain one prediction: find the links that carry it, check them by running the model, and find why each is open.

1. Search for a set of links with every seed. The smallest set is the explanation; its overlap with the others is
   reported.
2. Grow or shrink it for other shares of the metric. Where this finds a smaller set for a higher share, use that.
3. Analyse its strongest links one by one: weight, gate, what they write, what is lost without them, and why they are
   open.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.circuits.link_masks import LinkMasks
from gossamer.circuits.mask_search import MaskSearch, UnitSet, overlap
from gossamer.circuits.streams import graph_of
from gossamer.explanations.config import ExplainConfig, Kind
from gossamer.explanations.effects import LinkEffect, link_effects
from gossamer.explanations.prediction import Prediction, predict, prompt_tokens
from gossamer.explanations.reasons import GateSplitter, Reason, require_sums
from gossamer.models.frozen import frozen

MOST_DETAILED = 60
"""Number of links of a set, the strongest ones, that are analysed one by one."""

Progress = Callable[[str, float, int], None]
"""Called with the current step, the share of it that is done, and the size of the smallest set so far."""


@dataclass(frozen=True)
class ExplainedLink:
    """One link of the explanation.

    Attributes:
        link: layer, head, query position, key position.
        effect: its effect.
        reason: why it is open, or in a dense model what its attention logit consists of.
        found_by: share of the seeds whose set contains it.
    """

    link: tuple[int, int, int, int]
    effect: LinkEffect
    reason: Reason
    found_by: float


@dataclass(frozen=True)
class Explanation:
    """The links that carry one prediction of one model.

    Attributes:
        prediction: the prompt, the target, and the token that the target is compared with.
        corrupted: the tokens whose values cut links carry; None if cut links carry nothing.
        kind: ``sufficient``, or ``complete``: sufficient and necessary.
        share: share of the metric that the sets have to keep.
        full, nothing: the metric with every link and with none.
        candidates: number of links of the model on this prompt: the open ones, or all in a dense model.
        links: ``[candidates, 4]``, all candidates: layer, head, query, key.
        seeds: the seeds of the sets.
        sets: the set of each seed, smallest first; the first is the explanation.
        by_share: the explanation, and sets from the same seed for other shares of the metric.
        details: the strongest links of the first set, strongest first.
    """

    prediction: Prediction
    corrupted: tuple[int, ...] | None
    kind: Kind
    share: float
    full: float
    nothing: float
    candidates: int
    links: Int[Tensor, "candidates 4"]
    seeds: tuple[int, ...]
    sets: tuple[UnitSet, ...]
    by_share: dict[float, UnitSet]
    details: tuple[ExplainedLink, ...]

    @property
    def overlap(self) -> float | None:
        """Mean Jaccard index of the seeds' sets; None for one seed."""
        return overlap(list(self.sets))

    def found_by(self) -> Float[Tensor, " candidates"]:
        """For each link, the share of the seeds whose set contains it."""
        return torch.stack([each.chosen.float() for each in self.sets]).mean(0)


def explain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    target: str | None = None,
    against: str | None = None,
    corrupted: str | None = None,
    config: ExplainConfig | None = None,
    progress: Progress = lambda what, done, size: None,
) -> Explanation:
    """Find the attention links that carry the prediction after a prompt.

    Args:
        model: dense or gated, of a supported family.
        tokenizer: of the model.
        prompt: text.
        target: text of the token whose prediction is explained; the model's most likely token if None.
        against: text of another token. If given, the metric is the logit difference; otherwise log p(target).
        corrupted: a prompt of the same length in tokens, whose values cut links then carry instead of nothing.
        config: what the set of links has to achieve. None uses the defaults: sufficient, 90 % of the metric, two seeds.
        progress: called to report progress. A KeyboardInterrupt in it, or anywhere in the search, ends the search with
            the best set so far.

    Raises:
        GossamerError: if the prompt or target cannot be explained, or the model cannot be decomposed.
    """
    graph_of(model)
    with frozen(model):
        prediction = predict(model, tokenizer, prompt, target=target, against=against)
        other = None if corrupted is None else prompt_tokens(model, tokenizer, corrupted, "the corrupted prompt")
    return explain_prediction(model, prediction, corrupted=other, config=config, progress=progress)


def explain_prediction(
    model: PreTrainedModel,
    prediction: Prediction,
    *,
    corrupted: tuple[int, ...] | None = None,
    config: ExplainConfig | None = None,
    progress: Progress = lambda what, done, size: None,
) -> Explanation:
    """Like :func:`explain`, for a prediction that is already tokenised."""
    graph_of(model)
    require_sums(model)
    config = config or ExplainConfig()
    kind, seeds = config.links or "sufficient", range(config.seed, config.seed + config.seeds)
    with frozen(model):
        masks = LinkMasks(model, prediction, corrupted)
        searches: list[MaskSearch] = []
        by_share: dict[float, UnitSet] = {}
        try:
            for at, seed in enumerate(seeds):
                what = partial(progress, f"seed {at + 1} of {len(seeds)}")
                search = MaskSearch(masks, share=config.share, complete=kind == "complete", seed=seed, progress=what)
                searches.append(search)
                search.run()
            searches.sort(key=len)
            _find_other_shares(searches[0], config.shares, by_share, progress)
        except KeyboardInterrupt:
            searches = sorted((each for each in searches if each.finished), key=len) or searches
        sets = [each.result() for each in searches]
        by_share = dict(sorted({**by_share, config.share: sets[0]}.items()))
        details = _details(model, masks, sets, progress)
        return Explanation(
            prediction, corrupted, kind, config.share, masks.full, masks.nothing, len(masks), masks.links.cpu(),
            tuple(each.seed for each in searches), tuple(sets), by_share, details,
        )  # fmt: skip


def _find_other_shares(
    search: MaskSearch, shares: Sequence[float], by_share: dict[float, UnitSet], progress: Progress
) -> None:
    """Fill ``by_share``, highest shares first; a set of a higher share that is smaller replaces that of the search."""
    for share in sorted(set(shares) - {search.share}, reverse=True):
        progress(f"{share:.0%} of the metric", 0.0, len(search))
        by_share[share] = search.at_share(share)
        if share > search.share and len(by_share[share]) < len(search):
            search.best = by_share[share].chosen
            search.remove()


def _details(
    model: PreTrainedModel, masks: LinkMasks, sets: list[UnitSet], progress: Progress
) -> tuple[ExplainedLink, ...]:
    progress("why the links are open", 0.0, len(sets[0]))
    search = MaskSearch(masks)
    search.best = sets[0].chosen
    strength = search.gradients().masked_fill(~sets[0].chosen, -1.0)
    places = strength.topk(min(MOST_DETAILED, len(sets[0]))).indices
    effects = link_effects(masks, sets[0].chosen, places)
    links = [(layer, head, query, key) for layer, head, query, key in masks.links.cpu()[places].tolist()]
    reasons = GateSplitter(model, masks.prompt.ids).explain(links)
    votes = torch.stack([each.chosen.float() for each in sets]).mean(0)[places].tolist()
    found = [ExplainedLink(*each) for each in zip(links, effects, reasons, votes, strict=True)]
    return tuple(sorted(found, key=lambda each: -abs(each.effect.in_set)))
