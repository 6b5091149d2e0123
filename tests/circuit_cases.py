"""Tiny models, prompts and comparisons shared by the tests of circuits."""

import torch
from family_table import tiny_model as any_tiny_model

import gossamer
from families import CONFIGS, tiny_model, tokens
from gossamer.circuits.tasks.base import Batch

FAMILIES = tuple(CONFIGS)

STRUCTURES = (*FAMILIES, "cohere", "codegen", "glm4", "granitemoeshared", "nanochat")
"""With structures that those families lack: one norm for attention and MLP, projections in an unusual order, norms
before and after both, two MLPs whose outputs are added, and a final norm that is also applied at the start."""


def model_of(family: str, gated: bool = False):
    model = (tiny_model if family in CONFIGS else any_tiny_model)(family).double().requires_grad_()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(0.5)
    return gossamer.add_gates(model, gate_bias=0.3).double().eval() if gated else model


def batch_of(prompts: int = 3, length: int = 7) -> Batch:
    answers, wrong = (tuple(torch.tensor([i + first]) for i in range(prompts)) for first in (5, 40))
    return Batch(tokens(prompts, length), tokens(prompts, length, seed=1), answers, wrong, "logit_difference")


@torch.no_grad()
def metric(model, batch: Batch, ids: torch.Tensor) -> torch.Tensor:
    return batch.measure(model(input_ids=ids).logits[:, -1])


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    scale = wanted.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=tolerance)
