"""Recomputed activations use the gates of their forward pass, wherever the gradient is computed."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from family_table import tiny_model as any_tiny_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import gossamer
from families import CONFIGS, tiny_model, tokens
from gossamer import GossamerError
from gossamer.models.lora import add_adapters
from gossamer.training.trainer import no_dropout

IDS = tokens(2, 14)
CONTEXTS: dict[str, Callable[[PreTrainedModel], AbstractContextManager]] = {
    "sampled": lambda model: gossamer.sampled_gates(model, seed=3, first_row=2),
    "forced open": gossamer.forced_open,
}


def gated(name: str = "llama", reentrant: bool | None = None) -> PreTrainedModel:
    """Create a gated model in training mode, with activation checkpointing unless ``reentrant`` is None."""
    model = gossamer.add_gates((tiny_model if name in CONFIGS else any_tiny_model)(name)).requires_grad_().train()
    if reentrant is not None:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
    return model


def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert any(value.abs().max() > 0 for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", [*CONFIGS, "nemotron", "stablelm"])  # their layers drop further arguments
def test_the_gradient_after_the_context_is_that_without_recomputation(name: str, context: str, reentrant: bool) -> None:
    found = []
    for model in (gated(name), gated(name, reentrant)):
        with no_dropout(model):
            with CONTEXTS[context](model):
                out = logits(model)
            found.append(gradients(model, out.square().mean()))
    assert_same(found[1], found[0])


def test_each_forward_pass_keeps_its_own_gates() -> None:
    """The gradient of several passes is computed under gates that none of them had."""
    found = []
    for model in (gated(), gated(reentrant=False)):
        with gossamer.sampled_gates(model, seed=1):
            first = logits(model)
        with gossamer.forced_open(model), gossamer.sampled_gates(model, seed=2):
            second = logits(model)
        third = logits(model)
        with gossamer.sampled_gates(model, seed=3):
            found.append(gradients(model, (first * second + third).square().mean()))
    assert_same(found[1], found[0])


def test_expected_links_are_differentiated_and_counted_once() -> None:
    found = []
    for model in (gated(), gated(reentrant=False)):
        with gossamer.counted_links(model) as counts, gossamer.sampled_gates(model, seed=1):
            out = logits(model)
        before = dict(counts)
        loss = out.square().mean() + sum(count.expected_open.sum() for count in counts.values())
        found.append(gradients(model, loss))
        assert all(counts[layer] is count for layer, count in before.items())
        with gossamer.counted_links(model) as counts:
            out = logits(model)
            before = dict(counts)
            gradients(model, out.square().mean())
            assert all(counts[layer] is count for layer, count in before.items())
    assert_same(found[1], found[0])


def test_expected_links_have_no_gradient_under_reentrant_checkpointing_and_say_so() -> None:
    numbers = []
    for model in (gated(), gated(reentrant=True)):
        with gossamer.counted_links(model) as counts:
            loss = logits(model).square().mean()
        expected = sum(count.expected_open.sum() for count in counts.values())
        numbers.append(expected.item())
    assert numbers[1] == pytest.approx(numbers[0])
    gradients(model, loss)
    with pytest.raises(GossamerError, match="use_reentrant=False"):
        (logits(model).square().mean() + expected).backward()


def test_adapters_are_differentiated_alike() -> None:
    found = []
    for model in (gated(), gated(reentrant=False)):
        add_adapters(model, rank=2, alpha=4.0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.fill_(0.1)
        with gossamer.sampled_gates(model, seed=1):
            out = logits(model)
        found.append(gradients(model, out.square().mean()))
    assert any("lora_A" in name for name in found[0])
    assert_same(found[1], found[0])


def by_hand(model: PreTrainedModel) -> Tensor:
    return checkpoint(lambda ids: model(input_ids=ids, use_cache=False).logits, IDS, use_reentrant=False)


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_does_not_keep_the_gates_is_found_out(context: str) -> None:
    """The whole model is recomputed, as by a user's call of checkpoint."""
    model = gated()
    with CONTEXTS[context](model):
        wanted = gradients(model, logits(model).square().mean())
        assert_same(gradients(model, by_hand(model).square().mean()), wanted)
        out = by_hand(model)
    with pytest.raises(GossamerError, match=r"recomputed under other gates .* call backward\(\) within"):
        out.square().mean().backward()
    out = by_hand(model)
    with CONTEXTS[context](model), pytest.raises(GossamerError, match="recomputed under other gates"):
        out.square().mean().backward()
    assert_same(gradients(model, by_hand(model).square().mean()), gradients(model, logits(model).square().mean()))


def test_a_copy_has_gates_of_its_own_and_loses_them_alone() -> None:
    model = gated(reentrant=False)
    other = copy.deepcopy(model)
    with gossamer.sampled_gates(other, seed=1):
        out, hard = logits(other), logits(model)
    assert torch.equal(hard, logits(model))
    assert not torch.equal(out, hard)
    wanted = gated()
    with gossamer.sampled_gates(wanted, seed=1):
        assert_same(gradients(other, out.square().mean()), gradients(wanted, logits(wanted).square().mean()))
    dense = gossamer.remove_gates(model)
    assert not any(module._forward_pre_hooks for module in dense.modules())
    gossamer.remove_gates(other, inplace=True)
    with gossamer.sampled_gates(model, seed=1):
        assert torch.equal(logits(model), out)


@torch.no_grad()
def test_a_gated_model_is_compiled_as_one_graph() -> None:
    model = gated().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for context in CONTEXTS.values():
        with context(model):
            torch.testing.assert_close(logits(compiled), logits(model))


@torch.no_grad()
def test_a_compiled_model_with_sampled_gates_serves_every_seed() -> None:
    torch.compiler.reset()
    model = gated().eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(12):
        with gossamer.sampled_gates(model, seed=seed, first_row=seed % 3):
            torch.testing.assert_close(logits(compiled), logits(model))
    assert counter.frame_count == 1


def test_a_compiled_model_has_the_gradients_of_the_plain_one() -> None:
    model = gated()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        with gossamer.sampled_gates(model, seed=seed):
            found, wanted = (gradients(model, logits(each).square().mean()) for each in (compiled, model))
        assert_same(found, wanted)
