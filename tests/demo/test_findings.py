"""Measurements of links, compared with brute force and with independent implementations of interventions."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import gossamer
from gossamer.circuits.activation_cache import run_with_cache
from gossamer.circuits.intervention import run_with_interchange, run_with_links, run_without_links
from gossamer.circuits.tasks.base import Batch
from gossamer.demo.addition import CHARACTERS, PROMPT_TOKENS, TOKENS, Sums, split_pairs
from gossamer.demo.findings import (
    NOTHING,
    Measurements,
    by_query_and_key,
    describe,
    measure_accuracy,
    model_accuracy,
    quantities_of,
    sample_donors,
)
from gossamer.measures.losses import cross_entropy
from gossamer.models.attention import counted_links

LAYERS, HEADS = 2, 2


def tiny_adder(gate_bias: float = 0.3, seed: int = 0) -> PreTrainedModel:
    """Create a gated model like the demo's, with random weights that are large enough for its gates to differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(CHARACTERS) + 1,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=TOKENS,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    return gossamer.add_gates(model.eval(), gate_bias=gate_bias)


@pytest.fixture(scope="module")
def sums() -> Sums:
    return split_pairs(validation=10, held_out=400, seed=0).held_out


def cut_of(*links: tuple[int, int, int, int]) -> torch.Tensor:
    cut = torch.zeros(LAYERS, HEADS, TOKENS, TOKENS, dtype=torch.bool)
    for link in links:
        cut[link] = True
    return cut


def test_exact_match_is_what_greedy_decoding_gets_right(sums: Sums) -> None:
    """On a model that has memorised some of the sums."""
    model, some = tiny_adder(), sums[:24]
    blocks = some.blocks()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(35):
        optimizer.zero_grad()
        cross_entropy(model(input_ids=blocks, use_cache=False).logits, blocks, PROMPT_TOKENS).backward()
        optimizer.step()
    prompts = blocks[:, :PROMPT_TOKENS]
    with torch.no_grad():
        generated = model.generate(prompts, do_sample=False, max_new_tokens=3, pad_token_id=len(CHARACTERS))
    right = (generated == blocks).all(1)
    assert 0.1 < right.double().mean() < 0.9
    assert model_accuracy(model, some).exact == pytest.approx(right.double().mean().item())


def test_accuracy_counts_digits_and_groups() -> None:
    four = Sums(torch.tensor([12, 15, 60, 99]), torch.tensor([12, 15, 50, 99]))  # 024 030 110 198
    logits = torch.nn.functional.one_hot(four.blocks(), len(CHARACTERS) + 1).float().roll(-1, 1)
    assert measure_accuracy(logits, four).exact == 1
    logits[1, PROMPT_TOKENS] = 0  # 15 + 15: the tens digit becomes 0
    logits[3, PROMPT_TOKENS + 1] = 0  # 99 + 99: the ones digit becomes 0
    found = measure_accuracy(logits, four)
    assert found.exact == 0.5
    assert found.digits == {"hundreds": 1.0, "tens": 0.75, "ones": 0.75}
    assert found.groups == {
        "with a carry into the tens": 0.0,
        "without a carry into the tens": 1.0,
        "with a carry into the hundreds": 0.5,
        "without a carry into the hundreds": 0.5,
    }


def test_open_links_are_those_that_the_model_counts(sums: Sums) -> None:
    model = tiny_adder()
    measured = Measurements(model, sums)
    with torch.no_grad(), counted_links(model) as counts:
        model(input_ids=sums.blocks(), use_cache=False)
    counted = torch.stack([count.open_links for count in counts.values()], 1)
    assert torch.equal(measured.opened.sum(-1), counted)
    found = measured.map()
    assert found.mean == pytest.approx(counted.sum((1, 2, 3)).double().mean().item())
    assert found.most == counted.sum((1, 2, 3)).max()
    assert len(found.links) <= found.union
    carry = sums.carry_into_tens
    for each in found.links:
        layer, head, query, key = each.link
        own = measured.opened[:, layer, head, query, key].double()
        assert each.open == pytest.approx(own.mean().item())
        assert each.groups["with a carry into the tens"] == pytest.approx(own[carry].mean().item())


