"""Loss and KL of blocks against one forward pass over all of them."""

import pytest
import torch

from families import tiny_model, tokens
from gossamer.evaluation.language import measure_language


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
