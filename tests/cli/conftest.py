"""A finished run, a task and the command line in this process."""

import fcntl
import gzip
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from command_line import Finished, gossamer_command, quick
from conftest import save_llama, write_documents
from gossamer.cli import main


@pytest.fixture(scope="session")
def finished(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An uninterrupted run of 60 steps, made once for all pytest processes; tests modify only copies of it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "finished"
    folder.mkdir(exist_ok=True)
    out, model, text, printed = (folder / name for name in ("run", "model", "text.jsonl.gz", "printed.txt"))
    arguments = [*quick(checkpoint_every=5, gate_learning_rate=0.02), "--tokens", 60 * 64]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            save_llama(model, tokenizer)
            write_documents(text)
            result = gossamer_command("sparsify", model, "--text", text, "--out", out, *arguments)
            assert result.returncode == 0, result.stderr
            printed.write_text(result.stdout)
    return Finished(out, model, text, arguments, printed.read_text())


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the run that a test may modify."""
    return Path(shutil.copytree(finished.out, tmp_path / "finished"))


@pytest.fixture(scope="module")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task file that the tiny tokenizer can encode."""
    file = tmp_path_factory.mktemp("tasks") / "own.jsonl"
    rows = [
        {"clean": f"the sparse {a} reads", "corrupted": f"the sparse {b} reads", "answers": [" two"], "wrong": [" one"]}
        for a in ("model", "link", "token") for b in ("row", "need")
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows).replace("token ", "tokens "))
    return file


@pytest.fixture(scope="module")
def folder_of_text(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents of ``text`` in three files."""
    folder = tmp_path_factory.mktemp("folder")
    with gzip.open(text, "rt", encoding="utf-8") as stream:
        lines = stream.readlines()
    for number in range(3):
        (folder / f"{number}.jsonl").write_text("".join(lines[number::3]))
    return folder


@pytest.fixture
def command_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function that runs the command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object, columns: int = 400) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run