def test_a_cut_link_carries_nothing(sums: Sums) -> None:
    """Cutting links equals keeping all others, and cutting all links of a head equals closing its gates."""
    model, ids = tiny_adder(), sums.blocks()[:20]
    assert torch.equal(
        run_without_links(model, ids, cut_of()), run_without_links(model, ids, torch.zeros_like(cut_of()))
    )
    torch.testing.assert_close(run_without_links(model, ids, cut_of()), model(input_ids=ids).logits)

    links = [(0, 1, 6, 3), (1, 0, 8, 2)]
    cut = run_without_links(model, ids, cut_of(*links))
    digits = torch.zeros(1, dtype=torch.long)
    batch = Batch(ids, ids, (digits,) * 20, (digits + 1,) * 20, "logit_difference")
    kept = ~cut_of(*links).expand(20, *cut_of().shape)
    torch.testing.assert_close(run_with_links(model, batch, kept, ablation="zero"), cut[:, -1, 0] - cut[:, -1, 1])
    assert (cut[:, -1] - model(input_ids=ids).logits[:, -1]).abs().max() > 1e-3

    whole_head = cut_of()
    whole_head[1, 0] = True
    with torch.no_grad():
        model.model.layers[1].self_attn.gate_bias[0] = -math.inf
        shut = model(input_ids=ids).logits
        model.model.layers[1].self_attn.gate_bias[0] = 0.3
    torch.testing.assert_close(run_without_links(model, ids, whole_head), shut)


def test_exchanged_links_carry_the_donors_message(sums: Sums) -> None:
    """If all first-layer links into the last token come from a donor, so does the attention output there."""
    model, ids = tiny_adder(), sums.blocks()[:20]
    recording = run_with_cache(model, ids, links=True)
    own = torch.arange(20)
    torch.testing.assert_close(
        run_with_interchange(model, ids, cut_of((0, 0, 7, 3)), recording, own), model(input_ids=ids).logits
    )
    mask = cut_of()
    mask[0, :, 8] = True
    outputs = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *x: outputs.append(x[2]))
    with torch.no_grad():
        model(input_ids=ids)
        run_with_interchange(model, ids, mask, recording, own.roll(1))
    hook.remove()
    torch.testing.assert_close(outputs[1][:, -1], outputs[0][:, -1].roll(1, 0))
    torch.testing.assert_close(outputs[1][:, :-1], outputs[0][:, :-1])


def test_donors_agree_in_the_value_and_are_others() -> None:
    values = torch.tensor([0, 1, 0, 1, 2, 0, 0])
    donors = sample_donors(values, torch.Generator().manual_seed(0))
    assert torch.equal(values[donors], values)
    assert sorted(donors.tolist()) == list(range(7))
    assert (donors != torch.arange(7)).tolist() == [True, True, True, True, False, True, True]


def test_quantities_come_in_ascending_order_of_their_values(sums: Sums) -> None:
    everything = Sums(torch.arange(10_000) // 100, torch.arange(10_000) % 100)
    counts = [len(values.unique()) for values in quantities_of(everything).values()]
    assert counts == sorted(counts)
    assert counts[0] == 1


def test_a_link_whose_message_is_ignored_passes_on_nothing(sums: Sums) -> None:
    """With zero output projections, no message of a link has an effect."""
    model = tiny_adder()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    measured = Measurements(model, sums)
    links = [each.link for each in measured.map().links]
    assert links
    quantity, tried = measured.passed_on(links[:1])
    assert quantity == NOTHING
    assert tried == {NOTHING: measured.whole.exact}
    assert measured.cut(links) == measured.whole


def test_sentences_repeat_what_was_measured(sums: Sums) -> None:
    model = tiny_adder()
    found = describe(model, sums)
    measured = Measurements(model, sums)
    groups = by_query_and_key(measured.map().links)
    about_groups = [sentence for sentence in found["sentences"] if sentence["text"].startswith("Layer")]
    for group, sentence in zip(groups, about_groups, strict=True):
        links = [each.link for each in group]
        assert [tuple(link) for link in sentence["links"]] == links
        assert f"Layer {links[0][0]}, head" in sentence["text"]
        assert sentence["evidence"]["exact match, cut"] == measured.cut(links).exact
        assert sentence["evidence"]["open"] == measured.opening(links)[0]


def test_too_few_sums_to_exchange_are_said_to_be_too_few() -> None:
    few = split_pairs(validation=10, held_out=6, seed=0).held_out
    sentences = describe(tiny_adder(), few)["sentences"]
    assert any("the sums are too few to exchange" in each["text"] for each in sentences)
