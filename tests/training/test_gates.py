"""Initial gate biases, compared with softmax in plain torch, and the shift that brings a model inside its bound."""

import pytest
import torch

import gossamer
from families import tiny_model, tokens
from gossamer.models.checkpoint import gate_biases
from gossamer.training.gates import Calibration, calibrate, mean_log_sum_exp, open_above, open_to, shifted

IDS = tokens(2, 20)


@torch.no_grad()
def test_the_denominators_are_those_of_plain_attention() -> None:
    dense = tiny_model("gpt2")
    dense.set_attn_implementation("eager")
    found = mean_log_sum_exp(gossamer.add_gates(dense), IDS)
    block = dense.transformer.h[0]
    qkv = block.attn.c_attn(block.ln_1(dense.transformer.wte(IDS) + dense.transformer.wpe(torch.arange(20))))
    q, k, _ = (x.view(2, 20, dense.config.n_head, -1).transpose(1, 2) for x in qkv.chunk(3, -1))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    logits = logits.masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(found[0], logits.logsumexp(-1).mean((0, 2)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gates_open_above_an_attention_weight() -> None:
    """With zero queries, every row of attention is uniform, 1 / (i + 1), with the denominator i + 1."""
    model = gossamer.add_gates(tiny_model("gpt2"))
    for block in model.transformer.h:
        width = model.config.n_embd
        block.attn.c_attn.weight[:, :width] = 0
        block.attn.c_attn.bias[:width] = 0
    log_sum_exp = mean_log_sum_exp(model, IDS)
    torch.testing.assert_close(log_sum_exp, torch.arange(1.0, 21).log().mean().expand_as(log_sum_exp))
    typical = log_sum_exp[0, 0].exp().item()
    for weight, share in ((0.99 / typical, 1.0), (1.01 / typical, 0.0)):
        open_above(model, weight, log_sum_exp)
        with gossamer.counted_links(model) as counts:
            model(input_ids=IDS)
        assert counts[0].open_links.sum() == share * counts[0].allowed_links.sum()


@torch.no_grad()
def test_the_start_is_the_sparsest_that_the_violation_allows() -> None:
    model = gossamer.add_gates(tiny_model("llama")).eval()

    def open_fraction() -> float:
        with gossamer.counted_links(model) as counts:
            model(input_ids=IDS)
        return (
            sum(c.open_links.sum() for c in counts.values()) / sum(c.allowed_links.sum() for c in counts.values())
        ).item()

    weight = open_to(model, IDS, lambda: 0.5 - open_fraction())
    assert open_fraction() >= 0.5
    open_above(model, 1.3 * weight, mean_log_sum_exp(model, IDS))
    assert open_fraction() < 0.5


def test_calibration_finds_the_smallest_shift_that_was_measured_to_hold() -> None:
    model = gossamer.add_gates(tiny_model("llama"))
    before = gate_biases(model)

    def violation() -> float:
        return 1.7 - (gate_biases(model) - before).mean().item()

    found = calibrate(model, violation)
    assert found.violation == pytest.approx(1.7)
    assert 1.7 <= found.shift <= 1.7 + 0.1
    torch.testing.assert_close(gate_biases(model), before + found.shift)


def test_calibration_leaves_what_holds_and_what_no_shift_helps() -> None:
    model = gossamer.add_gates(tiny_model("llama"))
    before = gate_biases(model)
    assert calibrate(model, lambda: -0.1) == Calibration(0.0, -0.1)
    assert calibrate(model, lambda: 0.1) == Calibration(None, 0.1)
    assert torch.equal(gate_biases(model), before)


def test_a_shift_is_taken_back_exactly() -> None:
    model = gossamer.add_gates(tiny_model("llama"), gate_bias=0.1)
    before = gate_biases(model)
    with shifted(model, 1e6):
        assert (gate_biases(model) > 1e5).all()
    assert torch.equal(gate_biases(model), before)
