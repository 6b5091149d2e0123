"""Concurrent writers, kills at any moment, and signals: the files and messages that remain."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import gossamer
from command_line import assert_same_weights
from forked import run_command
from gossamer.locks import locked
from gossamer.models.lora import add_adapters
from gossamer.models.pretrained import load_dense
from gossamer.runs.job import post_train
from gossamer.runs.record import Run
from gossamer.runs.settings import RunConfig
from gossamer.training.settings import TrainingConfig
from settings_files import config

COMMAND = [sys.executable, "-m", "gossamer"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def sparsify(model: Path, text: Path, out: Path, *more: object, steps: int = 4, **settings: object) -> list[object]:
    """Build the arguments of a small run."""
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
    run_command(line, ENVIRONMENT, kill_at=(60, tmp_path))
    assert (tmp_path / "run" / "training.jsonl").exists()

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run_command(line, ENVIRONMENT), range(2)))
    refused = [result for result in both if result.returncode]
    assert len(refused) <= 1  # one may have started after the other had finished
    for result in refused:
        assert_refused(result, "another process is at work on", str(tmp_path / "run"))
    steps = [json.loads(row)["step"] for row in (tmp_path / "run" / "training.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


@pytest.mark.parametrize("verb", ["sparsify", "sparsify --resume", "demo", "merge"])
def test_a_place_that_another_process_holds_is_refused_and_left_alone(
    verb: str, saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    """This includes the other process's half-written files."""
    out, theirs = tmp_path / "run", tmp_path / ".run.0123456789ab.partial"
    resumed = sparsify(saved_llama, text, out, "--resume", steps=40, checkpoint_every=5)
    if "resume" in verb:
        run_command(resumed, ENVIRONMENT, kill_at=(60, tmp_path))
        assert (out / "training.jsonl").exists()
    lines = {
        "sparsify": sparsify(saved_llama, text, out),
        "sparsify --resume": resumed,
        "demo": ["demo", "--out", out],
        "merge": ["merge", adapter(saved_llama, tmp_path), "--model", saved_llama, "--out", out],
    }
    line = lines[verb]
    with locked(out):
        theirs.mkdir()
        before = contents(tmp_path)
        assert_refused(run_command(line, ENVIRONMENT), f"another process is at work on {out}")
        assert theirs.is_dir()
        assert contents(tmp_path) == before


def contents(folder: Path) -> dict[Path, bytes]:
    """Read all files except locks: opening and closing a lock file would release the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-lock"))
    return {path: path.read_bytes() for path in files}


def adapter(model: Path, folder: Path) -> Path:
    """Save untrained adapters with gates."""
    gated = gossamer.add_gates(load_dense(str(model))[0])
    add_adapters(gated, rank=2, alpha=4.0)
    gossamer.save_adapter(gated, folder / "adapter")
    return folder / "adapter"


def test_checkpoints_go_when_what_came_of_them_is_on_the_disk(
    saved_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    flushed: set[int] = set()
    safe: dict[Path, bool] = {}
    really_sync, really_remove = os.fsync, shutil.rmtree

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        really_sync(descriptor)

    def rmtree(path: Path, *arguments: object, **options: object) -> None:
        came_of = {run.checkpoints: run.model, run.control_checkpoints: run.control}
        if path in came_of and path.exists():
            files = list(came_of[path].iterdir()) if came_of[path].exists() else []
            safe[path] = bool(files) and {file.stat().st_ino for file in (*files, run.folder)} <= flushed
        really_remove(path, *arguments, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    training = TrainingConfig(batch_size=2, checkpoint_every=1, precision="fp32")
    sizes = {"tokens": 64, "seq_len": 16, "validation_tokens": 32, "held_out_tokens": 64}
    post_train(RunConfig(str(saved_llama), str(text), training=training, **sizes), run.folder)
    assert safe == {run.checkpoints: True, run.control_checkpoints: True}


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
"""A script that runs the command line and sends itself a signal before it imports the n-th module."""


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
    """Restore the default handlers of signals, which background processes ignore."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="module")
def whole(saved_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An uninterrupted run, and the number of changes that it made on the disk."""
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
    """The results are equal bit for bit, and nothing of the first attempt remains."""
    known, changes = whole
    out = tmp_path / "run"
    line = sparsify(saved_llama, text, out, checkpoint_every=1)
    killed = run_command(line, ENVIRONMENT, kill_at=(max(1, round(share * changes)), tmp_path))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_command([*line, "--resume"], ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    assert_same_weights(known, out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    files = {path.relative_to(out) for path in out.rglob("*")}
    assert files == {path.relative_to(known) for path in known.rglob("*")}


def test_what_killed_commands_left_in_a_run_goes(
    whole: tuple[Path, int], saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    """Partly removed checkpoints and unfinished records, beside the run and in it."""
    known, _ = whole
    out = tmp_path / "run"
    shutil.copytree(known, out)
    names = {
        ".run.0123456789ab.partial", "run/checkpoints/checkpoint-4", "run/control-checkpoints/checkpoint-4",
        "run/.model.0123456789ab.partial", "run/circuits/.own.0123456789ab.partial",
    }  # fmt: skip
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    (out / ".metrics.json.0123456789ab.partial.json").write_text("{")
    again = run_command([*sparsify(saved_llama, text, out, checkpoint_every=1), "--resume"], ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    (out / "circuits").rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(known) for path in known.rglob("*")}
