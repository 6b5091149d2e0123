"""The command line in processes of its own, forked from one that has loaded torch and transformers already."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import small_disk

_CONTEXT = multiprocessing.get_context("forkserver")
# Nothing of gossamer.cli, which reads the environment when it is imported. Installed modules only: in Python 3.11 the
# server does not know the folders that pytest added to the path.
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
    """What ``gossamer`` prints and how it ends; only what is read when an interpreter starts is that of the server.

    ``kill_at``: it is killed when it is about to change something in that folder for the n-th time; where it does not
    come to that, it says how often it did. ``disk``: what it writes to.
    """
    line = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = _CONTEXT.Process(
            target=_run, args=(line, dict(environment), cwd or Path.cwd(), out, err, kill_at, disk)
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(line, timeout, out.read_text(), err.read_text())
        assert process.exitcode is not None
        return subprocess.CompletedProcess(line, process.exitcode, out.read_text(), err.read_text())


_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def _kill_at_change(number: int, folder: Path) -> Callable[[], int]:
    """Gives what tells how often something was changed so far."""
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
    for file, descriptor in ((out, 1), (err, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", encoding="utf-8", closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["gossamer", *line]

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
