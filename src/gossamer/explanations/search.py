"""A small set of links that explains a prediction: a learned hard mask, then what can be left out is left out.

    minimise   log sum over links of sigmoid(theta)
    subject to f(E) >= share                                  sufficient
               f(not E) <= 1 - share                          and, for a complete set, necessary

with E = {theta + n > 0}, n logistic noise, straight-through gradients, the weights frozen and a PI-controlled
multiplier for each constraint: the training objective of gossamer on one prompt. theta starts from the links'
attribution, the gradient of f by their masks along the path from no link to all of them.

1. The mask is learned, several samples of it in each pass.
2. The links are ranked by theta; the shortest beginning of the ranking that meets the constraints is taken.
3. From it links are removed, those with the smallest gradients first and many at once, then one by one, until none can
   be removed. Links from which no path leads to the prediction go first.

Whether a set meets the constraints is always measured by running the model with hard masks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.explanations.link_masks import LinkMasks, MaskRow

STEPS = 80
"""Of the mask's optimiser."""

SAMPLES = 4
"""Of the mask, in each step, where the prompt is short."""

RATE = 0.3
"""Of Adam, over the first 60 % of the steps; then it falls to a tenth."""

PROPORTIONAL, INTEGRAL = 10.0, 0.5
"""Parts of a multiplier, for a violation of f by 1."""

LEAST_MULTIPLIER, MOST_MULTIPLIER = 0.1, 50.0

SLACK = 0.02
"""How far inside the constraints the mask is learned: what is removed afterwards uses it up."""

REMOVED_AT_ONCE = (0.5, 0.3, 0.15, 0.07, 0.03)
"""Shares of the set whose removal is tried in one pass."""

ONE_BY_ONE = 8
"""Links whose removal is tried each for itself in one pass."""

_GRADED_TOKENS = 256
"""Rows times tokens in one pass with gradients."""

_PATH = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class LinkSet:
    """Links and what running the model with and without them gives.

    Attributes:
        chosen: which of the links that have a mask.
        kept: f(E), the share of the metric that is left when all others are cut.
        left_when_cut: f(not E), the share that is left when these are cut.
    """

    chosen: Bool[Tensor, " links"]
    kept: float
    left_when_cut: float

    def __len__(self) -> int:
        return int(self.chosen.sum())


