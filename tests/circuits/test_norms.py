"""Norms of many classes as linear maps with their scale held fixed."""

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from gossamer.circuits.norms import fixed_norm
from gossamer.errors import GossamerError

NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "LayerNorm of odd width": lambda: nn.LayerNorm(7),
    "RMSNorm": lambda: nn.RMSNorm(8, eps=0.1),
    "Gemma's, of 1 + weight": lambda: GemmaRMSNorm(8),
    "weights by head": lambda: CohereLayerNorm(hidden_size=(3, 8)),
    "without weights": lambda: OlmoLayerNorm(8),
    "L2": lambda: Llama4TextL2Norm(),
    "none": lambda: nn.Identity(),
}


def norm_and_input(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    norm = NORMS[name]()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    width = 7 if "odd" in name else 8
    return norm.requires_grad_(False), torch.randn(2, 5, 3, width) + 0.3


@pytest.mark.parametrize("name", NORMS)
def test_parts_of_the_input_add_up_to_the_output(name: str) -> None:
    norm, x = norm_and_input(name)
    part = torch.randn_like(x)
    fixed = fixed_norm(norm, x)
    torch.testing.assert_close(fixed.linear(part) + fixed.linear(x - part) + fixed.bias, norm(x), rtol=1e-4, atol=1e-4)
    row = fixed.at(1, 3)
    torch.testing.assert_close(row.linear(part[1, 3]), fixed.linear(part)[1, 3])
    assert fixed.centred == ("Layer" in type(norm).__name__)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "weights by head"])
def test_the_scale_has_the_gradient_of_the_norm(name: str) -> None:
    norm, x = norm_and_input(name)
    norm, x = norm.double(), x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(norm(x).pow(3).sum(), x)
    fixed = fixed_norm(norm, x)
    (found,) = torch.autograd.grad((fixed.linear(x) + fixed.bias).pow(3).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_no_norm_is_refused() -> None:
    with pytest.raises(GossamerError, match="Tanh is neither an RMSNorm nor a LayerNorm"):
        fixed_norm(nn.Tanh(), torch.randn(2, 8))
    with pytest.raises(GossamerError, match="Softmax is neither"):
        fixed_norm(nn.Softmax(-1), torch.randn(2, 8))
