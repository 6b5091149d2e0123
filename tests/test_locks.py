"""Locks: one writer at a time, until its process ends."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gossamer.errors import GossamerError
from gossamer.locks import locked

FORK = multiprocessing.get_context("fork")


def hold(place: Path, told: Connection) -> None:
    with locked(place):
        told.send("held")
        time.sleep(60)


@pytest.fixture
def held(tmp_path: Path):
    """A path that another process has locked, and that process."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path / "run", there))
    process.start()
    here.recv()
    yield tmp_path / "run", process
    process.kill()
    process.join()


def test_a_place_that_another_process_holds_is_refused_by_any_of_its_names(held) -> None:
    place, _ = held
    (place.parent / "link").symlink_to(place.parent)
    for name in (place, place.parent / "link" / "run", Path(os.path.relpath(place))):
        with pytest.raises(GossamerError, match="another process is at work on"), locked(name):
            pass


def test_the_death_of_the_holder_frees_the_place(held) -> None:
    place, process = held
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(place):
        pass
    assert not list(place.parent.iterdir())


def test_a_worker_that_outlives_the_holder_holds_nothing(tmp_path: Path) -> None:
    here, there = FORK.Pipe()

    def parent() -> None:
        with locked(tmp_path / "run"):
            worker = FORK.Process(target=time.sleep, args=(60,))
            worker.start()
            there.send(worker.pid)
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=parent)
    process.start()
    worker = here.recv()
    process.join()
    try:
        with locked(tmp_path / "run"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_what_lies_in_a_held_directory_is_held_too(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), locked(tmp_path / "run" / "circuits" / "ioi"):
        assert [path.name for path in tmp_path.iterdir()] == [".run.gossamer-lock"]
    assert not list(tmp_path.iterdir())


def test_directories_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b" / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_users_under_the_name_of_a_lock_stays(tmp_path: Path) -> None:
    (tmp_path / ".run.gossamer-lock").write_text("mine")
    with locked(tmp_path / "run"):
        pass
    assert (tmp_path / ".run.gossamer-lock").read_text() == "mine"
