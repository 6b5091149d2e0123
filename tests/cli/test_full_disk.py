"""A full disk: a one-line message, no half-written files, and a run can be resumed once there is space."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

import small_disk
from command_line import assert_same_weights
from forked import run_command
from gossamer.circuits.compare import compare_circuits
from gossamer.circuits.config import SearchConfig
from gossamer.circuits.tasks import find_task
from gossamer.evaluation.evaluate import evaluate_run
from gossamer.runs.job import post_train
from gossamer.runs.settings import RunConfig
from gossamer.training.checkpoints import checkpoint_error, checkpoints
from gossamer.training.settings import TrainingConfig
from settings_files import config
from small_disk import Disk

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
NO_SPACE = re.compile("No space left on device|it could not be written whole; is the disk full?")

pytestmark = pytest.mark.skipif(not small_disk.possible(), reason="no disk of its own for a process here")


def told(errors: str) -> str:
    """Get the message that a command ended with; it must be the only line."""
    (line,) = [line for line in errors.splitlines() if line.strip()]
    assert line.startswith("gossamer: cannot write "), line
    assert NO_SPACE.search(line), line
    return line


def sparsify(model: Path, text: Path, out: Path) -> list[object]:
    small = config(held_out_tokens=64, validation_tokens=64, precision="fp32", batch_size=2, checkpoint_every=1)
    return ["sparsify", model, "--text", text, "--out", out, "--seq-len", 16, "--tokens", 128, *small]


@pytest.fixture(scope="module")
def whole(saved_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run with enough disk space, and the peak number of bytes that it used."""
    disk = Disk(tmp_path_factory.mktemp("whole"), 2**26)
    result = run_command(sparsify(saved_llama, text, disk.folder / "run"), ENVIRONMENT, disk=disk)
    assert result.returncode == 0, result.stderr
    return disk.folder / "run", int(re.findall(r"in use at most: (\d+)", result.stdout)[-1])


@pytest.mark.parametrize(
    "share", [0.3, 0.9, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.02, 0.1, 0.2, 0.4, 0.6, 0.8))]
)
def test_a_run_goes_on_when_there_is_room_again(
    share: float, whole: tuple[Path, int], saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    """The result is bit for bit that of a run that always had enough space."""
    known, most = whole
    disk = Disk(tmp_path / "disk", int(share * most))
    disk.folder.mkdir()
    out = disk.folder / "run"
    line = sparsify(saved_llama, text, out)
    result = run_command(line, ENVIRONMENT, disk=disk)
    assert result.returncode == 2, result.stderr
    assert str(out) in told(result.stderr)
    assert {path.name for path in disk.folder.iterdir()} <= {"run"}
    assert not [path for path in out.rglob("*") if path.name.startswith(".") or "partial" in path.name]
    for folder in ("checkpoints", "control-checkpoints"):
        assert [checkpoint_error(path) for path in checkpoints(out / folder)] == [None] * len(checkpoints(out / folder))
    again = run_command([*line, "--resume"], ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    assert_same_weights(known, out)
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(known) for path in known.rglob("*")}


@pytest.fixture(scope="module")
def place(saved_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters, metrics and circuits, a task, and a checkpoint to import."""
    place = tmp_path_factory.mktemp("place")
    rows = [
        {"clean": f"the {word} reads", "corrupted": f"a {word} reads", "answers": [" two"], "wrong": [" one"]}
        for word in ("sparse", "model")
    ]
    (place / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = TrainingConfig(batch_size=2, checkpoint_every=0, precision="fp32", train="lora")
    sizes = {"tokens": 64, "seq_len": 16, "validation_tokens": 32, "held_out_tokens": 64}
    run = post_train(
        RunConfig(str(saved_llama), str(text), control=False, training=training, lora_rank=2, **sizes), place / "run"
    )
    evaluate_run(run)
    task = find_task(str(place / "own.jsonl"))
    compare_circuits(run, task, SearchConfig(examples=2, score="eap", levels=("edges",), force=True))
    return place


OTHER = "circuits {place}/run/model --dense {model} --task {place}/own.jsonl --examples 2 --score eap --levels edges"
WRITERS = {
    "export": "export {place}/run --task {place}/own.jsonl --edges 5 --out {disk}/circuit.json",
    "export for EAP-IG": "export {place}/run --task {place}/own.jsonl --edges 5 --out {disk}/circuit.pt",
    "merge": "merge {place}/run/adapter --model {model} --out {disk}/merged",
    "circuits": OTHER + " --force --out {disk}",
    "explain": "explain {place}/run sparse,model,reads --seeds 1 --share 0.5 --out {disk}/page.html",
    "report": "report {place}/run --out {disk}/page.html",
    "view": "view {place}/run sparse,model --out {disk}/page.html",
}


@pytest.mark.parametrize("command", WRITERS)
def test_commands_leave_nothing_where_there_is_no_room(
    command: str, place: Path, saved_llama: Path, tmp_path: Path
) -> None:
    disk = Disk(tmp_path / "disk", small_disk.PAGE)
    disk.folder.mkdir()
    line = [word.format(place=place, model=saved_llama, disk=disk.folder) for word in WRITERS[command].split()]
    result = run_command(line, ENVIRONMENT, disk=disk)
    assert result.returncode == 2, result.stderr
    assert str(disk.folder) in told(result.stderr)
    assert not list(disk.folder.iterdir())


def test_metrics_stay_where_there_is_no_room_for_new_ones(place: Path, tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk", 0)
    shutil.copytree(place / "run", disk.folder / "run")
    before = {path: path.read_bytes() for path in disk.folder.rglob("*") if path.is_file()}
    full = Disk(disk.folder, sum(-(-len(content) // small_disk.PAGE) for content in before.values()) * small_disk.PAGE)
    result = run_command(["evaluate", disk.folder / "run"], ENVIRONMENT, disk=full)
    assert result.returncode == 2, result.stderr
    assert "run/metrics.json" in told(result.stderr)
    assert {path: path.read_bytes() for path in disk.folder.rglob("*") if path.is_file()} == before
