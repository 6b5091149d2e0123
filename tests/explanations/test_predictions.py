"""Explanations of many predictions: their choice, the written records, and continuing an interrupted measurement."""

from pathlib import Path

import pytest
import torch

import gossamer
from families import tiny_model
from gossamer.circuits import mask_search
from gossamer.circuits.streams import attention_hooks
from gossamer.errors import GossamerError
from gossamer.explanations import predictions
from gossamer.explanations.predictions import (
    PredictionsConfig,
    Quartiles,
    choose_predictions,
    explain_predictions,
    summarise,
)


@pytest.fixture(scope="module")
def models():
    dense = tiny_model("llama").eval().requires_grad_(False)
    return {"dense": dense, "sparse": gossamer.add_gates(dense, gate_bias=2.0).eval().requires_grad_(False)}


@pytest.fixture(scope="module")
def blocks():
    return torch.randint(4, 97, (40, 20), generator=torch.Generator().manual_seed(0))


def measure(models, blocks, file: Path, **settings):
    return explain_predictions(
        models, blocks, file, PredictionsConfig([4, 3], 2, 0.8), **{"described": {"a": 1}, **settings}
    )


def test_what_is_chosen_is_likely_and_needs_its_context(models, blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "LIKELY", 0.02)
    monkeypatch.setattr(predictions, "GAIN", 0.5)
    chosen = choose_predictions(models, blocks, length=5, count=3, seed=1)
    assert len(set(chosen)) == 3
    for each in chosen:
        ids = torch.tensor([each.ids])
        for model in models.values():
            full = model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)[each.target]
            with attention_hooks(model, predictions._NoLinks()):
                none = model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)[each.target]
            assert full.exp() > 0.02
            assert full - none >= 0.5
    assert chosen == choose_predictions(models, blocks, length=5, count=3, seed=1)
    assert chosen != choose_predictions(models, blocks, length=5, count=3, seed=2)
    with pytest.raises(GossamerError, match="fewer than 500"):
        choose_predictions(models, blocks, length=5, count=500, seed=1)


def test_a_measurement_that_was_cut_off_goes_on(
    models, blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "LIKELY", 0.02)
    monkeypatch.setattr(predictions, "GAIN", 0.5)
    monkeypatch.setattr(mask_search, "STEPS", 4)
    file = tmp_path / "rows.jsonl"
    rows = measure(models, blocks, file)
    assert len(rows) == 2 * 2 * 2 * 2
    for row in rows:
        assert len(row["ids"]) == row["length"]
        assert min(row["kept"]) >= 0.8
        assert row["kind"] == "sufficient" or max(row["left_when_cut"]) <= 0.2 + 1e-6
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:9]) + lines[9][:20])
    again = []
    assert measure(models, blocks, file, progress=again.append) == rows
    assert len(again) == 16 - 8
    assert file.read_text().splitlines(keepends=True) == lines
    with pytest.raises(GossamerError, match="begun with other models"):
        measure(models, blocks, file, described={"a": 2})
    for others, text in ((models, blocks.flip(0)), ({**models, "dense": models["sparse"]}, blocks)):
        with pytest.raises(GossamerError, match="begun with other models"):
            measure(others, text, file)
    assert file.read_text().splitlines(keepends=True) == lines
    (found, *_) = summarise(rows)
    own = [row for row in rows if row["length"] == 3 and row["kind"] == "sufficient"]
    sizes = {row["model"]: [] for row in own}
    for row in own:
        sizes[row["model"]].append(row["sizes"][0])
    assert found["sparse"]["size"] == Quartiles.of(sizes["sparse"])
    assert found["ratio"] == Quartiles.of([a / b for a, b in zip(sizes["dense"], sizes["sparse"], strict=True)])


def test_quartiles() -> None:
    assert Quartiles.of([3.0]) == Quartiles(3.0, 3.0, 3.0)
    assert Quartiles.of([1, 2, 3, 4, 5]) == Quartiles(2, 3, 4)


def test_a_file_of_another_kind_is_refused(models, blocks, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("no json\n")
    with pytest.raises(GossamerError, match="line 1 cannot be used: not valid JSON"):
        measure(models, blocks, tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_text() == "no json\n"
