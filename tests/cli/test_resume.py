"""--resume continues runs that were killed, interrupted or stopped by a full disk."""

import json
import resource
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from command_line import (
    COMMAND,
    ENVIRONMENT,
    Finished,
    assert_refused,
    assert_same_weights,
    gossamer_command,
    quick,
)
from forked import started_command
from gossamer.training.checkpoints import checkpoint_error, checkpoints


def has_lines(log: Path, lines: int) -> bool:
    return log.exists() and len(log.read_text().splitlines()) >= lines


def test_a_run_that_reads_its_text_while_training_goes_on_where_it_was_killed(
    saved_llama: Path, folder_of_text: Path, tmp_path: Path
) -> None:
    """Equal bit for bit, although two workers had read ahead; the text is so short that it starts again."""
    (short := tmp_path / "text").mkdir()
    for file in folder_of_text.iterdir():
        lines = file.read_text().splitlines(keepends=True)
        (short / file.name).write_text("".join(lines[: len(lines) // 3]))
    settings = [*quick(stream_workers=2, checkpoint_every=5), "--stream", "--tokens", 80 * 64]
    line = ["sparsify", saved_llama, "--text", short, *settings, "--out"]
    result = gossamer_command(*line, tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    assert "began again" in result.stderr
    for log, lines in (("training.jsonl", 33), ("control.jsonl", 52)):
        with started_command([*line, tmp_path / "killed", "--resume"], ENVIRONMENT) as command:
            command.wait_until(partial(has_lines, tmp_path / "killed" / log, lines))
    result = gossamer_command(*line, tmp_path / "killed", "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_a_run_killed_again_and_again_ends_bit_for_bit_the_same(finished: Finished, tmp_path: Path) -> None:
    whole, out = finished.out, tmp_path / "killed"
    line = ["sparsify", finished.model, "--text", finished.text, "--out", out, *finished.arguments, "--resume"]
    for log, lines in ((None, 0), ("training.jsonl", 7), ("training.jsonl", 33), ("control.jsonl", 21)):
        with started_command(line, ENVIRONMENT) as command:
            if log is not None:
                command.wait_until(partial(has_lines, out / log, lines))
    result = gossamer_command(*line)
    assert result.returncode == 0, result.stderr
    assert_same_weights(whole, out)
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
    with started_command(line, ENVIRONMENT) as command:
        command.wait_until(lambda: len(checkpoints(out / "checkpoints")) >= 2)
    return out, [*line, "--resume"]


def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint_alone(begun) -> None:
    """Files over 20 kB cannot be written, as if the disk became full during a write."""
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
    with started_command(line, ENVIRONMENT) as command:
        command.wait_until(lambda: "\n" in command.errors)
        warning = command.errors.splitlines()[0]
    assert newest.name in warning
    assert "optimizer.pt has 1,000 of" in warning
    assert older.name in warning


def test_resuming_with_other_settings_is_refused(finished: Finished) -> None:
    line = ["sparsify", finished.model, "--text", finished.text, "--out", finished.out, *finished.arguments]
    assert_refused(gossamer_command(*line), str(finished.out), "--resume")
    assert_refused(gossamer_command(*line, "--resume", "--slack", 0.5), "slack=0.01", "0.5")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(
    number: signal.Signals, saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    line = ["sparsify", saved_llama, "--text", text, "--out", tmp_path / "run", *quick(), "--tokens", 10**7]
    with started_command(line, ENVIRONMENT) as command:
        command.wait_until((tmp_path / "run" / "training.jsonl").exists)
        command.send(number)
        result = command.ended(120)
    assert result.returncode == 2
    assert result.stderr.strip() == "gossamer: interrupted; go on with --resume"
