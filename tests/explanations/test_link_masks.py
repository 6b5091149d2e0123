"""A prediction under masks on its links, against the definition of the op alone."""

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import gossamer
from circuit_cases import FAMILIES, model_of
from gossamer.errors import GossamerError
from gossamer.explanations.link_masks import LinkMasks, MaskRow
from gossamer.explanations.prediction import Prediction

IDS = tuple(range(5, 14))
PREDICTION = Prediction(IDS, target=20)


def plainly(model, ids: tuple[int, ...], kept: Tensor) -> Tensor:
    """log p(20) after the tokens by an attention written down here: hard gates, softmax, and only ``kept`` links.

    ``kept``: [layers, heads, tokens, tokens].
    """

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if attention_mask is None else attention_mask
        weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
        if hasattr(module, "gate_bias"):
            weights = weights * (scores + module.gate_bias[:, None, None] > 0)
        weights = weights * kept[module.layer_idx]
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    AttentionInterface.register("gossamer_plain_links", attend)
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionMaskInterface.register("gossamer_plain_links", sdpa_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = "gossamer_plain_links"
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float().log_softmax(-1)[20]
    finally:
        model.config._attn_implementation = before


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
    kept, left = masks.evaluate([chosen])
    everything = torch.ones(3, model.config.num_attention_heads, len(IDS), len(IDS), dtype=torch.bool)
    full, nothing = plainly(model, IDS, everything), plainly(model, IDS, ~everything)
    own = dense_mask(model, masks, chosen)
    assert masks.full == pytest.approx(full.item(), abs=1e-5)
    assert masks.nothing == pytest.approx(nothing.item(), abs=1e-5)
    for found, mask in ((kept, own), (left, ~own)):
        wanted = (plainly(model, IDS, mask) - nothing) / (full - nothing)
        assert found.item() == pytest.approx(wanted.item(), abs=1e-4 + 1e-5 / abs(full - nothing).item())


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
    # With every link cut, what the last position's heads add is the corrupted run's in the first layer; and with the
    # same prompt as corrupted one, cutting changes nothing.
    with pytest.raises(GossamerError, match="does not depend on attention"):
        LinkMasks(model, PREDICTION, IDS)
    alone = LinkMasks(model, PREDICTION)
    assert masks.full == pytest.approx(alone.full)
    assert masks.metrics([MaskRow(none, False)]).item() == pytest.approx(masks.nothing)
    assert masks.nothing != pytest.approx(alone.nothing)
    with pytest.raises(GossamerError, match="--corrupted has 3 tokens and the prompt 9"):
        LinkMasks(model, PREDICTION, (1, 2, 3))


def test_gradients_are_those_of_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """By differences of masks; and the same where attention is computed again in the backward pass."""
    model = model_of("gemma2").requires_grad_(False)  # without gates, whose steps no gradient knows of
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
    monkeypatch.setattr("gossamer.explanations.link_masks._RECOMPUTED", 1)
    (again,) = torch.autograd.grad(masks.metrics([MaskRow(start, True)]).sum(), start)
    torch.testing.assert_close(again, found)
