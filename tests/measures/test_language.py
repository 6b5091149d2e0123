"""Loss and KL of blocks, compared with one forward pass over all of them."""

import pytest
import torch

from families import tiny_model, tokens
from gossamer.measures.language import measure_language, standard_error


@torch.no_grad()
def test_means_do_not_depend_on_the_batches() -> None:
    model, other, blocks = tiny_model("llama"), tiny_model("llama", seed=1), tokens(5, 12)
    logits, reference = model(input_ids=blocks).logits[:, :-1], other(input_ids=blocks).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    for batch_size in (1, 2, 5):
        figures = measure_language(model, blocks, dense=other, batch_size=batch_size)
        assert figures.loss == pytest.approx(loss.item(), rel=1e-5)
        assert figures.kl == pytest.approx(kl.item(), rel=1e-4)
        assert figures.tokens == 55


def test_a_model_has_no_distance_from_itself() -> None:
    model = tiny_model("llama")
    assert measure_language(model, tokens(2, 9), dense=model).kl == pytest.approx(0.0, abs=1e-6)


@torch.no_grad()
def test_the_figures_of_a_block_are_its_own() -> None:
    model, other, blocks = tiny_model("llama"), tiny_model("llama", seed=1), tokens(5, 12)
    figures = measure_language(model, blocks, dense=other, batch_size=3, prompt_tokens=4)
    assert figures.kls is not None
    for block, loss, kl in zip(blocks.split(1), figures.losses, figures.kls, strict=True):
        alone = measure_language(model, block, dense=other, prompt_tokens=4)
        assert (loss.item(), kl.item()) == pytest.approx((alone.loss, alone.kl), rel=1e-5)


def test_the_standard_error_is_the_spread_of_means() -> None:
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    errors = [standard_error(part) for part in values.split(100)]
    means = values.view(-1, 100).mean(1)
    assert sum(errors) / len(errors) == pytest.approx(means.std().item(), rel=0.1)  # type: ignore[arg-type]
    assert standard_error(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.double)) == pytest.approx((5 / 3 / 4) ** 0.5)
    assert standard_error(values[:1]) is None
