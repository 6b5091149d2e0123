"""Written files have the modes that the umask gives, and appear completely or not at all."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

import gossamer
from families import tiny_model
from gossamer.errors import GossamerError
from gossamer.files import atomic_directory, atomic_file, atomic_write_text, remove_staging
from gossamer.training.checkpoints import checkpoint_error, write_checksums


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_a_saved_model_has_the_modes_of_new_files(umask: int, tmp_path: Path) -> None:
    for _ in range(2):  # the second time replaces the directory
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


def test_a_directory_that_appears_while_another_is_made_stays(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "run") as staging:
            (staging / "config.json").write_text("ours")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "config.json").write_text("theirs")

    with pytest.raises(GossamerError, match="it appeared while"):
        write()
    assert (tmp_path / "run" / "config.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_nothing_is_removed_but_what_a_killed_write_left(tmp_path: Path) -> None:
    kept = {".exp.env", ".venv.d", ".git.d", ".exp.0123456789ab", "exp.0123456789ab.partial", ".*.0123456789ab.other"}
    left = [".exp.0123456789ab.partial", ".*.0123456789ab.partial"]
    for name in (*kept, *left):
        (tmp_path / name).mkdir()
    for name in ("exp", "*"):
        with atomic_directory(tmp_path / name):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "exp", "*"}


def test_what_a_killed_write_left_of_a_file_goes(tmp_path: Path) -> None:
    for name in (".a.json.0123456789ab.partial.json", ".b.json.0123456789ab.partial.json", ".a.json.partial.json"):
        (tmp_path / name).write_text("{")
    atomic_write_text(tmp_path / "a.json", "{}")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.json", ".b.json.0123456789ab.partial.json", ".a.json.partial.json",
    }  # fmt: skip


def test_a_directory_is_replaced_at_once(tmp_path: Path) -> None:
    """At any moment, a reader finds either the old or the new directory."""
    stop = threading.Event()
    missing = []

    def read() -> None:
        while not stop.is_set():
            if not (tmp_path / "own" / "circuits.json").exists():
                missing.append(True)

    for number in range(2):
        with atomic_directory(tmp_path / "own", replace=True) as staging:
            (staging / "circuits.json").write_text(str(number))
        if number == 0:
            reader = threading.Thread(target=read)
            reader.start()
    for number in range(200):
        with atomic_directory(tmp_path / "own", replace=True) as staging:
            (staging / "circuits.json").write_text(str(number))
    stop.set()
    reader.join()
    assert not missing


def test_what_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    """On file systems that cannot exchange directories, a kill may happen between two renames."""
    (tmp_path / ".own.0123456789ab.old").mkdir()
    (tmp_path / ".own.0123456789ab.old" / "circuits.json").write_text("{}")
    remove_staging(tmp_path / "own")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    really = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for name, write in (
        ("directory", lambda folder: gossamer.save(gossamer.add_gates(tiny_model("llama")), folder / "model")),
        ("file", lambda folder: atomic_write_text(folder / "config.json", "{}")),
    ):
        folder = tmp_path / name
        folder.mkdir()
        flushed.clear()
        write(folder)
        assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= flushed
    flushed.clear()
    write_checksums(tmp_path / "directory" / "model")
    assert {path.stat().st_ino for path in (tmp_path / "directory" / "model").iterdir()} <= flushed


def test_a_write_that_fails_names_the_place_not_the_file_beside_it(tmp_path: Path) -> None:
    for write in (atomic_directory, atomic_file):
        with pytest.raises(GossamerError) as told, write(tmp_path / ("x" * 300)):
            pass
        assert f"cannot write {tmp_path / ('x' * 300)}: File name too long" in str(told.value)
        assert "partial" not in str(told.value)


def test_a_file_gives_way_to_a_directory_that_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with atomic_directory(tmp_path / "model", replace=True) as staging:
        (staging / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").is_dir()


def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GossamerError, match="is no file"):
        atomic_write_text(tmp_path / "pipe", "x")
    assert (tmp_path / "pipe").is_fifo()
