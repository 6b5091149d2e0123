"""The search on units whose share of the metric is a formula."""

import pytest
import torch
from torch import Tensor

from gossamer.circuits import mask_search
from gossamer.circuits.mask_search import MaskRow, MaskSearch

UNITS, USEFUL, SWITCHES = 200, 10, 3


class SwitchedMasks:
    """f: the mean mask of the useful units, times a switch for each of three units.

    A switch is a steep function of its unit's mask, as where a norm saturates: cutting the unit leaves nothing, and the
    gradient at mask 1 is almost 0.
    """

    rows_with_gradients = 8

    def __len__(self) -> int:
        return UNITS

    def shares(self, rows: list[MaskRow]) -> Tensor:
        masks = torch.stack([row.mask for row in rows])
        switches = torch.sigmoid(40 * (masks[:, -SWITCHES:] - 0.4)).prod(1)
        return switches * masks[:, :USEFUL].mean(1)

    def kept(self, sets: list[Tensor]) -> Tensor:
        return self.shares([MaskRow(each.float(), False) for each in sets])

    def left_when_cut(self, sets: list[Tensor]) -> Tensor:
        return self.kept([~each for each in sets])

    def reaching(self, chosen: Tensor) -> Tensor:
        return chosen


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_units_without_which_all_is_lost_are_kept_although_their_gradient_is_zero(complete: bool, seed: int) -> None:
    masks = SwitchedMasks()
    search = MaskSearch(masks, share=0.9, complete=complete, seed=seed)
    learned = search.learn(search.best) > 0
    assert learned[-SWITCHES:].all()
    assert masks.kept([learned]).item() > 0.8
    found = MaskSearch(masks, share=0.9, complete=complete, seed=seed).run()
    assert len(found) == USEFUL - 1 + SWITCHES
    assert found.chosen[-SWITCHES:].all()
    assert found.kept == pytest.approx(0.9, abs=1e-3)
    assert found.left_when_cut == pytest.approx(0.0, abs=1e-3)


class PartlyMeasured(SwitchedMasks):
    """``shares`` sees prompts of low metric only, as it may for a task: any sample seems to have collapsed."""

    def shares(self, rows: list[MaskRow]) -> Tensor:
        return 0.4 * super().shares(rows)

    def kept(self, sets: list[Tensor]) -> Tensor:
        return super().shares([MaskRow(each.float(), False) for each in sets])


def test_no_unit_is_critical_unless_all_prompts_say_so() -> None:
    search = MaskSearch(PartlyMeasured())
    good, theta = torch.ones(UNITS, dtype=torch.bool), torch.linspace(-1, 1, UNITS)
    harmless, bad = good.clone(), good.clone()
    harmless[20:40], bad[[20, 30, UNITS - 1, 40]] = False, False
    shares = search.masks.shares([MaskRow(each.float(), False) for each in (harmless, bad)])
    assert (shares < mask_search.COLLAPSED * search.share).all()
    assert search._critical(harmless, good, theta).tolist() == []
    assert search._critical(bad, good, theta).tolist() == [UNITS - 1]


def test_without_bisection_samples_collapse_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could not fail."""
    monkeypatch.setattr(mask_search, "COLLAPSED", -1.0)
    searches = [MaskSearch(SwitchedMasks(), seed=seed) for seed in range(5)]
    kept = [SwitchedMasks().kept([each.learn(each.best) > 0]).item() for each in searches]
    assert min(kept) < 0.1


def test_learning_within_a_pool_cuts_all_other_units_and_ranks_them_below() -> None:
    search = MaskSearch(SwitchedMasks())
    first = search.learn(search.best)
    search.ranking = first
    pool = torch.zeros(UNITS, dtype=torch.bool).index_fill_(0, first.argsort(descending=True)[:40], True)
    second = search.learn(pool)
    assert second[pool].min() > second[~pool].max()
    assert torch.equal(second[~pool].argsort(), first[~pool].argsort())
    assert not search._sampled(second)[~pool].any()


class HarmfulMasks(SwitchedMasks):
    """f: 0.1 for each useful unit, and 0.03; unit -2 adds 0.02, unit -1 takes 0.04 away."""

    def __len__(self) -> int:
        return USEFUL + 2

    def shares(self, rows: list[MaskRow]) -> Tensor:
        masks = torch.stack([row.mask for row in rows])
        return 0.03 + 0.1 * masks[:, :USEFUL].sum(1) + 0.02 * masks[:, -2] - 0.04 * masks[:, -1]


def test_a_unit_that_was_needed_goes_once_a_harmful_one_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_search, "LEAST_AT_ONCE", 1.0)  # one by one only
    search = MaskSearch(HarmfulMasks(), share=0.9)
    search.best = torch.ones(USEFUL + 2, dtype=torch.bool)
    search.best[0] = False
    tried = search._without(torch.tensor([USEFUL]))
    assert search.accepts([search.best, tried]) == [True, False]  # without unit -2 alone, too little is left
    search.remove()
    assert search.best.nonzero()[:, 0].tolist() == list(range(1, USEFUL))
