"""gossamer sparsify: the files of a run, starting from another run, and every way to train."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gossamer
from command_line import Finished, assert_refused, gossamer_command, quick, weights
from gossamer.training.checkpoints import checkpoints


def test_a_run_leaves_a_sparse_model_and_its_figures(finished: Finished) -> None:
    out, printed = finished.out, finished.printed
    metrics = json.loads((out / "metrics.json").read_text())
    for key in ("loss_dense", "loss_sparse", "loss_dense_control", "tau", "kl", "open_fraction",
                "open_links_per_query", "seq_len", "tokens_trained", "constraint_met"):  # fmt: skip
        assert metrics[key] is not None
    assert metrics["tokens_trained"] == 60 * 64
    assert gossamer.is_gated(gossamer.load(out / "model"))
    assert f"{metrics['loss_sparse']:.4f}" in printed
    assert "open" in printed
    assert "tokens/s" in printed
    assert "λ" in printed
    record = json.loads((out / "config.json").read_text())
    assert record["config"]["seed"] == 0
    assert record["constraint"] == {
        "name": "ce",
        "symbol": "τ",
        "label": "loss",
        "bound": record["measured"]["loss_dense"] + 0.01,
    }
    assert {"torch", "transformers", "gossamer", "python"} <= set(record["versions"])
    assert [json.loads(line)["step"] for line in (out / "training.jsonl").read_text().splitlines()] == list(
        range(1, 61)
    )
    assert not list(out.glob("*checkpoints*"))


def test_a_run_starts_from_another_ones_sparse_model_and_control(finished: Finished, tmp_path: Path) -> None:
    start, saved_llama, text = finished.out, finished.model, finished.text
    out = tmp_path / "second"
    still = quick(learning_rate=1e-30, gate_learning_rate=1e-30)
    line = [*still, "--tokens", 2 * 128, "--seed", 1, "--start-from", start]
    line[line.index("--seq-len") + 1] = 32
    result = gossamer_command("sparsify", saved_llama, "--text", text, "--out", out, *line)
    assert result.returncode == 0, result.stderr
    for part in ("model/gossamer.safetensors", "control/model.safetensors"):
        before, after = weights(start, part), weights(out, part)
        assert before.keys() == after.keys()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-12)
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["tokens_trained_before"], metrics["tokens_trained"]) == (60 * 64, 2 * 128)
    dense = AutoModelForCausalLM.from_pretrained(saved_llama).eval()
    blocks = load_file(out / "blocks.safetensors")["validation"].long()
    with torch.no_grad():
        loss = dense(input_ids=blocks, labels=blocks).loss.item()
    measured = json.loads((out / "config.json").read_text())["measured"]
    assert measured["loss_dense"] == pytest.approx(loss, rel=1e-4)
    assert json.loads((out / "model" / "config.json").read_text())["base"] == str(saved_llama)
    assert str(saved_llama) not in (out / "model" / "README.md").read_text()
    third = gossamer_command(
        "sparsify", saved_llama, "--text", text, "--out", tmp_path / "third", *line[:-1], out, "--no-control"
    )
    assert third.returncode == 0, third.stderr
    metrics = json.loads((tmp_path / "third" / "metrics.json").read_text())
    assert metrics["tokens_trained_before"] == 60 * 64 + 2 * 128


def test_what_a_run_cannot_start_from_is_named(finished: Finished, tmp_path: Path) -> None:
    start, saved_llama, text = finished.out, finished.model, finished.text
    line = ["--text", text, "--out", tmp_path / "run", *quick(), "--tokens", 128, "--start-from"]
    assert_refused(gossamer_command("sparsify", saved_llama, *line, saved_llama), str(saved_llama), "is not a run")
    assert_refused(gossamer_command("sparsify", "smollm2", *line, start), "a run of", str(saved_llama), "smollm2")
    assert_refused(
        gossamer_command("sparsify", saved_llama, *line, start, "--train", "lora"), "--train all or attention"
    )
    assert_refused(gossamer_command("sparsify", saved_llama, *line, start, "--stream"), "without --stream; do not")
    copied = tmp_path / "copied"
    shutil.copytree(start, copied)
    shutil.rmtree(copied / "control")
    assert_refused(gossamer_command("sparsify", saved_llama, *line, copied), str(copied), "--no-control")
    shutil.rmtree(copied / "model")
    assert_refused(gossamer_command("sparsify", saved_llama, *line, copied), str(copied), "no sparse model yet")
    assert not (tmp_path / "run").exists()


def test_a_bound_below_the_dense_loss_warns_at_once_and_says_so_after(saved_llama: Path, text: Path, tmp_path: Path):
    result = gossamer_command(
        "sparsify", saved_llama, "--text", text, "--out", tmp_path / "run", "--tokens", 128, "--tau", 0.5,
        "--no-control", *quick(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "tau 0.500 is below the dense model's held-out loss" in result.stderr
    assert (
        "neither a common shift of the gate biases brings it inside nor weights drawn towards the dense ones"
        in result.stderr
    )
    assert "Constraint NOT met" in result.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["constraint_met"] is False
    assert metrics["tau"] == 0.5
    assert metrics["loss_dense_control"] is None


@pytest.mark.parametrize("options", [["--constraint", "kl", "--epsilon", 0.3], ["--train", "lora"], ["--train", "all"],
                                     ["--text", "self"], {"gradient_accumulation": 2},
                                     {"validations": 1}])  # fmt: skip
def test_other_ways_to_train(options: list | dict, saved_llama: Path, text: Path, tmp_path: Path) -> None:
    settings, options = (options, []) if isinstance(options, dict) else ({}, options)
    chosen = options if "--text" in options else [*options, "--text", text]
    arguments = [*quick(checkpoint_every=1, validation_tokens=256, **settings), "--tokens", 256, *chosen]
    result = gossamer_command("sparsify", saved_llama, "--out", tmp_path / "run", *arguments)
    assert result.returncode == 0, result.stderr
    assert bool(re.search(r"sampling text (\d+)/\1 blocks  0 s left", result.stdout)) == ("self" in options)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    if "kl" in options:
        assert metrics["constraint"] == "kl"
        assert metrics["constraint_met"] == (metrics["kl"] <= 0.3)
    measured = ["constrained_held_out" in json.loads(line) for line in
                (tmp_path / "run" / "training.jsonl").read_text().splitlines()]  # fmt: skip
    assert measured == ([False] * (len(measured) - 1) + [True] if "validations" in settings else [True] * len(measured))


def test_a_loss_that_explodes_stops_the_run_at_its_step(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    arguments = [*quick(checkpoint_every=1, learning_rate=1e30), "--tokens", 20 * 64]
    result = gossamer_command("sparsify", saved_llama, "--text", text, "--out", tmp_path / "run", *arguments)
    assert_refused(result, "the loss became nan in step", "last good checkpoint", "lower learning_rate")
    failed = int(re.search(r"in step (\d+)", result.stderr)[1])
    steps = [int(path.name.split("-")[1]) for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert failed == 2  # the first update has the full learning rate
    assert not steps


def test_a_preset_gives_what_the_command_line_does_not_say(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = [
        "--preset",
        "gpt2",
        "--text",
        text,
        "--out",
        out,
        *quick(),
        "--tokens",
        128,
        "--batch-size",
        2,
        "--no-control",
    ]
    result = gossamer_command("sparsify", saved_llama, *given)
    assert result.returncode == 0, result.stderr
    used = json.loads((out / "config.json").read_text())["config"]
    assert used["model"] == str(saved_llama)
    assert used["seq_len"] == 16
    assert used["precision"] == "fp32"
    assert used["batch_size"] == 2
    assert used["gradient_accumulation"] == 2  # from the preset; the default is 1
    assert used["tokens"] == 128
    result = gossamer_command("sparsify", "--preset", "gpt2", "--out", tmp_path / "other")
    assert_refused(result, "no model 'openai-community/gpt2'")
    assert not (tmp_path / "other").exists()
    assert_refused(gossamer_command("sparsify", "--preset", "gpt3", "--out", out), "no preset 'gpt3'", "smollm2")


def test_printed_settings_are_a_file_that_sparsify_takes(
    saved_llama: Path, text: Path, tmp_path: Path, command_here
) -> None:
    code, printed, errors = command_here("settings")
    assert code == 0, errors
    changed = {"learning_rate: 0.0001": "learning_rate: 5e-4", "tokens: 1000000": "tokens: 64",
               "validation_tokens: 8192": "validation_tokens: 64",
               "held_out_tokens: 32768": "held_out_tokens: 64"}  # fmt: skip
    for before, after in changed.items():
        assert before in printed
        printed = printed.replace(before, after)
    file = tmp_path / "settings.yaml"
    file.write_text(printed)
    line = ["sparsify", saved_llama, "--text", text, "--out", tmp_path / "run", "--seq-len", 16, "--config", file]
    code, _, errors = command_here(*line, "--no-control", "--preset", "gpt2")
    assert code == 0, errors
    used = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (used["model"], used["tokens"], used["learning_rate"], used["seq_len"]) == (str(saved_llama), 64, 5e-4, 16)
    assert (used["batch_size"], used["control"], used["stream"]) == (4, False, False)  # the file's, not the preset's
