"""Top-k attention on a worked example and at both extremes: k = T is dense, and k = 1 keeps one link per query."""

import pytest
import torch

from families import CONFIGS, WINDOW, tiny_model, tokens
from gossamer.evaluation.topk import topk_attention, topk_curve, topk_pattern
from gossamer.measures.language import measure_language


def test_pattern_by_hand() -> None:
    pattern = torch.tensor([[0.1, 0.6, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0]])
    allowed = torch.tensor([[True, True, True, False], [True, False, False, False]])
    kept = topk_pattern(pattern, allowed, 2, renormalise=False)
    torch.testing.assert_close(kept, torch.tensor([[0.0, 0.6, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    kept = topk_pattern(pattern, allowed, 2, renormalise=True)
    torch.testing.assert_close(kept, torch.tensor([[0.0, 2 / 3, 1 / 3, 0.0], [1.0, 0.0, 0.0, 0.0]]))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_keeping_everything_is_the_dense_model(name: str) -> None:
    model = tiny_model(name)
    batch = {"input_ids": tokens(2, 14), "attention_mask": torch.tensor([[1] * 14, [0] * 4 + [1] * 10])}
    wanted = model(**batch).logits
    real = batch["attention_mask"].bool()
    with topk_attention(model, 14, renormalise=False):
        torch.testing.assert_close(model(**batch).logits[real], wanted[real], rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(**batch).logits, wanted)


def test_curve_counts_links_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    blocks = tokens(3, 10)
    before = measure_language(model, blocks).loss
    points = topk_curve(model, blocks, (1, 4))
    assert [(point.k, point.renormalised) for point in points] == [(1, False), (4, False), (1, True), (4, True)]
    assert points[0].open_fraction == pytest.approx(10 / 55)
    assert points[1].open_fraction == pytest.approx((1 + 2 + 3 + 4 * 7) / 55)
    assert all(point.loss != before for point in points)
    assert measure_language(model, blocks).loss == before


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_links_are_counted_alike_in_batches_of_any_size_also_where_some_layers_have_a_window(name: str) -> None:
    model, length, k = tiny_model(name), 14, 7
    causal = sum(min(k, query + 1) for query in range(length)), length * (length + 1) // 2
    windowed = (
        sum(min(k, WINDOW, query + 1) for query in range(length)),
        sum(min(WINDOW, query + 1) for query in range(length)),
    )
    layers = {"llama": [causal] * 3, "gemma2": [windowed, causal, windowed], "qwen2": [causal, windowed, windowed]}
    opened, allowed = (sum(column) for column in zip(*layers[name], strict=True))
    for batch_size in (1, 3):
        points = topk_curve(model, tokens(3, length), (k,), batch_size=batch_size)
        assert points[0].open_fraction == pytest.approx(opened / allowed)
