"""Search for a small set of units that does a model's work: learn a hard mask, then remove units that are not needed.

    minimise   log sum over units of sigmoid(theta)
    subject to f(E) >= share                                  sufficient
               f(not E) <= 1 - share                          and, for a complete set, necessary

with E = {theta + n > 0}, n logistic noise, straight-through gradients, the weights frozen and a PI-controlled
multiplier for each constraint: the training objective of gossamer with masks instead of gates. theta is initialised
from the units' attribution, the gradient of f with respect to their masks along the path from no unit to all units.

1. Learn the mask, with several samples per pass. Some units have almost no gradient although f collapses without them.
   When a sample collapses, find the missing unit by bisection and keep it from then on.
2. Rank the units by theta and take the shortest prefix of the ranking that meets the constraints.
3. Remove units from this set, those with the smallest gradients first: many at once, then one by one, until none can
   be removed: without others, a unit may be needed no more. Before that, drop units from which no path leads to the
   prediction.
4. Repeat this once, with a fresh theta, among the units found and the highest-ranked ones only: attribution and
   gradients then refer to a model in which most other units are already cut.

Whether a set meets the constraints is always measured by running the model with hard masks. The units are the links of
one prompt (:mod:`gossamer.circuits.link_masks`), or the nodes or edges for a task
(:mod:`gossamer.circuits.task_masks`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STEPS = 40
"""Number of optimiser steps for the mask in each of two rounds."""

POOL = 3
"""The second round searches among this many times as many units as the first one found."""

OUTSIDE = 1_000.0
"""Subtracted from theta of the units outside the pool of a round."""

SAMPLES = 4
"""Mask samples per step; fewer if a pass cannot take that many rows."""

RATE = 0.3
"""Learning rate of Adam over the first 60 % of the steps; it then decays linearly to a tenth."""

PROPORTIONAL, INTEGRAL = 10.0, 0.5
"""PI gains of a multiplier, per unit violation of f."""

LEAST_MULTIPLIER, MOST_MULTIPLIER = 0.1, 50.0

COLLAPSED = 0.5
"""A sample that keeps less than this part of the share has collapsed."""

CERTAIN = 6.0
"""theta of the units without which samples collapsed."""

SLACK = 0.02
"""Margin to the constraints while the mask is learned; removing units afterwards uses it up."""

MOST_AT_ONCE, LEAST_AT_ONCE = 0.5, 0.03
"""Shares of the units that are removed at once, at first and at last."""

ONE_BY_ONE = 8
"""Number of units whose individual removal is tried in one pass."""

RESORTED = 0.9
"""Gradients are computed again when this share of the units is left."""

_PATH = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class MaskRow:
    """One mask in a pass over several.

    Attributes:
        mask: mask values of the units, between 0 (cut) and 1 (kept).
        others_kept: whether units without a mask are kept.
        graded: units whose gradient is needed besides that of units whose mask is not 0, or with ``others_kept`` not 1.
            All others may be left out.
    """

    mask: Float[Tensor, " units"]
    others_kept: bool
    graded: Bool[Tensor, " units"] | None = None


class Masks(Protocol):
    """Maskable units and the share of the metric that is left under masks on them."""

    def __len__(self) -> int:
        """Number of units with a mask."""
        ...

    @property
    def rows_with_gradients(self) -> int:
        """Approximate number of masks that :meth:`shares` takes at once."""
        ...

    def shares(self, rows: list[MaskRow]) -> Float[Tensor, " rows"]:
        """Return f under each mask, differentiable with respect to the masks; for a task, on some of its prompts."""
        ...

    def kept(self, sets: list[Bool[Tensor, " units"]]) -> Float[Tensor, " sets"]:
        """Return f(E) of some sets."""
        ...

    def left_when_cut(self, sets: list[Bool[Tensor, " units"]]) -> Float[Tensor, " sets"]:
        """Return f(not E) of some sets."""
        ...

    def reaching(self, chosen: Bool[Tensor, " units"]) -> Bool[Tensor, " units"]:
        """Return the chosen units from which a path of chosen units leads to the prediction."""
        ...


@dataclass(frozen=True)
class UnitSet:
    """A set of units and the measured metric with and without them.

    Attributes:
        chosen: which of the units that have a mask.
        kept: f(E), the share of the metric that is left when all other units are cut.
        left_when_cut: f(not E), the share that is left when the chosen units are cut.
    """

    chosen: Bool[Tensor, " units"]
    kept: float
    left_when_cut: float

    def __len__(self) -> int:
        return int(self.chosen.sum())


class MaskSearch:
    """Search for a small set of units that meets the constraints.

    Args:
        masks: masks of the units.
        share: share of the metric that the set must keep.
        complete: whether the set must also be necessary: at most 1 - share may be left without it.
        seed: seed of the noise.
        progress: called with the share of the work done and the size of the smallest set so far.

    Attributes:
        best: the smallest set so far that meets the constraints; all units at first.
        ranking: theta after learning; None before.
        finished: whether :meth:`run` came to its end.
    """

    def __init__(
        self,
        masks: Masks,
        *,
        share: float = 0.9,
        complete: bool = False,
        seed: int = 0,
        progress: Callable[[float, int], None] = lambda done, size: None,
    ) -> None:
        self.masks, self.share, self.complete, self.progress = masks, share, complete, progress
        self.seed, self.finished = seed, False
        self.generator = torch.Generator().manual_seed(seed)
        self.best: Bool[Tensor, " units"] = torch.ones(len(masks), dtype=torch.bool)
        self.ranking: Float[Tensor, " units"] | None = None
        self._round = 0

    def run(self) -> UnitSet:
        """Run the search; if interrupted, ``best`` holds the best set so far."""
        self._search_within(self.best)
        self._round = 1
        self._search_within(self._pool())
        self.finished = True
        return self.result()

    def _search_within(self, pool: Bool[Tensor, " units"]) -> None:
        """Search among the units of a pool that meets the constraints; keep the set if it is smaller than the best."""
        best, ranking = self.best, self.ranking
        try:
            self.best = pool
            learned = self.learn(pool)
            self._take_prefix(learned)
            self.remove()
            self.ranking = learned
        finally:
            if ranking is not None and len(self) >= int(best.sum()):
                self.best, self.ranking = best, ranking

    def _pool(self) -> Bool[Tensor, " units"]:
        """The units of the best set and several times as many that rank highest."""
        assert self.ranking is not None
        order, size, pool = self.ranking.argsort(descending=True, stable=True), len(self), self.best
        while size < len(self.masks):
            size = min(POOL * size, len(self.masks))
            pool = self.best.clone().index_fill_(0, order[:size], True)
            if self.accepts([pool])[0]:
                break
        return pool

    def result(self) -> UnitSet:
        """Measure the best set so far."""
        return UnitSet(self.best, self.masks.kept([self.best]).item(), self.masks.left_when_cut([self.best]).item())

    def at_share(self, share: float) -> UnitSet:
        """Find a set for another share, from the learned ranking and the set already found."""
        assert self.ranking is not None
        other = MaskSearch(self.masks, share=share, complete=self.complete)
        other.best = self.best if other.accepts([self.best])[0] else other.best
        other._take_prefix(self.ranking)
        other.remove()
        return other.result()

    def __len__(self) -> int:
        """Number of units of the best set so far."""
        return int(self.best.sum())

    def accepts(self, sets: list[Bool[Tensor, " units"]]) -> list[bool]:
        """Return for each set whether it meets the constraints."""
        inside = self.masks.kept(sets) >= self.share
        if self.complete and inside.any():
            sufficient = [each for each, one in zip(sets, inside.tolist(), strict=True) if one]
            inside[inside.clone()] = self.masks.left_when_cut(sufficient) <= 1 - self.share
        return inside.tolist()

    def attribution(self, pool: Bool[Tensor, " units"]) -> Float[Tensor, " units"]:
        """Mean absolute gradient of f with respect to each mask, along the path from no unit to all of the pool."""
        total = torch.zeros(len(self.masks))
        for weight in _PATH:
            mask = (weight * pool).requires_grad_()
            (gradient,) = torch.autograd.grad(self.masks.shares([MaskRow(mask, False)]).sum(), mask)
            total += gradient.abs().cpu() / len(_PATH)
        return total

    def learn(self, pool: Bool[Tensor, " units"]) -> Float[Tensor, " units"]:
        """Train the mask of the units in a pool and return theta; all other units are cut and rank below them."""
        theta = torch.full_like(pool, -OUTSIDE, dtype=torch.float) if self.ranking is None else self.ranking - OUTSIDE
        theta[pool] = _start(self.attribution(pool)[pool])
        theta.requires_grad_()
        optimizer = torch.optim.Adam([theta], betas=(0.8, 0.99))
        sides = 2 if self.complete else 1
        samples = max(1, min(SAMPLES, self.masks.rows_with_gradients // sides))
        multipliers = [_Multiplier() for _ in range(sides)]
        good, critical = pool, torch.zeros_like(pool)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, max(0.1, (1 - step / STEPS) / 0.4))
            masks = [self._sampled(theta) for _ in range(samples)]
            rows = [MaskRow(1 - each if cut else each, cut, pool) for each in masks for cut in (False, True)[:sides]]
            shares = self.masks.shares(rows).view(samples, sides)
            collapsed = shares[:, 0] < COLLAPSED * self.share
            for each in collapsed.nonzero()[:, 0].tolist():
                critical[self._critical((masks[each] > 0.5) | critical, good, theta)] = True
            if not collapsed.all():
                good = masks[int(collapsed.int().argmin())].detach() > 0.5
                means = shares[~collapsed].mean(0)
                violations = [self.share + SLACK - means[0], *(means[1:] - (1 - self.share - SLACK))]
                objective = theta.sigmoid().sum().log()
                for multiplier, violation in zip(multipliers, violations, strict=True):
                    objective = objective + multiplier.dual_step(violation.item()) * violation
                optimizer.zero_grad()
                objective.backward()
                optimizer.step()
            theta.data[critical] = CERTAIN
            self._show(0.7 * (step + 1) / STEPS, int((theta > 0).sum()))
        return theta.detach()

    @torch.no_grad()
    def _critical(
        self, collapsed: Bool[Tensor, " units"], good: Bool[Tensor, " units"], theta: Float[Tensor, " units"]
    ) -> Tensor:
        """Find by bisection the unit of a good set that brings a set back; none if the set has not collapsed."""
        missing = (good & ~collapsed).nonzero()[:, 0]
        missing = missing[theta[missing].argsort(descending=True)]
        few, many = 0, len(missing)
        if self.masks.kept([collapsed])[0] >= COLLAPSED * self.share:
            return missing[:0]
        while many - few > 1:
            middle = (few + many) // 2
            filled = collapsed.clone().index_fill_(0, missing[:middle], True)
            few, many = (few, middle) if self.masks.kept([filled])[0] >= COLLAPSED * self.share else (middle, many)
        return missing[few:many]

    def _sampled(self, theta: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
        noise = torch.logit(torch.rand(len(theta), generator=self.generator), eps=1e-6)
        soft = torch.sigmoid(theta + noise)
        return (soft > 0.5).float() + soft - soft.detach()

    def _take_prefix(self, ranking: Float[Tensor, " units"]) -> None:
        """Take the shortest acceptable prefix of the ranking as the best set, if it is smaller."""
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

    def remove(self) -> None:
        """Remove from the best set all units that the constraints do not need."""
        self._try([self.masks.reaching(self.best)])
        self._remove_shares()
        size = len(self) + 1
        while len(self) < size:
            size = len(self)
            self._remove_one_by_one()
        self._try([self.masks.reaching(self.best)])

    def _remove_shares(self) -> None:
        """Remove the same share of the units at a time, those with the smallest gradients; halve it when that fails."""
        share = MOST_AT_ONCE
        order = self._free(torch.zeros_like(self.best))
        while share >= LEAST_AT_ONCE and (count := int(len(order) * share)):
            self._show(0.7 + 0.1 * (1 - share / MOST_AT_ONCE), len(self))
            if self._try([self._without(order[:count])]):
                order = self._free(torch.zeros_like(self.best))
            else:
                share /= 2

    def _remove_one_by_one(self) -> None:
        """Try every unit alone, those with the smallest gradients first."""
        needed = torch.zeros_like(self.best)
        order, sorted_at = self._free(needed), len(self)
        while len(order):
            self._show(0.8 + 0.2 * float(needed.sum() / self.best.sum()), len(self))
            some = order[:ONE_BY_ONE]
            accepted = torch.tensor(self.accepts([self._without(unit) for unit in some]))
            needed[some[~accepted]] = True
            together = some[accepted]
            while len(together) and not self._try([self._without(together)]):
                together = together[: len(together) // 2]
            if len(self) < RESORTED * sorted_at:
                order, sorted_at = self._free(needed), len(self)
            else:
                order = order[(self.best & ~needed)[order]]

    def _free(self, needed: Bool[Tensor, " units"]) -> Int[Tensor, " free"]:
        """The units of the best set that are not known to be needed, those with the smallest gradients first."""
        free = (self.best & ~needed).nonzero()[:, 0]
        return free[self.gradients()[free].argsort()] if len(free) else free

    def _show(self, done: float, size: int) -> None:
        self.progress((self._round + done) / 2, size)

    def _without(self, units: Tensor) -> Bool[Tensor, " units"]:
        return self.best.clone().index_fill_(0, units.reshape(-1), False)

    def _try(self, sets: list[Bool[Tensor, " units"]]) -> bool:
        """Take the first acceptable set as the best; return whether there is one."""
        accepted = self.accepts(sets)
        if not any(accepted):
            return False
        self.best = sets[accepted.index(True)]
        return True

    def gradients(self) -> Float[Tensor, " units"]:
        """Absolute gradients of f(E) at the best set; for a complete set, the maximum of those of f(E) and f(not E)."""
        mask = self.best.float().requires_grad_()
        rows = [MaskRow(mask, False), *([MaskRow(1 - mask, True)] if self.complete else [])]
        found = torch.zeros(len(mask))
        for row in rows:  # one at a time: half the memory
            (gradient,) = torch.autograd.grad(self.masks.shares([row]).sum(), mask, retain_graph=True)
            found = torch.maximum(found, gradient.abs().cpu())
        return found


class _Multiplier:
    """PI controller for the multiplier of one constraint."""

    def __init__(self) -> None:
        self.integral = 1.0

    def dual_step(self, violation: float) -> float:
        """Update with a measured violation and return the multiplier."""
        clipped = max(-0.3, min(violation, 1.0))
        self.integral = min(max(self.integral + INTEGRAL * clipped, LEAST_MULTIPLIER), MOST_MULTIPLIER)
        return max(self.integral + PROPORTIONAL * clipped, LEAST_MULTIPLIER)


def _start(attribution: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Initial theta between -1 and 3, increasing with the attribution; the top fifth starts at 1 or above."""
    count = max(1, len(attribution) // 5)
    middle = attribution.topk(count).values[-1].clamp(min=1e-12)
    return (1 + 0.5 * (attribution.clamp(min=1e-12) / middle).log()).clamp(-1.0, 3.0)


def overlap(sets: list[UnitSet]) -> float | None:
    """Mean Jaccard index over all pairs of sets; None for fewer than two sets."""
    pairs = [(a.chosen, b.chosen) for at, a in enumerate(sets) for b in sets[at + 1 :]]
    if not pairs:
        return None
    return sum(float((a & b).sum() / (a | b).sum().clamp(min=1)) for a, b in pairs) / len(pairs)