class LinkSearch:
    """The search for a set of links of one prediction.

    Args:
        masks: the prediction.
        share: of the metric that the set has to keep.
        complete: whether the set has to be necessary too: at most 1 - share may be left without it.
        seed: of the noise.
        progress: called with the share of the work done and the size of the smallest set so far.

    Attributes:
        best: the smallest set so far that meets the constraints; all links at first.
    """

    def __init__(
        self,
        masks: LinkMasks,
        *,
        share: float = 0.9,
        complete: bool = False,
        seed: int = 0,
        progress: Callable[[float, int], None] = lambda done, size: None,
    ) -> None:
        self.masks, self.share, self.complete, self.progress = masks, share, complete, progress
        self.generator = torch.Generator().manual_seed(seed)
        self.best: Bool[Tensor, " links"] = torch.ones(len(masks), dtype=torch.bool)
        self.ranking: Float[Tensor, " links"] | None = None

    def run(self) -> LinkSet:
        """Search; an interrupted search leaves the best set so far in ``best``."""
        self.ranking = self.learn()
        self._take_prefix(self.ranking)
        self.remove_links()
        return self.result()

    def result(self) -> LinkSet:
        """The best set so far, measured."""
        kept, left = self.masks.evaluate([self.best])
        return LinkSet(self.best, kept.item(), left.item())

    def at_share(self, share: float) -> LinkSet:
        """The set for another share, from the ranking that was learned and the set that was found."""
        assert self.ranking is not None
        other = LinkSearch(self.masks, share=share, complete=self.complete)
        other.best = self.best if other.accepts([self.best])[0] else other.best
        other._take_prefix(self.ranking)
        other.remove_links()
        return other.result()

    def accepts(self, sets: list[Bool[Tensor, " links"]]) -> list[bool]:
        """Which of some sets meet the constraints."""
        kept, left = self.masks.evaluate(sets, cut=self.complete)
        inside = kept >= self.share
        return (inside & (left <= 1 - self.share) if self.complete else inside).tolist()

    def attribution(self) -> Float[Tensor, " links"]:
        """The mean size of the gradient of f by each link's mask, along the path from no link to all of them."""
        total = torch.zeros(len(self.masks))
        for weight in _PATH:
            mask = torch.full_like(total, weight).requires_grad_()
            (gradient,) = torch.autograd.grad(self.masks.share(self.masks.metrics([MaskRow(mask, False)])).sum(), mask)
            total += gradient.abs().cpu() / len(_PATH)
        return total

    def learn(self) -> Float[Tensor, " links"]:
        """theta after training."""
        theta = _start(self.attribution()).requires_grad_()
        optimizer = torch.optim.Adam([theta], betas=(0.8, 0.99))
        sides = 2 if self.complete else 1
        samples = max(1, min(SAMPLES, _GRADED_TOKENS // (sides * len(self.masks.prediction.ids))))
        multipliers = [_Multiplier() for _ in range(sides)]
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, max(0.1, (1 - step / STEPS) / 0.4))
            rows = []
            for _ in range(samples):
                mask = self._sampled(theta)
                rows.append(MaskRow(mask, False))
                rows += [MaskRow(1 - mask, True)] if self.complete else []
            shares = self.masks.share(self.masks.metrics(rows)).view(samples, sides).mean(0)
            violations = [self.share + SLACK - shares[0], *(shares[1:] - (1 - self.share - SLACK))]
            objective = theta.sigmoid().sum().log()
            for multiplier, violation in zip(multipliers, violations, strict=True):
                objective = objective + multiplier.dual_step(violation.item()) * violation
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
            self.progress(0.7 * (step + 1) / STEPS, int((theta > 0).sum()))
        return theta.detach()

    def _sampled(self, theta: Float[Tensor, " links"]) -> Float[Tensor, " links"]:
        noise = torch.logit(torch.rand(len(theta), generator=self.generator), eps=1e-6)
        soft = torch.sigmoid(theta + noise)
        return (soft > 0.5).float() + soft - soft.detach()

    def _take_prefix(self, ranking: Float[Tensor, " links"]) -> None:
        """Make the shortest acceptable beginning of the ranking the best set, if it is smaller."""
        order = ranking.argsort(descending=True, stable=True)
        most, likely = int(self.best.sum()), max(1, int((ranking > 0).sum()))
        sizes = sorted({min(most, max(1, round(likely * 2 ** (step / 2)))) for step in range(-6, 10)})
        sets = [torch.zeros_like(self.best).index_fill_(0, order[:size], True) for size in sizes]
        for first in range(0, len(sets), 4):
            some = sets[first : first + 4]
            accepted = self.accepts(some)
            if any(accepted):
                self.best = min(some[accepted.index(True)], self.best, key=lambda each: int(each.sum()))
                return

    def remove_links(self) -> None:
        """Remove from the best set whatever the constraints do not need."""
        start = len(self.best.nonzero())
        self._try([self.best & self.reaching()])
        needed = torch.zeros_like(self.best)
        while len(free := (self.best & ~needed).nonzero()[:, 0]):
            left = math.log(len(free) + 1) / math.log(start + 1)
            self.progress(1 - 0.3 * left, int(self.best.sum()))
            order = free[self.gradients()[free].argsort()]
            counts = sorted({max(1, int(len(order) * share)) for share in REMOVED_AT_ONCE}, reverse=True)
            if self._try([self._without(order[:count]) for count in counts]):
                continue
            single = order[:ONE_BY_ONE]
            accepted = torch.tensor(self.accepts([self._without(link) for link in single]))
            needed[single[~accepted]] = True
            together = single[accepted]
            while len(together) and not self._try([self._without(together)]):
                together = together[: len(together) // 2]
        self._try([self.best & self.reaching()])

    def _without(self, links: Tensor) -> Bool[Tensor, " links"]:
        return self.best.clone().index_fill_(0, links.reshape(-1), False)

    def _try(self, sets: list[Bool[Tensor, " links"]]) -> bool:
        """Make the first acceptable set the best."""
        accepted = self.accepts(sets)
        if not any(accepted):
            return False
        self.best = sets[accepted.index(True)]
        return True

    def gradients(self) -> Float[Tensor, " links"]:
        """The size of the gradients of f(E), and of f(not E) for a complete set, at the best set: the larger one."""
        mask = self.best.float().requires_grad_()
        rows = [MaskRow(mask, False), *([MaskRow(1 - mask, True)] if self.complete else [])]
        found = torch.zeros(len(mask))
        for row in rows:  # one after the other: half the memory
            share = self.masks.share(self.masks.metrics([row])).sum()
            (gradient,) = torch.autograd.grad(share, mask, retain_graph=True)
            found = torch.maximum(found, gradient.abs().cpu())
        return found

    def reaching(self) -> Bool[Tensor, " links"]:
        """Links of the best set from which a path leads to the last position's prediction."""
        links = self.masks.links.cpu()
        tokens = len(self.masks.prediction.ids)
        read = torch.zeros(tokens, dtype=torch.bool)
        read[-1] = True
        reaching = torch.zeros_like(self.best)
        for layer in range(int(links[:, 0].max()), -1, -1):
            own = self.best & (links[:, 0] == layer) & read[links[:, 2]]
            reaching |= own
            read[links[own, 3]] = True
        return reaching


class _Multiplier:
    """PI control of one constraint's weight."""

    def __init__(self) -> None:
        self.integral = 1.0

    def dual_step(self, violation: float) -> float:
        """The multiplier for a violation just measured."""
        clipped = max(-0.3, min(violation, 1.0))
        self.integral = min(max(self.integral + INTEGRAL * clipped, LEAST_MULTIPLIER), MOST_MULTIPLIER)
        return max(self.integral + PROPORTIONAL * clipped, LEAST_MULTIPLIER)


def _start(attribution: Float[Tensor, " links"]) -> Float[Tensor, " links"]:
    """theta between -1 and 3, the higher the larger the attribution; the upper fifth is above 1."""
    count = max(1, len(attribution) // 5)
    middle = attribution.topk(count).values[-1].clamp(min=1e-12)
    return (1 + 0.5 * (attribution.clamp(min=1e-12) / middle).log()).clamp(-1.0, 3.0)


def overlap(sets: list[LinkSet]) -> float | None:
    """The mean Jaccard index of all pairs of sets; None for fewer than two."""
    pairs = [(a.chosen, b.chosen) for at, a in enumerate(sets) for b in sets[at + 1 :]]
    if not pairs:
        return None
    return sum(float((a & b).sum() / (a | b).sum().clamp(min=1)) for a, b in pairs) / len(pairs)
