"""gossamer demo: a run of a few steps in the default suite, and the complete demo in the slow tests."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer
from forked import run_command
from gossamer import GossamerError
from gossamer.circuits.compare import compare_circuits
from gossamer.circuits.config import SearchConfig
from gossamer.circuits.tasks import TASKS
from gossamer.cli import main
from gossamer.demo.addition import POSITIONS, TOKENS, split_pairs
from gossamer.demo.demonstrate import DemoConfig, addition_table, demo_config, demonstrate
from gossamer.demo.findings import Measurements, model_accuracy
from gossamer.evaluation.evaluate import evaluate_run
from gossamer.runs.record import Run


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_command(arguments, os.environ, timeout=1200)


@pytest.fixture
def command_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function that runs the command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "400")
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def quick_config(seed: int = 0) -> DemoConfig:
    config = demo_config(seed)
    return replace(
        config,
        width=16,
        layers=2,
        heads=2,
        dense=replace(config.dense, batch_size=32),
        dense_steps=4,
        sparse_steps=4,
        sparse=replace(config.sparse, batch_size=32, checkpoint_every=2, validations=2),
        validation=50,
        held_out=300,
        gate_bias=1.0,
        circuit_prompts=0,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return demonstrate(tmp_path_factory.mktemp("runs") / "demo", quick_config())


def test_a_demo_leaves_a_run(quick: Run) -> None:
    names = {path.name for path in quick.folder.iterdir()}
    assert names == {
        "attention.json",
        "blocks.safetensors",
        "config.json",
        "dense",
        "dense.jsonl",
        "findings.json",
        "metrics.json",
        "model",
        "report.html",
        "training.jsonl",
    }
    assert f'"name":"{quick.folder.name}"' in (quick.folder / "report.html").read_text()
    assert not [path for path in quick.folder.parent.iterdir() if path != quick.folder]
    held_out = split_pairs(validation=50, held_out=300, seed=0).held_out
    assert torch.equal(quick.blocks("held_out"), held_out.blocks())
    sparse, dense = gossamer.load(quick.model), AutoModelForCausalLM.from_pretrained(quick.dense)
    assert AutoTokenizer.from_pretrained(quick.dense)("37+58=095")["input_ids"] == [3, 7, 10, 5, 8, 11, 0, 9, 5]
    figures = json.loads(quick.metrics.read_text())["addition"]
    assert figures["accuracy_sparse"]["exact"] == model_accuracy(sparse, held_out).exact
    assert figures["accuracy_dense"]["exact"] == model_accuracy(dense, held_out).exact
    assert figures["open_links_mean"] == pytest.approx(Measurements(sparse, held_out).map().mean)
    assert figures["links_allowed"] == 2 * 2 * TOKENS * (TOKENS + 1) // 2
    assert set(figures["seconds"]) == {"training_dense", "training_sparse", "measuring"}
    findings = json.loads((quick.folder / "findings.json").read_text())
    assert findings["positions"] == list(POSITIONS)
    assert all(set(sentence) == {"text", "links", "evidence"} for sentence in findings["sentences"])


def test_the_losses_are_those_of_the_answer_digits(quick: Run) -> None:
    metrics = json.loads(quick.metrics.read_text())
    dense, blocks = AutoModelForCausalLM.from_pretrained(quick.dense), quick.blocks("held_out")
    with torch.no_grad():
        logits = dense(input_ids=blocks).logits[:, 5:8]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 6:].flatten())
    assert metrics["loss_dense"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["tokens_evaluated"] == 3 * len(blocks)


def test_evaluating_a_demo_again_keeps_what_is_said_of_sums(quick: Run) -> None:
    before = json.loads(quick.metrics.read_text())
    after = evaluate_run(quick, batch_size=500)
    assert after["addition"] == before["addition"]
    assert after["loss_sparse"] == before["loss_sparse"]
    assert addition_table(after).row_count > 4


def test_the_same_seed_gives_the_same_run_and_another_one_another(quick: Run, tmp_path: Path) -> None:
    def weights(run: Run) -> dict[str, torch.Tensor]:
        return gossamer.load(run.model).state_dict()

    again, other = (demonstrate(tmp_path / str(seed), quick_config(seed)) for seed in (0, 1))
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(quick).items())
    assert not torch.equal(again.blocks("held_out"), other.blocks("held_out"))


def test_circuits_of_a_demo_are_found_from_its_own_dense_model(quick: Run) -> None:
    record = compare_circuits(quick, TASKS["addition"], SearchConfig(examples=8, score="eap", force=True))
    assert set(record["models"]) == {"dense", "sparse"}
    assert (quick.folder / "circuits" / "addition" / "circuits.json").exists()


def test_an_existing_directory_is_refused_and_untouched(quick: Run, tmp_path: Path, command_here) -> None:
    with pytest.raises(GossamerError, match="exists already"):
        demonstrate(quick.folder, quick_config())
    (tmp_path / "taken").mkdir()
    code, _, errors = command_here("demo", "--out", tmp_path / "taken")
    assert code == 2
    assert errors.splitlines() == [f"gossamer: {tmp_path / 'taken'} exists already; give another --out, or remove it"]
    assert not list((tmp_path / "taken").iterdir())


def test_a_demo_that_fails_leaves_nothing(tmp_path: Path) -> None:
    config = quick_config()
    diverging = replace(config, dense=replace(config.dense, learning_rate=1e30, max_grad_norm=1e30))
    with pytest.raises(GossamerError, match="the loss became"):
        demonstrate(tmp_path / "demo", diverging)
    assert not list(tmp_path.iterdir())


def test_inspect_shows_a_demo(quick: Run, command_here) -> None:
    code, shown, errors = command_here("inspect", quick.folder)
    assert code == 0, errors
    assert "sums never seen in training" in shown
    for sentence in json.loads((quick.folder / "findings.json").read_text())["sentences"]:
        assert sentence["text"][:60] in shown


def test_a_demo_can_be_asked_to_add(quick: Run, command_here) -> None:
    code, shown, errors = command_here("task", "addition", "--model", quick.folder, "--examples", 20)
    assert code == 0, errors
    assert "right" in shown


@pytest.mark.slow
def test_the_demo_adds_with_few_links(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = command("demo", "--out", out)
    assert result.returncode == 0, result.stderr
    figures = json.loads((out / "metrics.json").read_text())["addition"]
    assert figures["accuracy_dense"]["exact"] >= 0.99
    assert figures["accuracy_sparse"]["exact"] >= 0.995
    assert figures["open_links_mean"] <= 12
    for sentence in json.loads((out / "findings.json").read_text())["sentences"]:
        assert sentence["text"][:50] in result.stdout
    shown = command("task", "addition", "--model", out)
    assert shown.returncode == 0, shown.stderr
    assert "right" in shown.stdout
