"""Tiny models, prompts and comparisons that the tests of circuits share."""

import torch

import gossamer
from families import CONFIGS, tiny_model, tokens
from gossamer.circuits.tasks.base import Batch

FAMILIES = tuple(CONFIGS)


def model_of(family: str, gated: bool = False):
    model = tiny_model(family).double()
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
