"""The command line in a separate process, for tests."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from forked import run_command
from settings_files import config

COMMAND = [sys.executable, "-m", "gossamer.cli"]


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


@dataclass(frozen=True)
class Finished:
    """A finished run, its model, its text, its other arguments without --out, and its output."""

    out: Path
    model: Path
    text: Path
    arguments: list[object]
    printed: str


def quick(**settings: object) -> list[str]:
    """Build the options of a small run, including a file with the given settings."""
    return ["--seq-len", "16", *config(held_out_tokens=128, precision="fp32", **settings)]


def gossamer_command(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return run_command(arguments, ENVIRONMENT, **options)


def weights(run: Path, part: str = "model/gossamer.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run / part)


def assert_same_weights(a: Path, b: Path) -> None:
    """Check that the sparse models and controls of two runs are equal bit for bit."""
    for part in ("model/gossamer.safetensors", "control/model.safetensors"):
        first, second = weights(a, part), weights(b, part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in result.stdout + result.stderr
