"""The losses on worked examples, and compared with PyTorch's losses over whole tensors."""

import math

import pytest
import torch
from torch.nn import functional

from gossamer.measures.losses import POSITIONS, cross_entropy, kl_divergence


def test_losses_by_hand() -> None:
    ids = torch.tensor([[0, 1, 1]])
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    assert cross_entropy(logits, ids).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    other = torch.log(torch.tensor([[[0.9, 0.1], [0.25, 0.75], [0.2, 0.8]]]))
    expected = 0.5 * (0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert kl_divergence(logits, other).item() == pytest.approx(expected)
    assert kl_divergence(logits, logits).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("tokens", [2, 100, POSITIONS + 1])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_losses_and_gradients_are_those_of_whole_tensors(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    logits, dense = (torch.randn(3, tokens, 50, generator=generator).to(dtype) for _ in range(2))
    ids = torch.randint(50, (3, tokens), generator=generator)
    whole, chunked = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        (mine,) = torch.autograd.grad(3 * found, chunked)
        (theirs,) = torch.autograd.grad(3 * wanted, whole)
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())

    same(
        cross_entropy(chunked, ids), functional.cross_entropy(whole[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    )
    log_dense, log_sparse = (torch.log_softmax(x[:, :-1].float(), -1).flatten(0, 1) for x in (dense, whole))
    same(
        kl_divergence(dense, chunked), functional.kl_div(log_sparse, log_dense, log_target=True, reduction="batchmean")
    )


@pytest.mark.parametrize("prompt_tokens", [0, 1, 2, 4])
def test_a_prompt_is_not_asked_for(prompt_tokens: int) -> None:
    """The first predicted token is the one after the prompt, or the second of the row without a prompt."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 10, generator=generator).requires_grad_()
    dense = torch.randn(3, 6, 10, generator=generator)
    ids = torch.randint(10, (3, 6), generator=generator)
    first = max(1, prompt_tokens)
    found = cross_entropy(logits, ids, prompt_tokens)
    wanted = functional.cross_entropy(logits[:, first - 1 : -1].flatten(0, 1), ids[:, first:].flatten())
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, logits)[0])
    assert (gradient[:, : first - 1] == 0).all()
    kl = functional.kl_div(
        torch.log_softmax(logits[:, first - 1 : -1], -1).flatten(0, 1),
        torch.log_softmax(dense[:, first - 1 : -1], -1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(kl_divergence(dense, logits, prompt_tokens), kl)
