"""gossamer circuits for sparse models outside a run."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import gossamer
from families import tiny_model
from gossamer.circuits import mask_search
from gossamer.cli import app
from gossamer.errors import GossamerError


def call(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def sparse(saved_llama: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A saved sparse model that does not record its dense model."""
    gossamer.save(gossamer.add_gates(tiny_model("llama"), gate_bias=0.2), tmp_path / "sparse", tokenizer)
    return tmp_path / "sparse"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [
        {"clean": f"the sparse {a} reads", "corrupted": f"the sparse {b} reads", "answers": [" two"], "wrong": [" one"]}
        for a in ("model", "link") for b in ("row", "need")
    ]  # fmt: skip
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "own.jsonl"


def test_circuits_of_a_saved_model_lie_where_they_are_asked_for(
    sparse: Path,
    saved_llama: Path,
    task: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mask_search, "STEPS", 8)
    line = ["circuits", sparse, "--task", task, "--examples", 4, "--levels", "nodes", "--force"]
    with pytest.raises(GossamerError, match=r"is not a run; .*--out"):
        call(*line)
    out = tmp_path / "out"
    call(*line, "--dense", saved_llama, "--score", "learned-mask", "--out", out)
    record = json.loads((out / "circuits" / "own" / "circuits.json").read_text())
    assert record["score"] == "learned-mask"
    for model in record["models"].values():
        found = model["sets"]["nodes"]
        assert found["kept"] >= 0.9
        assert model["levels"]["nodes"]["first_size"] <= found["size"] + 1  # one more: the input
        assert len(model["circuit"]["nodes"]["names"]) == model["levels"]["nodes"]["first_size"]
    assert set(load_file(out / "circuits" / "own" / "scores.safetensors")) == {"dense", "sparse"}
    printed = capsys.readouterr().out
    assert "The sets that the search found" in printed
    assert "left when cut" in printed


def test_inspect_tells_a_sparse_model_from_a_dense_one(sparse: Path, saved_llama: Path, capsys) -> None:
    call("inspect", sparse)
    shown = capsys.readouterr().out
    assert "gate bias" in shown
    assert "made from" in shown
    call("inspect", saved_llama)
    assert "can be gated" in capsys.readouterr().out
