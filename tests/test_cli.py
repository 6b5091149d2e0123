"""The command line as a user meets it: real processes, real files, kills, full disks, every bad input."""

import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import gossamer
from families import tiny_model
from forked import run_command
from gossamer.cli import app, main
from gossamer.training.checkpoints import checkpoint_error, checkpoints
from settings_files import config
from tiny_task import TINY_TASK

COMMAND = [sys.executable, "-m", "gossamer.cli"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def quick(**settings: object) -> list[str]:
    """Options of a small run, with a file of these settings besides."""
    return ["--seq-len", "16", *config(held_out_tokens=128, precision="fp32", **settings)]


def gossamer_command(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return run_command(arguments, ENVIRONMENT, **options)


def weights(run: Path, part: str = "model/gossamer.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run / part)


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in result.stdout + result.stderr


@pytest.fixture(scope="module")
def finished(saved_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run of 60 steps that nothing interrupted, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    arguments = [*quick(checkpoint_every=5, gate_learning_rate=0.02), "--tokens", 60 * 64]
    result = gossamer_command("sparsify", saved_llama, "--text", text, "--out", out, *arguments)
    assert result.returncode == 0, result.stderr
    return out, result, arguments


def test_a_run_leaves_a_sparse_model_and_its_figures(finished) -> None:
    out, result, _ = finished
    metrics = json.loads((out / "metrics.json").read_text())
    for key in ("loss_dense", "loss_sparse", "loss_dense_control", "tau", "kl", "open_fraction",
                "open_links_per_query", "seq_len", "tokens_trained", "constraint_met"):  # fmt: skip
        assert metrics[key] is not None
    assert metrics["tokens_trained"] == 60 * 64
    assert gossamer.is_gated(gossamer.load(out / "model"))
    assert f"{metrics['loss_sparse']:.4f}" in result.stdout
    assert "open" in result.stdout
    assert "tokens/s" in result.stdout
    assert "λ" in result.stdout
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


def test_evaluate_and_inspect_repeat_the_figures(finished) -> None:
    out, _, _ = finished
    before = json.loads((out / "metrics.json").read_text())
    result = gossamer_command("evaluate", out)
    assert result.returncode == 0, result.stderr
    after = json.loads((out / "metrics.json").read_text())
    assert after == before
    for target, word in ((out, "Constraint"), (out / "model", "gate bias")):
        shown = gossamer_command("inspect", target)
        assert shown.returncode == 0
        assert word in shown.stdout


@pytest.fixture(scope="module")
def folder_of_text(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents of ``text`` in three files."""
    folder = tmp_path_factory.mktemp("folder")
    with gzip.open(text, "rt", encoding="utf-8") as stream:
        lines = stream.readlines()
    for number in range(3):
        (folder / f"{number}.jsonl").write_text("".join(lines[number::3]))
    return folder


def test_a_run_that_reads_its_text_while_training_goes_on_where_it_was_killed(
    saved_llama: Path, folder_of_text: Path, tmp_path: Path
) -> None:
    """Bit for bit, though two workers had read ahead; the text is short enough to begin again."""
    settings = [*quick(stream_workers=2, checkpoint_every=5), "--stream", "--tokens", 200 * 64]
    line = ["sparsify", saved_llama, "--text", folder_of_text, *settings, "--out"]
    result = gossamer_command(*line, tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    assert "began again" in result.stderr
    for log, lines in (("training.jsonl", 33), ("control.jsonl", 52)):
        process = subprocess.Popen(
            [*COMMAND, *map(str, line), str(tmp_path / "killed"), "--resume"],
            env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        rows = tmp_path / "killed" / log
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if rows.exists() and len(rows.read_text().splitlines()) >= lines:
                break
            time.sleep(0.002)
        assert process.poll() is None, f"{log}: ended before it could be killed"
        process.kill()
        process.wait()
    result = gossamer_command(*line, tmp_path / "killed", "--resume")
    assert result.returncode == 0, result.stderr
    for part in ("model/gossamer.safetensors", "control/model.safetensors"):
        a, b = weights(tmp_path / "whole", part), weights(tmp_path / "killed", part)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_faults_of_a_stream_are_one_line(saved_llama: Path, folder_of_text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text((folder_of_text / "0.jsonl").read_text() + "{broken\n")
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "the model"}\n')
    for text, words in ((broken, ["line 135", "not valid JSON"]), (short, ["short.jsonl"]), ("self", ["--stream"])):
        out = tmp_path / "out"
        line = ["sparsify", saved_llama, "--text", text, *quick(), "--stream", "--tokens", 200 * 64, "--out", out]
        assert_refused(gossamer_command(*line), *words)


def test_a_run_killed_again_and_again_ends_bit_for_bit_the_same(
    finished, saved_llama: Path, text: Path, tmp_path: Path
):
    whole, _, arguments = finished
    out = tmp_path / "killed"
    line = ["sparsify", saved_llama, "--text", text, "--out", out, *arguments, "--resume"]
    for log, lines in ((None, 0), ("training.jsonl", 7), ("training.jsonl", 33), ("control.jsonl", 21)):
        process = subprocess.Popen(
            [*COMMAND, *map(str, line)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log is None or ((out / log).exists() and len((out / log).read_text().splitlines()) >= lines):
                break
            time.sleep(0.002)
        assert process.poll() is None, f"{log}: ended before it could be killed: {process.stderr.read().decode()}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    result = gossamer_command(*line)
    assert result.returncode == 0, result.stderr
    for part in ("model/gossamer.safetensors", "control/model.safetensors"):
        a, b = weights(whole, part), weights(out, part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [json.loads(row) for row in (out / "training.jsonl").read_text().splitlines()]
    known = [json.loads(row) for row in (whole / "training.jsonl").read_text().splitlines()]
    for a, b in zip(steps, known, strict=True):
        for key in ("step", "constrained", "constrained_held_out", "multiplier", "open_fraction", "learning_rate"):
            assert a.get(key) == b.get(key)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.fixture
def begun(saved_llama: Path, text: Path, tmp_path: Path):
    """A run killed after its second checkpoint."""
    out = tmp_path / "begun"
    line = ["sparsify", saved_llama, "--text", text, "--out", out, *quick(checkpoint_every=3),
            "--tokens", 4000 * 64]  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, *map(str, line)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(checkpoints(out / "checkpoints")) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return out, [*line, "--resume"]


def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint_alone(begun) -> None:
    """Files over 20 kB cannot be written, as on a disk that fills up in the middle of one."""
    out, line = begun
    good = [path for path in checkpoints(out / "checkpoints") if checkpoint_error(path) is None][-1]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    result = subprocess.run([*COMMAND, *map(str, line)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300,
                            preexec_fn=limit)  # fmt: skip
    assert_refused(result, "cannot write", "checkpoint-", "untouched")
    assert checkpoint_error(good) is None
    assert not list((out / "checkpoints").glob(".*"))


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_used(begun, saved_llama: Path, text: Path) -> None:
    out, line = begun
    older, newest = [path for path in checkpoints(out / "checkpoints") if checkpoint_error(path) is None][-2:]
    file = newest / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    process = subprocess.Popen([*COMMAND, *map(str, line)], env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    warning = process.stderr.readline()
    process.kill()
    process.communicate()
    assert newest.name in warning
    assert "optimizer.pt has 1,000 of" in warning
    assert older.name in warning


def test_resuming_with_other_settings_is_refused(finished, saved_llama: Path, text: Path) -> None:
    out, _, arguments = finished
    line = ["sparsify", saved_llama, "--text", text, "--out", out, *arguments]
    assert_refused(gossamer_command(*line), str(out), "--resume")
    assert_refused(gossamer_command(*line, "--resume", "--slack", 0.5), "slack=0.01", "0.5")


def test_a_run_starts_from_another_ones_sparse_model_and_control(
    finished, saved_llama: Path, text: Path, tmp_path: Path
):
    start, _, _ = finished
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


def test_what_a_run_cannot_start_from_is_named(
    finished, saved_llama: Path, text: Path, bad_folder: Path, tmp_path: Path
) -> None:
    start, _, _ = finished
    line = ["--text", text, "--out", tmp_path / "run", *quick(), "--tokens", 128, "--start-from"]
    assert_refused(gossamer_command("sparsify", saved_llama, *line, bad_folder), str(bad_folder), "is not a run")
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


def bad_models(folder: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97}
    BertLMHeadModel(BertConfig(intermediate_size=32, **small)).save_pretrained(folder / "bert")
    T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=97)
    ).save_pretrained(folder / "t5")
    (folder / "hollow").mkdir()


BAD_INPUT = {
    "no such model": (["nobody/nothing"], ["no model 'nobody/nothing'"]),
    "directory without a model": (["{folder}/hollow"], ["without config.json"]),
    "unsupported family": (["{folder}/bert"], ["bert", "decoders only"]),
    "encoder-decoder": (["{folder}/t5"], ["t5", "not a causal language model"]),
    "no such text": (["{model}", "--text", "missing.txt"], ["missing.txt", "no such file"]),
    "empty text": (["{model}", "--text", "{folder}/empty.txt"], ["empty.txt", "is empty"]),
    "short text": (["{model}", "--text", "{folder}/short.txt"], ["short.txt", "shorter than one block of 16"]),
    "over the context": (["{model}", "--seq-len", "65"], ["--seq-len 65", "context of 64"]),
    "no length": (["{model}", "--seq-len", "1"], ["--seq-len 1", "from 2 to"]),
    "unwritable": (["{model}", "--out", "{folder}/empty.txt/run"], ["cannot write", "empty.txt/run"]),
    "read-only": (["{model}", "--out", "/proc/gossamer/run"], ["cannot write", "/proc/gossamer/run"]),
    "unknown watcher": (["{model}", "--report-to", "tensorbord"], ["--report-to tensorbord", "tensorboard, wandb"]),
    "nothing to hold": (["{model}", "--constraint", "kl", "--epsilon", "0"], ["--epsilon 0", "no KL is below 0"]),
    "no number": (["{model}", "--tau", "nan"], ["--tau nan", "finite"]),
    "no tokens": (["{model}", "--tokens", "0"], ["--tokens 0 cannot be used", "from 1 to"]),
    "no such constraint": (["{model}", "--constraint", "kll"], ["--constraint kll", "one of ce, kl"]),
    "of another constraint": (
        ["{model}", "--epsilon", "0.1"],
        ["--epsilon is a setting of the constraint kl"],
    ),
    "cut-off weights": (["{folder}/cut"], ["{folder}/cut", "cut short"]),
    "lost weights": (["{folder}/lossy"], ["{folder}/lossy", "is not whole: it lacks model.layers.1"]),
    "gated already": (["{folder}/gated"], ["gated", "give the dense model"]),
}


@pytest.fixture(scope="module")
def bad_folder(saved_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    bad_models(folder)
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("one two")
    gossamer.save(gossamer.add_gates(tiny_model("llama")), folder / "gated")
    for name in ("cut", "lossy"):
        shutil.copytree(saved_llama, folder / name)
    file = folder / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    file = folder / "lossy" / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "layers.1." not in name}
    save_file(kept, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    case: str, bad_folder: Path, saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    arguments, words = BAD_INPUT[case]
    filled = [word.format(folder=bad_folder, model=saved_llama) for word in arguments]
    defaults = {"--text": text, "--out": tmp_path / "run", "--seq-len": 16}
    for flag, value in defaults.items():
        filled += [] if flag in filled else [flag, str(value)]
    before = sorted(bad_folder.rglob("*"))
    assert_refused(gossamer_command("sparsify", *filled), *(word.format(folder=bad_folder) for word in words))
    assert not list(tmp_path.iterdir())
    assert sorted(bad_folder.rglob("*")) == before


@pytest.mark.parametrize("verb", ["evaluate", "inspect"])
def test_what_is_no_run_is_named(verb: str, tmp_path: Path) -> None:
    assert_refused(gossamer_command(verb, tmp_path), str(tmp_path))


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
    arguments = [*quick(checkpoint_every=1, **settings), "--tokens", 256, *chosen]
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


def test_adapters_of_a_run_merge_into_its_model(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    run, line = tmp_path / "run", ["sparsify", saved_llama, "--text", text, "--train", "lora", "--tokens", 256]
    refused = gossamer_command(*line, "--out", run, *quick(lora_targets=["q_proj", "w_proj"]))
    assert_refused(refused, "linear map 'w_proj'", "self_attn.q_proj")
    assert not run.exists()
    result = gossamer_command(
        *line,
        "--out",
        run,
        "--constraint",
        "kl",
        *quick(lora_rank=2, lora_alpha=6, lora_targets="q_proj, v_proj"),
    )
    assert result.returncode == 0, result.stderr
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], set(adapter["target_modules"])) == (2, 6, {"q_proj", "v_proj"})
    merge = ["merge", run / "adapter", "--out", tmp_path / "merged", "--model"]
    merged = gossamer_command(*merge, saved_llama)
    assert merged.returncode == 0, merged.stderr
    assert "gate bias" in merged.stdout
    a, b = weights(run), weights(tmp_path, "merged/gossamer.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert_refused(gossamer_command(*merge, saved_llama), "merged exists already")
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    for file in saved_llama.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    merge[3] = tmp_path / "another"
    assert_refused(gossamer_command(*merge, other), "is not the model that", "embed_tokens")
    merge[1] = run
    assert_refused(gossamer_command(*merge, saved_llama), "holds no adapters that gossamer saved")
    assert not (tmp_path / "another").exists()


def test_a_loss_that_explodes_stops_the_run_at_its_step(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    arguments = [*quick(checkpoint_every=1, learning_rate=1e30), "--tokens", 20 * 64]
    result = gossamer_command("sparsify", saved_llama, "--text", text, "--out", tmp_path / "run", *arguments)
    assert_refused(result, "the loss became nan in step", "last good checkpoint", "lower learning_rate")
    failed = int(re.search(r"in step (\d+)", result.stderr)[1])
    steps = [int(path.name.split("-")[1]) for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert failed == 2  # the first update is one of the full rate
    assert not steps


def test_the_command_line_loads_nothing_heavy_before_it_has_to() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    line = [sys.executable, "-c", f"import sys, gossamer, gossamer.cli, gossamer.runs.settings_file; print({heavy})"]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_help_names_every_command() -> None:
    result = gossamer_command("--help")
    assert result.returncode == 0
    verbs = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    assert len(verbs) > 10
    assert {verb for verb in verbs if not re.search(rf"^│ {verb}\s", result.stdout, re.MULTILINE)} == set()


@pytest.fixture(scope="module")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples that the tiny tokenizer can write."""
    file = tmp_path_factory.mktemp("tasks") / "own.jsonl"
    rows = [
        {"clean": f"the sparse {a} reads", "corrupted": f"the sparse {b} reads", "answers": [" two"], "wrong": [" one"]}
        for a in ("model", "link", "token") for b in ("row", "need")
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows).replace("token ", "tokens "))
    return file


def test_task_shows_examples_and_how_well_the_model_does(finished, own_task: Path) -> None:
    out, _, _ = finished
    for model in (out, out / "model"):
        result = gossamer_command("task", own_task, "--model", model, "--examples", 4)
        assert result.returncode == 0, result.stderr
        assert "the sparse" in result.stdout
        assert re.search(r"prompts\s+│\s+4", result.stdout)
        assert "logit difference, corrupted" in result.stdout


def test_circuits_of_some_levels_under_another_ablation_stand_beside_the_others(finished, own_task: Path) -> None:
    out, _, _ = finished
    line = ["circuits", out, "--task", own_task, "--examples", 4, "--score", "eap", "--force"]
    result = gossamer_command(*line, "--ablation", "zero", "--levels", "links")
    assert result.returncode == 0, result.stderr
    record = json.loads((out / "circuits" / "own-zero" / "circuits.json").read_text())
    assert record["ablation"] == "zero"
    assert set(record["models"]["sparse"]["levels"]) == {"links"}
    assert_refused(gossamer_command(*line, "--levels", "links,heads"), "--levels", "links,heads", "nodes")
    assert_refused(gossamer_command(*line, "--ablation", "mean", "--levels", "links"), "no mean")


def test_circuits_leaves_a_record_of_both_models(finished, own_task: Path) -> None:
    out, _, _ = finished
    result = gossamer_command("circuits", out, "--task", own_task, "--examples", 4, "--force")
    assert result.returncode == 0, result.stderr
    assert "dense : sparse" in result.stdout
    record = json.loads((out / "circuits" / "own" / "circuits.json").read_text())
    assert record["prompts"] == 4
    scores = load_file(out / "circuits" / "own" / "scores.safetensors")
    for name, model in record["models"].items():
        assert set(model["levels"]) == {"nodes", "edges", "links"}
        assert model["levels"]["nodes"]["total"] == len(scores[name])
        assert model["levels"]["edges"]["metric_everything"] == pytest.approx(model["metric_clean"], abs=1e-4)
        assert model["levels"]["edges"]["metric_nothing"] == pytest.approx(model["metric_corrupted"], abs=1e-4)
        assert model["levels"]["links"]["points"][-1]["faithfulness"] == pytest.approx(1.0)


def test_the_page_shows_the_very_prompt_of_the_circuit(
    finished, saved_llama: Path, own_task: Path, tmp_path: Path
) -> None:
    """With a tokenizer that puts a start token before every text, as Llama 3's does."""
    start, _, _ = finished
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(saved_llama, model)
    shutil.copytree(start, out, ignore=shutil.ignore_patterns("circuits", "attention.json"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=begin)
    tokenizer.save_pretrained(model)
    (out / "config.json").write_text((out / "config.json").read_text().replace(str(saved_llama), str(model)))
    line = ["circuits", out, "--task", own_task, "--examples", 2, "--score", "eap", "--levels", "links", "--force"]
    result = gossamer_command(*line)
    assert result.returncode == 0, result.stderr
    links = json.loads((out / "circuits" / "own" / "links.json").read_text())
    assert links["tokens"][:2] == ["<s>", "the"]
    result = gossamer_command("report", out)
    assert result.returncode == 0, result.stderr
    shown = json.loads((out / "attention.json").read_text())["prompts"][0]
    assert shown["note"] == "task"
    assert shown["tokens"] == links["tokens"]


def test_a_circuit_goes_out_and_comes_back(finished, own_task: Path, tmp_path: Path) -> None:
    start, _, _ = finished
    out = tmp_path / "run"
    shutil.copytree(start, out, ignore=shutil.ignore_patterns("circuits"))
    arguments = ["--task", own_task, "--examples", 4, "--score", "eap", "--force"]
    result = gossamer_command("circuits", out, *arguments, "--ablation", "zero", "--levels", "links", "--signed")
    assert result.returncode == 0, result.stderr
    line = ["circuits", out, *arguments, "--seeds", 2, "--ablation", "zero", "--signed"]
    assert_refused(gossamer_command(*line), "own-zero holds circuits found with", "seeds 1, not 2", "--replace")
    result = gossamer_command(*line, "--replace")
    assert result.returncode == 0, result.stderr
    assert "2 variations" in result.stdout
    record = json.loads((out / "circuits" / "own-zero" / "circuits.json").read_text())
    assert [each["seed"] for each in record["variations"]] == [0, 1]
    assert 0 <= record["overlap"]["sparse"] <= 1
    links = json.loads((out / "circuits" / "own-zero" / "links.json").read_text())
    assert len(links["tokens"]) == len(links["prompt"].split()) == len(links["ids"])
    everything = record["models"]["sparse"]["levels"]["edges"]["total"]
    for suffix in (".json", ".pt", ".graphml"):
        file = tmp_path / f"circuit{suffix}"
        result = gossamer_command("export", out, "--task", own_task, "--out", file,
                                  "--edges", everything, "--ablation", "zero")  # fmt: skip
        assert result.returncode == 0, result.stderr
        result = gossamer_command(
            "evaluate-circuit", file, "--model", out, "--task", own_task, "--examples", 4, "--force"
        )
        assert result.returncode == 0, result.stderr
        assert re.search(r"faithfulness\s+│\s+1\.000", result.stdout)
    few = record["models"]["sparse"]["levels"]["edges"]["shares"][-3]
    (measured,) = (
        point["metric"] for point in record["models"]["sparse"]["levels"]["edges"]["points"] if point["size"] == few
    )
    gossamer_command("export", out, "--task", own_task, "--out", file, "--edges", few, "--ablation", "zero")
    proof = ("--model", out, "--task", own_task, "--examples", 4, "--ablation", "zero", "--force")
    result = gossamer_command("evaluate-circuit", file, *proof)
    assert re.search(rf"mean logit difference\s+│\s+{measured:.3f}".replace("-", r"\-"), result.stdout), result.stdout
    another = gossamer_command("evaluate-circuit", file, "--model", "smollm2", "--task", "ioi")
    assert_refused(another, "circuit.graphml is a circuit of another model", "30 layers of 9 heads")
    assert_refused(gossamer_command("export", out, "--task", "ioi", "--out", file), "has no circuits of ioi")
    wrong = gossamer_command("export", out, "--task", own_task, "--out", tmp_path / "circuit.xml",
                             "--edges", 3, "--ablation", "zero")  # fmt: skip
    assert_refused(wrong, "circuit.xml has to end in .json, .pt or .graphml")
    assert_refused(gossamer_command("circuits", out, "--task", own_task, "--rephrased"), "no other phrasings")


def test_what_circuits_cannot_use_is_refused(finished, own_task: Path, tmp_path: Path) -> None:
    out, _, _ = finished
    assert_refused(gossamer_command("task", "oii", "--model", out), "no task 'oii'", "ioi")
    assert_refused(gossamer_command("circuits", tmp_path, "--task", own_task), "is not a run")
    uneven = tmp_path / "uneven.jsonl"
    uneven.write_text(json.dumps({"clean": "the", "corrupted": "the row", "answers": [" one"], "wrong": [" two"]}))
    assert_refused(gossamer_command("task", uneven, "--model", out), "has 1 tokens, the corrupted one 2")
    backwards = tmp_path / "backwards.jsonl"
    rows = [json.loads(line) for line in own_task.read_text().splitlines()]
    ability = {}
    for name, flip in (("own", False), ("flipped", True)):
        changed = [{**row, "answers": row["wrong"], "wrong": row["answers"]} if flip else row for row in rows]
        backwards.write_text("".join(json.dumps(row) + "\n" for row in changed))
        ability[name] = gossamer_command("circuits", out, "--task", backwards, "--examples", 4)
    refused = [result for result in ability.values() if result.returncode]
    assert refused  # a model cannot prefer both answers
    assert_refused(refused[0], "the model cannot do backwards", "% of 4 prompts right", "--force")


def test_a_model_without_a_tokenizer_is_named(saved_llama: Path, own_task: Path, tmp_path: Path) -> None:
    gossamer.save(gossamer.add_gates(tiny_model("llama")), tmp_path / "gated")
    result = gossamer_command("task", own_task, "--model", tmp_path / "gated")
    assert_refused(result, str(tmp_path / "gated"), "has no tokenizer")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(
    number: signal.Signals, saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    line = ["sparsify", saved_llama, "--text", text, "--out", tmp_path / "run", *quick(), "--tokens", 10**7]
    process = subprocess.Popen(
        [*COMMAND, *map(str, line)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if run in the background
    )  # fmt: skip
    try:
        for _ in range(1200):
            if (tmp_path / "run" / "training.jsonl").exists():
                break
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2
    assert errors.strip() == "gossamer: interrupted; go on with --resume"


def test_import_leaves_a_sparse_model_or_nothing(saved_llama: Path, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {name: t.T.contiguous() if name.endswith(linear) else t for name, t in model.state_dict().items()}
    torch.save({"model": tensors, "model_args": {"n_head": 4}}, tmp_path / "ckpt.pt")
    options = ("--out", tmp_path / "model", "--tokenizer", saved_llama)
    result = gossamer_command("import", tmp_path / "ckpt.pt", *options)
    assert result.returncode == 0, result.stderr
    assert "gate bias" in result.stdout
    ids = torch.arange(3, 12)[None]
    wanted = gossamer.add_gates(model)(input_ids=ids).logits
    assert torch.equal(gossamer.load(tmp_path / "model")(input_ids=ids).logits, wanted)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert_refused(gossamer_command("import", tmp_path / "ckpt.pt", *options), "exists already")
    del tensors["transformer.h.1.ln_2.bias"]
    torch.save(tensors, tmp_path / "cut.pt")
    options = ("--out", tmp_path / "none", "--heads", 4)
    assert_refused(gossamer_command("import", tmp_path / "cut.pt", *options), "cut.pt", "transformer.h.1.ln_2.bias")
    result = gossamer_command("import", tmp_path / "ckpt.pt", "--out", tmp_path / "none", "--tokenizer", tmp_path)
    assert_refused(result, "no tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "cut.pt", "model"]


def test_evaluate_adds_tasks_to_the_figures(finished, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    out, _, _ = finished
    (tmp_path / "tiny.yaml").write_text(TINY_TASK)
    rows = [{"prompt": f"the {word}", "choices": ["one", "two"], "answer": 0} for word in ("sparse", "model", "row")]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = json.loads((out / "metrics.json").read_text())
    arguments = ("evaluate", out, "--task-path", tmp_path, "--tasks")
    assert_refused(
        gossamer_command("evaluate", out, "--task-path", tmp_path / "none", "--tasks", "tiny"), "none is not"
    )
    assert_refused(gossamer_command(*arguments, "tiny,other"), "no task 'other'", str(tmp_path))
    assert json.loads((out / "metrics.json").read_text()) == before
    result = gossamer_command(*arguments, "tiny")
    assert result.returncode == 0, result.stderr
    after = json.loads((out / "metrics.json").read_text())
    record = after.pop("tasks")["tiny"]
    assert after == before
    assert set(record["models"]) == {"dense", "sparse", "control"}
    assert record["examples"] == 3
    value = record["models"]["sparse"]["acc"]["value"]
    assert 3 * value == pytest.approx(round(3 * value))
    assert f"{value:.4f} ±" in result.stdout
    shown = gossamer_command("inspect", out)
    assert "tiny" in shown.stdout
    again = gossamer_command("evaluate", out)
    assert again.returncode == 0
    assert json.loads((out / "metrics.json").read_text())["tasks"]["tiny"] == record


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
    assert used["gradient_accumulation"] == 2  # the preset's; 1 without it
    assert used["tokens"] == 128
    result = gossamer_command("sparsify", "--preset", "gpt2", "--out", tmp_path / "other")
    assert_refused(result, "no model 'openai-community/gpt2'")
    assert not (tmp_path / "other").exists()
    assert_refused(gossamer_command("sparsify", "--preset", "gpt3", "--out", out), "no preset 'gpt3'", "smollm2")


def test_plan_says_whether_it_fits_and_what_would() -> None:
    roomy = gossamer_command("plan", "smollm2", "--gpus", 2, "--gpu-memory", 80)
    assert roomy.returncode == 0, roomy.stderr
    assert "134,515,008" in roomy.stdout
    assert "estimated" in roomy.stdout
    assert "It should fit" in roomy.stdout
    narrow = gossamer_command("plan", "llama-3.2-1b", "--gpu-memory", 16, "--train", "attention", "--seq-len", 2048)
    assert narrow.returncode == 0, narrow.stderr
    assert "It does not fit" in narrow.stdout
    assert "blocks of 2048 tokens; train attention" in narrow.stdout
    assert re.search(r"batch_size: 1, gradient_accumulation: 16.*: .* GiB, fits", narrow.stdout)
    assert "tokens/s" in narrow.stdout
    assert_refused(gossamer_command("plan", "gpt2", "--seq-len", 4096), "--seq-len 4096", "context of 1024")


@pytest.fixture
def command_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command line in this process, where everything is imported already: exit code, stdout, stderr."""

    def run(*arguments: object, columns: int = 400) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_help_shows_what_a_user_decides_on_two_screens(command_here) -> None:
    lines = command_here("sparsify", "--help", columns=80)[1].splitlines()
    assert len(lines) <= 2 * 40
    assert max(map(len, lines)) <= 80
    options = {word for line in lines for word in re.findall(r"^│ [ *]+(--[a-z-]+)", line)}
    assert options == {
        "--text", "--out", "--preset", "--config", "--tokens", "--seq-len", "--constraint", "--slack", "--tau",
        "--epsilon", "--distillation", "--train", "--seed", "--resume", "--control", "--batch-size", "--report-to",
        "--stream", "--start-from", "--help",
    }  # fmt: skip


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


def test_what_is_not_given_or_cannot_be_read_is_named_in_one_line(tmp_path: Path, command_here) -> None:
    out = ("--out", tmp_path / "none")
    for arguments, words in (
        (("sparsify", "smollm2"), "--text is not given"),
        (("sparsify", "--text", "self"), "MODEL is not given"),
        (("sparsify", "--config", tmp_path / "no.yaml"), "no.yaml cannot be read"),
        (("sparsify", "smollm2", "--text", "self", "--tokens", "many"), "--tokens many cannot be used; give a whole"),
    ):
        code, _, errors = command_here(*arguments, *out)
        assert code == 2
        assert len(errors.splitlines()) == 1
        assert words in errors
    assert not (tmp_path / "none").exists()
