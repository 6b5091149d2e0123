"""What the trainers share, on tiny models."""

import torch

from families import tiny_model, tokens
from gossamer.training.trainer import without_dropout


def test_dropout_is_off_within_and_back_afterwards() -> None:
    model = tiny_model("gpt2").train()
    ids = tokens(1, 9)
    with torch.no_grad(), without_dropout(model):
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
