"""What is written has the modes that the umask gives, and appears whole or not at all."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

import gossamer
from families import tiny_model
from gossamer.files import atomic_directory, atomic_file, atomic_write_text
from gossamer.training.checkpoints import checkpoint_error, write_checksums


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_a_saved_model_has_the_modes_of_new_files(umask: int, tmp_path: Path) -> None:
    for _ in range(2):  # the second replaces the first
        gossamer.save(gossamer.add_gates(tiny_model("llama")), tmp_path / "model")
        assert mode(tmp_path / "model") == 0o777 & ~umask
        assert {mode(file) for file in (tmp_path / "model").iterdir()} == {0o666 & ~umask}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_within_and_files_by_themselves_too(umask: int, tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "run") as staging:
        (staging / "control").mkdir()
        save_file({"a": zeros(2)}, staging / "control" / "model.safetensors")
        atomic_write_text(staging / "config.json", "{}")
    with atomic_file(tmp_path / "run" / "blocks.safetensors") as file:
        save_file({"a": zeros(2)}, file)
    for path in (tmp_path / "run").rglob("*"):
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_sealed_checkpoint_too(umask: int, tmp_path: Path) -> None:
    save_file({"a": zeros(2)}, tmp_path / "model.safetensors")
    write_checksums(tmp_path)
    assert checkpoint_error(tmp_path) is None
    assert {mode(file) for file in tmp_path.iterdir()} == {0o666 & ~umask}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the bit has another meaning")
def test_what_is_written_goes_to_the_group_of_a_shared_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    with atomic_directory(tmp_path / "run") as staging:
        (staging / "config.json").touch()
    assert mode(tmp_path / "run") & 0o2000


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    for write in (atomic_directory, atomic_file):
        with pytest.raises(RuntimeError, match="stop"), write(tmp_path / "run"):
            raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())
