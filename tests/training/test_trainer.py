"""Functions shared by the trainers, on tiny models."""

import pytest
import torch

from families import tiny_model, tokens
from gossamer.training.trainer import no_dropout, rate_share


def test_dropout_is_off_within_and_back_afterwards() -> None:
    model = tiny_model("gpt2").train()
    ids = tokens(1, 9)
    with torch.no_grad(), no_dropout(model):
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_rates_rise_stay_and_fall() -> None:
    shares = [rate_share(step, steps=20, warmup=0.2, decay=0.25) for step in range(20)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4:16] == [1.0] * 12
    assert shares[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [rate_share(step, steps=1, warmup=0.5, decay=0.5) for step in range(2)] == [1.0, 0.0]
