"""Attention weights on worked examples: softcap, mask, a row without allowed keys, grouped heads."""

import math

import pytest
import torch

from gossamer.ops.weights import attention_logits, attention_weights, causal_pairs, per_query_head


def test_weights_by_hand() -> None:
    q = torch.tensor([[[[2.0], [0.0], [1.0]]]])
    k = torch.tensor([[[[1.0], [math.log(3) / 2], [5.0]]]])
    logits = attention_logits(q, k, 1.0, None)
    torch.testing.assert_close(logits[0, 0, 0], torch.tensor([2.0, math.log(3), 10.0]))
    capped = attention_logits(q, k, 0.5, 2.0)
    assert capped[0, 0, 0, 2].item() == pytest.approx(2 * math.tanh(5 / 2))
    allowed = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    weights = attention_weights(logits, allowed)[0, 0]
    shares = torch.tensor([math.exp(2), 3.0, 0.0])
    torch.testing.assert_close(weights[0], shares / shares.sum())
    assert weights[1:].tolist() == [[0, 0, 0], [1, 0, 0]]


def test_queries_stand_at_the_last_keys_and_heads_of_a_group_side_by_side() -> None:
    assert causal_pairs(2, 3, torch.device("cpu")).tolist() == [[True, True, False], [True, True, True]]
    assert per_query_head(torch.tensor([[[7], [8]]]), 4)[0, :, 0].tolist() == [7, 7, 8, 8]
