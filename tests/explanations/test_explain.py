"""Explanations of small models, compared with their known circuits and with runs of the model."""

from pathlib import Path

import pytest
import torch

import gossamer
from families import tiny_model
from gossamer.circuits.link_masks import LinkMasks
from gossamer.circuits.mask_search import MaskSearch
from gossamer.errors import GossamerError
from gossamer.explanations.config import ExplainConfig
from gossamer.explanations.explain import explain, explain_prediction
from gossamer.explanations.prediction import Prediction, predict
from gossamer.explanations.record import explanation_record, graphml, in_words
from induction import induction_model, induction_prompts

PROMPT = "the sparse model reads one two three"


@pytest.fixture(scope="module")
def model():
    return gossamer.add_gates(tiny_model("llama"), gate_bias=0.5).eval()


@pytest.mark.parametrize("kind", ["sufficient", "complete"])
def test_the_two_links_of_induction_are_found_and_nothing_else(kind: str) -> None:
    """With a corrupted prompt: if other links carried nothing, the last norm would make up for a missing link."""
    network = induction_model().requires_grad_(False)
    for clean, corrupted, answer in induction_prompts(3):
        prediction = Prediction(tuple(clean), answer, against=clean[1])
        found = explain_prediction(network, prediction, corrupted=tuple(corrupted), config=ExplainConfig(kind, 0.8))
        assert [each.link for each in sorted(found.details, key=lambda each: each.link)] == [(0, 0, 3, 2), (1, 0, 5, 3)]
        assert found.overlap == 1.0
        assert found.candidates == 84
        for each in found.sets:
            assert len(each) == 2
            assert each.kept == pytest.approx(0.840, abs=1e-3)  # corrupted values of other links raise other tokens
            assert each.left_when_cut == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("kind", ["sufficient", "complete"])
def test_the_set_meets_what_was_asked(model, tokenizer, kind: str) -> None:
    found = explain(model, tokenizer, PROMPT, config=ExplainConfig(kind, 0.8, seed=3))
    for each in (*found.sets, found.by_share[0.8]):
        assert each.kept >= 0.8
        if kind == "complete":
            assert each.left_when_cut <= 0.2 + 1e-6
    for share, each in found.by_share.items():
        assert each.kept >= share
        assert share <= 0.8 or len(each) >= len(found.sets[0])
    assert found.by_share[0.8] is found.sets[0]
    assert len(found.sets[0]) <= len(found.sets[1])
    assert len(found.sets[0]) < found.candidates
    votes = {each.link: each.found_by for each in found.details}
    assert set(votes.values()) <= {0.5, 1.0}


def test_a_seed_gives_the_same_set_again(model, tokenizer) -> None:
    both = explain(model, tokenizer, PROMPT, config=ExplainConfig(share=0.8, seed=3, shares=()))
    again = explain(model, tokenizer, PROMPT, config=ExplainConfig(share=0.8, seeds=1, seed=3, shares=()))
    assert torch.equal(again.sets[0].chosen, both.sets[both.seeds.index(3)].chosen)


def test_no_link_of_a_sufficient_set_can_be_left_out(model, tokenizer) -> None:
    network = model.requires_grad_(False)
    masks = LinkMasks(network, predict(network, tokenizer, PROMPT))
    search = MaskSearch(masks, share=0.8)
    found = search.run()
    without = [found.chosen.clone().index_fill_(0, link, False) for link in found.chosen.nonzero()]
    assert not any(search.accepts(without))


def test_an_interrupted_search_keeps_the_best_set_so_far(model, tokenizer) -> None:
    sizes = []

    def progress(what: str, done: float, size: int) -> None:
        sizes.append(size)
        if done > 0.75:
            raise KeyboardInterrupt

    found = explain(model, tokenizer, PROMPT, config=ExplainConfig(share=0.8), progress=progress)
    assert found.seeds == (0,)
    assert len(found.sets[0]) < found.candidates
    assert found.sets[0].kept >= 0.8


def test_effects_are_measured_by_cutting(model, tokenizer) -> None:
    found = explain(model, tokenizer, PROMPT, config=ExplainConfig(share=0.8, seeds=1))
    masks = LinkMasks(model.requires_grad_(False), found.prediction)
    places = {tuple(link): at for at, link in enumerate(masks.links.tolist())}
    chosen = found.sets[0].chosen
    for each in found.details[:3]:
        alone = torch.zeros(len(masks), dtype=torch.bool)
        alone[places[each.link]] = True
        left = masks.left_when_cut([alone])
        assert each.effect.alone == pytest.approx(1 - left.item(), abs=1e-5)
        kept = masks.kept([chosen, chosen & ~alone])
        assert each.effect.in_set == pytest.approx((kept[0] - kept[1]).item(), abs=1e-5)
        assert each.reason.gate > 0


def test_the_record_says_what_was_found(model, tokenizer) -> None:
    found = explain(model, tokenizer, PROMPT, against="row", config=ExplainConfig(share=0.8))
    record = explanation_record(found, tokenizer, model="tiny", dense=found)
    assert record["metric"] == "logit difference"
    assert record["dense_links_per_link"] == 1.0
    assert len(record["links"]) == record["size"] == len(record["found_by"])
    assert [link for link in record["links"] if link not in record["shares"]["0.8"]["links"]] == []
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for key in (*record, *record["details"][0], *record["details"][0]["tests"][0]):
        assert f"`{key}`" in documented.replace("details[].", ""), key
    text = graphml(record)
    assert text.count("<edge ") == record["size"]
    lines = in_words(record)
    assert f"{record['size']:,} links (sufficient)" in lines[1]
    assert lines[3].startswith(f"the strongest {min(10, record['size'])} of {record['size']} links")
    assert lines[4].startswith(f"layer {record['details'][0]['link'][0]} head")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": " ".join(["the"] * 65)}, "more than the model's context, 64"),
        ({"target": "the sparse"}, "--target 'the sparse' is 2 tokens"),
        ({"target": ""}, "--target is empty"),
        ({"target": "Z"}, "--target 'Z' is unknown to the tokenizer"),
        ({"target": "the", "against": "the"}, "--against 'the' is the target itself"),
        ({"corrupted": "the model"}, "--corrupted has 2 tokens"),
    ],
)
def test_bad_input_is_one_line(model, tokenizer, settings: dict, message: str) -> None:
    with pytest.raises(GossamerError, match=message) as caught:
        explain(model, tokenizer, **{"prompt": PROMPT, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_a_share_that_no_set_can_keep_is_refused(share: float) -> None:
    with pytest.raises(GossamerError, match=f"--share {share:g} of the metric cannot be kept"):
        ExplainConfig(share=share)


def test_the_model_is_left_as_it_was(model, tokenizer) -> None:
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, tokenizer, PROMPT, config=ExplainConfig(share=0.5, seeds=1))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "gossamer"
    model.eval()
