"""A closed pipe and a full output device end a command without a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forked import run_command
from settings_files import config

COMMAND = [sys.executable, "-m", "gossamer"]
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
SIGPIPE = 141
"""A shell's exit code for a command that this signal ended."""


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Buffered output is written only when the command ends."""
    return {**ENVIRONMENT, "PYTHONUNBUFFERED": request.param}


def without_reader(
    *line: object, both: bool = False, env: dict[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    """Run a command that writes its output, and with ``both`` its errors, to a pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    try:
        errors = write if both else subprocess.PIPE
        return subprocess.run([*COMMAND, *map(str, line)], stdout=write, stderr=errors, env=env, text=True, timeout=120)
    finally:
        os.close(write)


@pytest.mark.parametrize("line", [["--help"], ["settings"], ["launch-file", "ddp"]])
def test_a_command_whose_reader_has_gone_ends_without_a_word(line: list[str], environment: dict[str, str]) -> None:
    ended = without_reader(*line, env=environment)
    assert (ended.returncode, ended.stderr) == (SIGPIPE, "")


def test_one_that_has_loaded_a_model_too(saved_llama: Path) -> None:
    ended = without_reader("inspect", saved_llama)
    assert (ended.returncode, ended.stderr) == (SIGPIPE, "")


def test_so_does_one_that_has_a_fault_to_tell(tmp_path: Path) -> None:
    assert without_reader("inspect", tmp_path, both=True).returncode == SIGPIPE


def test_a_run_whose_reader_has_gone_can_be_resumed(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = config(held_out_tokens=64, validation_tokens=64, precision="fp32", batch_size=2, checkpoint_every=1)
    line = ["sparsify", saved_llama, "--text", text, "--out", out, "--seq-len", 16, "--tokens", 128, *small]
    ended = without_reader(*line)
    assert (ended.returncode, ended.stderr) == (SIGPIPE, "")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (out / "model").exists()
    again = run_command([*line, "--resume"], ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    assert (out / "metrics.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("line", [["--help"], ["settings"], ["launch-file", "ddp"]])
def test_an_output_that_takes_no_more_is_told_in_one_line(line: list[str], environment: dict[str, str]) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*COMMAND, *line], stdout=full, stderr=subprocess.PIPE, env=environment, text=True, timeout=120
        )
    assert ended.returncode == 2, ended.stderr
    (told,) = ended.stderr.splitlines()
    assert told.startswith("gossamer: cannot ")
    assert "output" in told
    assert told.endswith("No space left on device")
