"""A prediction under masks on its links, compared with the plain definition of the op."""

import pytest
import torch
from torch import Tensor

import gossamer
from circuit_cases import FAMILIES, model_of
from gossamer.circuits.link_masks import LinkMasks
from gossamer.circuits.mask_search import MaskRow
from gossamer.errors import GossamerError
from gossamer.explanations.prediction import Prediction
from plain_links import plainly

IDS = tuple(range(5, 14))
PREDICTION = Prediction(IDS, target=20)


def dense_mask(model, masks: LinkMasks, chosen: Tensor) -> Tensor:
    shape = (3, model.config.num_attention_heads, len(IDS), len(IDS))
    kept = torch.zeros(shape, dtype=torch.bool)
    kept[tuple(masks.links[chosen].T)] = True
    return kept


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_and_cut_are_what_the_definition_gives(family: str, gated: bool) -> None:
    model = model_of(family, gated).requires_grad_(False)
    masks = LinkMasks(model, PREDICTION)
    chosen = torch.rand(len(masks), generator=torch.Generator().manual_seed(0)) < 0.6
    kept, left = masks.kept([chosen]), masks.left_when_cut([chosen])
    everything = torch.ones(3, model.config.num_attention_heads, len(IDS), len(IDS), dtype=torch.bool)
    full, nothing = plainly(model, IDS, 20, everything), plainly(model, IDS, 20, ~everything)
    own = dense_mask(model, masks, chosen)
    assert masks.full == pytest.approx(full.item(), abs=1e-5)
    assert masks.nothing == pytest.approx(nothing.item(), abs=1e-5)
    for found, mask in ((kept, own), (left, ~own)):
        wanted = (plainly(model, IDS, 20, mask) - nothing) / (full - nothing)
        assert found.item() == pytest.approx(wanted.item(), abs=1e-4 + 1e-5 / abs(full - nothing).item())


@pytest.mark.parametrize("corrupted", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_out_positions_changes_nothing(
    family: str, gated: bool, corrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics and gradients for sets of few links, and without few links, as when every position is computed."""
    monkeypatch.setattr("gossamer.circuits.link_masks._NARROWED", 1.0)  # otherwise only where it saves enough
    model = model_of(family, gated).requires_grad_(False)
    other = (*IDS[:2], 30, *IDS[3:7], 31, IDS[8]) if corrupted else None
    masks, plain = LinkMasks(model, PREDICTION, other), LinkMasks(model, PREDICTION, other)
    plain._narrow = False
    generator = torch.Generator().manual_seed(0)
    for count in (0, 2, 12):
        chosen = torch.zeros(3, len(masks))
        for row in chosen:
            row[torch.randperm(len(masks), generator=generator)[:count]] = 1
        for others_kept in (False, True):
            found = []
            for each in (masks, plain):
                values = (1 - chosen if others_kept else chosen).requires_grad_()
                shares = each.shares([MaskRow(row, others_kept) for row in values])
                (gradient,) = torch.autograd.grad(shares.sum(), values, allow_unused=True)
                gradient = torch.zeros_like(values) if gradient is None else gradient
                found.append((shares.detach(), gradient * (chosen > 0)))
            # A gate within rounding of its threshold could open in one and not in the other; none is in these models.
            torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    assert masks._narrow


def test_a_gradient_that_is_asked_for_is_there() -> None:
    model = model_of("llama").requires_grad_(False)
    masks = LinkMasks(model, PREDICTION)
    none = torch.zeros(len(masks)).requires_grad_()
    few = torch.zeros(len(masks), dtype=torch.bool)
    few[-5:] = True
    (everywhere,) = torch.autograd.grad(masks.shares([MaskRow(none, False, torch.ones_like(few))]).sum(), none)
    (found,) = torch.autograd.grad(masks.shares([MaskRow(none, False, few)]).sum(), none)
    assert everywhere[few].abs().min() > 0
    torch.testing.assert_close(found[few], everywhere[few])


def test_links_are_the_open_ones() -> None:
    model = model_of("llama", gated=True)
    masks = LinkMasks(model.requires_grad_(False), PREDICTION)
    with gossamer.counted_links(model) as counts:
        model(input_ids=torch.tensor([IDS]), use_cache=False)
    assert len(masks) == sum(int(count.open_links.sum()) for count in counts.values())
    dense = LinkMasks(model_of("llama").requires_grad_(False), PREDICTION)
    assert len(dense) == 3 * 4 * len(IDS) * (len(IDS) + 1) // 2


def test_with_a_corrupted_prompt_cut_links_carry_its_values() -> None:
    model = model_of("llama", gated=True).requires_grad_(False)
    other = (*IDS[:4], 30, *IDS[5:])
    masks = LinkMasks(model, PREDICTION, other)
    none = torch.zeros(len(masks))
    # With every link cut, the heads at the last position in the first layer write what they write in the corrupted
    # run. If the corrupted prompt is the prompt itself, cutting changes nothing.
    with pytest.raises(GossamerError, match="does not depend on the links"):
        LinkMasks(model, PREDICTION, IDS)
    alone = LinkMasks(model, PREDICTION)
    assert masks.full == pytest.approx(alone.full)
    assert masks.metrics([MaskRow(none, False)]).item() == pytest.approx(masks.nothing)
    assert masks.nothing != pytest.approx(alone.nothing)
    with pytest.raises(GossamerError, match="--corrupted has 3 tokens and the prompt 9"):
        LinkMasks(model, PREDICTION, (1, 2, 3))


def test_gradients_are_those_of_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """They match finite differences, and do not change if attention is recomputed in the backward pass."""
    model = model_of("gemma2").requires_grad_(False)  # without gates: gradients ignore their steps
    masks = LinkMasks(model, PREDICTION)
    start = torch.rand(len(masks), generator=torch.Generator().manual_seed(1)).requires_grad_()
    (found,) = torch.autograd.grad(masks.metrics([MaskRow(start, True)]).sum(), start)
    step = 0.01
    for link in found.abs().topk(3).indices.tolist():
        moved = [
            start.detach().clone().index_add_(0, torch.tensor([link]), torch.tensor([sign * step])) for sign in (1, -1)
        ]
        up, down = masks.metrics([MaskRow(mask, True) for mask in moved]).tolist()
        assert found[link].item() == pytest.approx((up - down) / (2 * step), rel=0.02, abs=1e-4)
    monkeypatch.setattr("gossamer.circuits.link_masks._RECOMPUTED", 1)
    (again,) = torch.autograd.grad(masks.metrics([MaskRow(start, True)]).sum(), start)
    torch.testing.assert_close(again, found)
