"""The command line in separate processes, forked from one that has already loaded torch and transformers."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import TCPStore

import small_disk

_CONTEXT = multiprocessing.get_context("forkserver")
# Nothing from gossamer.cli, which reads the environment when it is imported. Installed modules only: in Python 3.11,
# the server does not know the folders that pytest added to the path.
_CONTEXT.set_forkserver_preload(
    ["gossamer.circuits.compare", "gossamer.demo.demonstrate", "gossamer.runs.job", "gossamer.runs.plan"]
)


def run_command(
    arguments: Sequence[object],
    environment: Mapping[str, str],
    *,
    cwd: Path | None = None,
    timeout: float = 300,
    kill_at: tuple[int, Path] | None = None,
    disk: small_disk.Disk | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``gossamer`` and return its output and exit code.

    Settings that an interpreter reads at its start are those of the server.

    ``kill_at``: kill the process just before it changes something in that folder for the n-th time; if it ends before,
    it prints the number of changes. ``disk``: the small disk that it writes to.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = Command(arguments, environment, Path(folder), cwd, kill_at, disk)
        return started.ended(timeout)


@contextmanager
def started_command(arguments: Sequence[object], environment: Mapping[str, str]) -> Iterator["Command"]:
    """Start ``gossamer`` without waiting; kill it at the end of the block if it is still running."""
    with tempfile.TemporaryDirectory() as folder:
        started = Command(arguments, environment, Path(folder))
        try:
            yield started
        finally:
            started.send(signal.SIGKILL)
            started.process.join()


def run_together(
    arguments: Sequence[object], environment: Mapping[str, str], count: int, *, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``gossamer`` in several processes that connect like those of torchrun.

    If one process ends, the others are not stopped; a test of that has to start torchrun itself.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {**environment, "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(count):
            (own := Path(folder) / str(rank)).mkdir()
            started.append(Command(arguments, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, own))
        ended = [one.ended(timeout) for one in started]
    codes, out, err = zip(*((one.returncode, one.stdout, one.stderr) for one in ended), strict=True)
    return subprocess.CompletedProcess(ended[0].args, max(codes, key=abs), "".join(out), "".join(err))


class Command:
    """A started command; its output goes to the folder."""

    def __init__(
        self,
        arguments: Sequence[object],
        environment: Mapping[str, str],
        folder: Path,
        cwd: Path | None = None,
        kill_at: tuple[int, Path] | None = None,
        disk: small_disk.Disk | None = None,
    ) -> None:
        self.line, self.out, self.err = list(map(str, arguments)), folder / "out", folder / "err"
        given = (self.line, dict(environment), cwd or Path.cwd(), self.out, self.err, kill_at, disk)
        self.process = _CONTEXT.Process(target=_run, args=given)
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    @property
    def errors(self) -> str:
        """The stderr output so far."""
        return self.err.read_text() if self.err.exists() else ""

    def send(self, number: signal.Signals) -> None:
        if self.running:
            assert self.process.pid is not None
            os.kill(self.process.pid, number)

    def wait_until(self, reached: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until the running command has reached a state; fail if it ends first."""
        deadline = time.monotonic() + timeout
        while not reached():
            assert self.running, f"ended too early: {self.errors}"
            assert time.monotonic() < deadline, "takes too long"
            time.sleep(0.005)
        assert self.running, "ended before it could be stopped"

    def ended(self, timeout: float) -> subprocess.CompletedProcess[str]:
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.line, timeout, self.out.read_text(), self.err.read_text())
        assert self.process.exitcode is not None
        return subprocess.CompletedProcess(self.line, self.process.exitcode, self.out.read_text(), self.err.read_text())


_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def _kill_at_change(number: int, folder: Path) -> Callable[[], int]:
    """Kill this process at the n-th change in a folder; return a function that counts the changes so far."""
    place, count = str(folder), 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in _CHANGES) and str(arguments[0]).startswith(place):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def _run(
    line: list[str],
    environment: dict[str, str],
    cwd: Path,
    out: Path,
    err: Path,
    kill_at: tuple[int, Path] | None,
    disk: small_disk.Disk | None,
) -> None:
    gc.freeze()  # what the server has loaded; collecting takes a third of a second otherwise
    for file, descriptor in ((out, 1), (err, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", encoding="utf-8", closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["gossamer", *line]
    multiprocessing.set_start_method(None, force=True)  # otherwise its workers would come from another fork server
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background

    from gossamer.cli import main

    if disk is not None:
        with small_disk.mounted(disk):
            main()
    if kill_at is None:
        main()
        return
    count = _kill_at_change(*kill_at)
    try:
        main()
    finally:
        print(f"changes: {count()}", flush=True)
