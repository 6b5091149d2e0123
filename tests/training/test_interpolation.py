"""Interpolation between the dense and the trained weights."""

import pytest
import torch

import gossamer
from families import tiny_model
from gossamer.models.lora import add_adapters, as_dense
from gossamer.training.interpolation import Interpolation

IDS = torch.arange(12)[None]


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Add noise to the trained parameters of a model."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shares_lie_on_the_line_from_the_dense_to_the_trained_weights(family: str) -> None:
    dense = tiny_model(family)
    model = moved(gossamer.add_gates(dense))
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights = Interpolation(model, dense.state_dict())
    start = dense.state_dict()
    for share in (0.5, 0.25, 0.0, 1.0):
        weights.keep(share)
        for name, weight in model.named_parameters():
            at = trained[name] if name.endswith("gate_bias") else start[name].lerp(trained[name], share)
            assert torch.equal(weight, trained[name]) if share == 1.0 else torch.allclose(weight, at, atol=1e-6), name
    weights.keep(0.0)
    assert all(torch.equal(model.state_dict()[name], own) for name, own in start.items())


def test_of_adapters_the_product_is_scaled() -> None:
    model = gossamer.add_gates(tiny_model("llama"), gate_bias=30.0)
    add_adapters(model, rank=2, alpha=4)
    moved(model)
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        with as_dense(model) as dense:
            start = dense(input_ids=IDS).logits
    weights = Interpolation(model, {})
    assert weights.possible
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights.keep(0.5)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name] * (0.5 if ".lora_B." in name else 1.0)), name
    with torch.no_grad():
        weights.keep(0.0)
        torch.testing.assert_close(model(input_ids=IDS).logits, start, atol=1e-5, rtol=1e-5)
        weights.keep(1.0)
        assert torch.equal(model(input_ids=IDS).logits, trained)


def test_without_dense_weights_nothing_moves() -> None:
    assert not Interpolation(gossamer.add_gates(tiny_model("llama")), {}).possible
