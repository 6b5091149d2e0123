"""Two writers, kills at any moment, signals: what the command line leaves, and what it says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forked import run_command
from settings_files import config

COMMAND = [sys.executable, "-m", "gossamer"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def sparsify(model: Path, text: Path, out: Path, *more: object, steps: int = 4, **settings: object) -> list[object]:
    """The command line of a small run."""
    small = {"held_out_tokens": 64, "validation_tokens": 64, "precision": "fp32", "batch_size": 2, **settings}
    tokens = steps * int(small["batch_size"]) * 16
    sizes = ["--seq-len", 16, "--tokens", tokens]
    return ["sparsify", model, "--text", text, "--out", out, *sizes, *config(**small), *more]


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_of_two_runs_with_one_directory_one_is_refused(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    def run(seed: int) -> subprocess.CompletedProcess[str]:
        time.sleep(0.02 * seed)
        return run_command(sparsify(saved_llama, text, tmp_path / "run", "--seed", seed), ENVIRONMENT)

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(run, range(2)))
    refused, done = sorted(both, key=lambda result: result.returncode, reverse=True)
    assert done.returncode == 0, done.stderr
    assert_refused(refused, str(tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["seed"] == both.index(done)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_of_two_resumptions_at_once_one_is_refused(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    line = sparsify(saved_llama, text, tmp_path / "run", "--resume", steps=40, checkpoint_every=5)

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run_command(line, ENVIRONMENT), range(2)))
    refused = [result for result in both if result.returncode]
    assert len(refused) <= 1  # the other may have begun when the first was through
    for result in refused:
        assert_refused(result, "another process is at work on", str(tmp_path / "run"))
    steps = [json.loads(row)["step"] for row in (tmp_path / "run" / "training.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


INTERRUPTED = """
import os, signal, sys
left, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
begun = False
def hook(event, arguments):
    global left, begun
    begun = begun or event == "import" and arguments[0] == "gossamer.cli"
    if begun and event == "import":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
sys.addaudithook(hook)
from gossamer.__main__ import main
main()
"""
"""The command line, to which a signal comes when it is about to import the n-th module."""


@pytest.mark.parametrize("count", [1, 100, 1_000])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_is_said_in_one_line(
    number: signal.Signals, count: int, saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    line = [count, int(number), *sparsify(saved_llama, text, tmp_path / "run", steps=10_000)]
    process = subprocess.run([sys.executable, "-c", INTERRUPTED, *map(str, line)], env=ENVIRONMENT, text=True,
                             capture_output=True, preexec_fn=hear, timeout=120)  # fmt: skip
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("gossamer: interrupted")
    assert len(process.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def hear() -> None:
    """Signals that are ignored in the background are heard."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="module")
def whole(saved_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that nothing interrupted, and how often it changed something on the disk."""
    folder = tmp_path_factory.mktemp("whole")
    line = sparsify(saved_llama, text, folder / "run", checkpoint_every=1)
    result = run_command(line, ENVIRONMENT, kill_at=(1 << 30, folder))
    assert result.returncode == 0, result.stderr
    return folder / "run", int(re.findall(r"changes: (\d+)", result.stdout)[-1])


def shares(points: int) -> list[float]:
    return [(point + 0.5) / points for point in range(points)]


@pytest.mark.parametrize(
    "share", [*shares(3), 1.0, *(pytest.param(share, marks=pytest.mark.slow) for share in shares(50))]
)
def test_a_run_killed_at_any_write_ends_as_one_that_was_not(
    share: float, whole: tuple[Path, int], saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    """Bit for bit, and nothing is left of the first attempt."""
    known, changes = whole
    out = tmp_path / "run"
    line = sparsify(saved_llama, text, out, checkpoint_every=1)
    killed = run_command(line, ENVIRONMENT, kill_at=(max(1, round(share * changes)), tmp_path))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_command([*line, "--resume"], ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    for part in ("model/gossamer.safetensors", "control/model.safetensors"):
        a, b = load_file(known / part), load_file(out / part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    files = {path.relative_to(out) for path in out.rglob("*")}
    assert files == {path.relative_to(known) for path in known.rglob("*")}
