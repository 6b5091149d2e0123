"""Several processes that train one model, started like those of torchrun and accelerate, with gloo between them.

If nothing depends on the launcher, they are forked from a process that has loaded torch, and connect as torchrun's do.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from safetensors.torch import load_file

import gossamer
from families import tiny_model
from forked import run_command, run_together
from gossamer.training.launch import launch_file
from settings_files import config

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def small(steps: int = 40, **settings: object) -> list[str]:
    """Build the options of a small run in float32, including a file with the given settings."""
    known = {"held_out_tokens": 128, "validation_tokens": 208, "checkpoint_every": 10, "precision": "fp32"}
    return ["--seq-len", "16", "--tokens", str(steps * 128), *config(**{**known, **settings})]


ONE = [sys.executable, "-m", "gossamer"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gossamer"]
FORKED = ["two processes that met as those of torchrun do"]


def sharded(folder: Path) -> list[str]:
    """Build a launch command with the FSDP2 configuration that gossamer ships, on CPUs."""
    file = folder / "fsdp2.yaml"
    file.write_text(launch_file("fsdp2").read_text() + "use_cpu: true\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launcher, "--main_process_port", port, str(Path(__file__).parents[1] / "accelerators.py")]


def train(launcher: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    if launcher is ONE:
        return run_command(["sparsify", *arguments], ENVIRONMENT, timeout=120)
    if launcher is FORKED:
        return run_together(["sparsify", *arguments], ENVIRONMENT, 2, timeout=120)
    line = [*launcher, "sparsify", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def steps(run: Path, log: str = "training.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / log).read_text().splitlines()]


def difference(a: Path, b: Path, part: str = "model/gossamer.safetensors") -> float:
    first, second = load_file(a / part), load_file(b / part)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.fixture(scope="module")
def pair(saved_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """An uninterrupted run of two processes, and its arguments without --out."""
    out = tmp_path_factory.mktemp("pair") / "run"
    arguments = [saved_llama, "--text", text, *small(hard_fraction=0.5), "--batch-size", 4]
    result = train(FORKED, *arguments, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Constraint met") == 1
    return out, arguments


def assert_same_trajectory(a: Path, b: Path) -> None:
    for first, second in zip(steps(a), steps(b), strict=True):
        for key in ("constrained", "expected_open_fraction", "open_fraction", "multiplier", "constrained_held_out"):
            assert (key in first) == (key in second)
            assert first.get(key, 0.0) == pytest.approx(second.get(key, 0.0), rel=1e-4, abs=1e-7), (
                first["step"],
                key,
            )
    assert difference(a, b) < 2e-4


def test_two_processes_are_one_with_twice_the_batch(pair, saved_llama: Path, text: Path, tmp_path: Path) -> None:
    """The 13 validation blocks do not divide evenly between the two, and the first steps sample their gates."""
    two, arguments = pair
    one = tmp_path / "one"
    result = train(ONE, *arguments[:-1], 8, "--out", one)
    assert result.returncode == 0, result.stderr
    assert {step["sampled"] for step in steps(one)} == {0.0, 1.0}
    assert_same_trajectory(two, one)
    for first, second in zip(steps(two, "control.jsonl"), steps(one, "control.jsonl"), strict=True):
        assert first["constrained"] == pytest.approx(second["constrained"], rel=1e-4)
    figures = [json.loads((run / "metrics.json").read_text()) for run in (two, one)]
    for key in ("loss_sparse", "loss_dense_control", "open_fraction", "kl"):
        assert figures[0][key] == pytest.approx(figures[1][key], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        pytest.param([], 3e-4, marks=pytest.mark.slow),
        (["--train", "lora"], 1e-3),
    ],
    ids=["kl", "lora"],
)
def test_accumulation_over_processes_is_one_large_batch(
    options: list[object], rate: float, saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    runs = []
    for launcher, size, accumulation in ((FORKED, 2, 2), (ONE, 8, 1)):
        runs.append(tmp_path / str(len(runs)))
        line = [saved_llama, "--text", text, "--constraint", "kl", "--epsilon", 0.3, "--no-control", *options]
        line += ["--batch-size", size, *small(gradient_accumulation=accumulation, learning_rate=rate)]
        result = train(launcher, *line, "--out", runs[-1])
        assert result.returncode == 0, result.stderr
    assert_same_trajectory(*runs)


def kill(launcher: list[str], arguments: list[object], out: Path, victim: int) -> str:
    """Start a run and kill one of its processes after the second checkpoint; return its stderr."""
    line = [*launcher, "sparsify", *map(str, arguments), "--out", str(out)]
    process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "checkpoints/checkpoint-20").exists():
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            ours = str(out) in (path / "cmdline").read_text().split("\0")
            if ours and f"RANK={victim}" in (path / "environ").read_text().split("\0"):
                os.kill(int(path.name), signal.SIGKILL)
        except (OSError, UnicodeDecodeError):
            continue
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    return said


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")
def test_a_stream_goes_on_in_all_processes_after_a_kill(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    arguments = [saved_llama, "--text", text, *small(), "--stream", "--batch-size", 4,
                 "--no-control"]  # fmt: skip
    result = train(FORKED, *arguments, "--out", tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    kill(TWO, arguments, tmp_path / "killed", 1)
    result = train(FORKED, *arguments, "--out", tmp_path / "killed", "--resume")
    assert result.returncode == 0, result.stderr
    assert difference(tmp_path / "whole", tmp_path / "killed") == 0


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_killed_ends_all_and_the_run_goes_on(pair, victim: int, tmp_path: Path) -> None:
    whole, arguments = pair
    out = tmp_path / "killed"
    said = kill(TWO, arguments, out, victim)
    ours = [line for line in said.splitlines() if line.startswith("gossamer: ")]
    assert len(ours) == 1, said
    assert "another process of the run ended" in ours[0]
    assert "--resume" in ours[0]
    result = train(FORKED, *arguments, "--out", out, "--resume")
    assert result.returncode == 0, result.stderr
    assert difference(whole, out) == difference(whole, out, "control/model.safetensors") == 0
    assert len(steps(out)) == 40


def test_what_ends_one_process_is_said_once(pair, saved_llama: Path, text: Path, tmp_path: Path) -> None:
    out, arguments = pair
    others = {
        "begun with 2 processes, not 1": (ONE, [*arguments, "--out", out, "--resume"]),
        "exists already": (FORKED, [*arguments, "--out", out]),
        "no-such-model": (TWO, ["no-such-model", *arguments[1:], "--out", tmp_path / "none"]),
    }
    for words, (launcher, line) in others.items():
        result = train(launcher, *line)
        said = [row for row in result.stderr.splitlines() if row.startswith("gossamer: ")]
        assert result.returncode != 0
        assert len(said) == 1, result.stderr
        assert words in said[0]
        assert not re.search(r"gossamer/\w+/\w+\.py\"", result.stderr), result.stderr  # the launcher prints a traceback
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "options,settings",
    [
        pytest.param([], {"steps": 12, "precision": "bf16"}, marks=pytest.mark.slow),
        (["--train", "lora"], {"steps": 12, "precision": "bf16"}),
        (["--train", "lora"], {}),
    ],
)
def test_shards_train_what_whole_models_train(
    options: list[object], settings: dict[str, Any], saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    """Only twelve steps in bfloat16: after twenty, rounding moves single gates across their threshold."""
    arguments = [saved_llama, "--text", text, *small(**settings), *options, "--batch-size", 4]
    result = train(FORKED, *arguments, "--out", tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    result = train(sharded(tmp_path), *arguments, "--out", tmp_path / "parts")
    assert result.returncode == 0, result.stderr
    assert_same_trajectory(tmp_path / "parts", tmp_path / "whole")
    assert difference(tmp_path / "parts", tmp_path / "whole", "control/model.safetensors") < 2e-4


@pytest.mark.slow
def test_sharded_weights_are_drawn_towards_the_dense_ones(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    """At this learning rate, no shift of the gates meets the bound; the saved model is the measured one."""
    from gossamer.measures.language import measure_language
    from gossamer.models.pretrained import load_dense

    out = tmp_path / "parts"
    settings = small(learning_rate=0.03, train="all")
    arguments = [saved_llama, "--text", text, *settings, "--constraint", "kl", "--epsilon", 0.01, "--batch-size", 4]
    result = train(sharded(tmp_path), *arguments, "--no-control", "--out", out)
    assert result.returncode == 0, result.stderr
    selected = json.loads((out / "config.json").read_text())["measured"]["selected"]
    assert selected["interpolation"] < 1
    assert "of what training changed in the weights was kept" in result.stderr
    blocks = load_file(out / "blocks.safetensors")["validation"].long()
    found = measure_language(gossamer.load(out / "model"), blocks, dense=load_dense(str(saved_llama))[0])
    assert found.kl == pytest.approx(selected["constrained"], rel=1e-3)


@pytest.mark.slow
def test_a_sharded_run_of_tied_weights_goes_on_after_a_kill(tokenizer, text: Path, tmp_path: Path) -> None:
    model = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(model)
    tokenizer.save_pretrained(model)
    arguments = [model, "--text", text, *small(), "--batch-size", 4, "--no-control"]
    assert train(FORKED, *arguments, "--out", tmp_path / "whole").returncode == 0
    kill(sharded(tmp_path), arguments, tmp_path / "parts", 1)
    result = train(sharded(tmp_path), *arguments, "--out", tmp_path / "parts", "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_trajectory(tmp_path / "parts", tmp_path / "whole")


def test_accelerate_reads_the_launch_files() -> None:
    for name in ("ddp", "fsdp2", "deepspeed"):
        config = load_config_from_file(str(launch_file(name)))
        assert isinstance(config, ClusterConfig)
        assert config.num_processes == 2
    result = subprocess.run([*ONE, "launch-file", "ddp"], capture_output=True, text=True, env=ENVIRONMENT)
    assert Path(result.stdout.strip()) == launch_file("ddp")


def test_parts_of_a_batch_draw_the_noise_of_the_whole() -> None:
    from gossamer.ops import gated_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 4, 17, 8) for _ in range(3))
    bias = torch.randn(4)
    for implementation in ("naive", "chunked"):
        whole = gated_attention(q, k, v, bias, sample=True, seed=5, implementation=implementation)
        parts = [
            gated_attention(
                q[rows],
                k[rows],
                v[rows],
                bias,
                sample=True,
                seed=5,
                first_row=rows.start,
                implementation=implementation,
            )
            for rows in (slice(0, 2), slice(2, 6))
        ]
        torch.testing.assert_close(torch.cat([part.expected_open for part in parts]), whole.expected_open)
        torch.testing.assert_close(torch.cat([part.output for part in parts]), whole.output)
