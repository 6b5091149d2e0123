"""A tiny disk for a process and its children, in a separate namespace; needs Linux, but no privileges."""

import ctypes
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_NEW_NAMESPACES = 0x20000 | 0x10000000
"""Flags for new mount and user namespaces."""

_PRIVATE = 0x4000 | 0x40000
"""Flags that hide changes of mounts from other namespaces."""

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Disk:
    """A folder that is mounted as a separate disk.

    Attributes:
        folder: the folder; its content is copied to the disk when the command starts, and back when it has ended.
        size: size in bytes; files occupy whole pages.
    """

    folder: Path
    size: int


@contextmanager
def mounted(disk: Disk) -> Iterator[None]:
    """Mount the disk on its folder within the block, the last one of this process; print the peak usage."""
    with tempfile.TemporaryDirectory() as beside:
        shutil.copytree(disk.folder, beside, dirs_exist_ok=True, symlinks=True)
        back = os.open(disk.folder, os.O_RDONLY)
        _mount(disk)
        shutil.copytree(beside, disk.folder, dirs_exist_ok=True, symlinks=True)
    most = 0

    def hook(event: str, _: object) -> None:
        nonlocal most
        if event in ("os.rename", "os.remove", "os.rmdir", "open"):
            most = max(most, _used(disk.folder))

    sys.addaudithook(hook)
    try:
        yield
    finally:
        print(f"in use at most: {most}", flush=True)
        _give_back(disk.folder, Path(f"/proc/self/fd/{back}"))


def _used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _give_back(disk: Path, folder: Path) -> None:
    """Copy the content of the disk to the folder below it."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(disk, folder, dirs_exist_ok=True, symlinks=True)


def _mount(disk: Disk) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()

    def call(function: str, *arguments: object) -> None:
        if getattr(libc, function)(*arguments):
            raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")

    call("unshare", _NEW_NAMESPACES)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    call("mount", b"none", b"/", None, _PRIVATE, None)
    options = f"size={-(-disk.size // PAGE) * PAGE}".encode()
    call("mount", b"tmpfs", os.fsencode(disk.folder), b"tmpfs", 0, options)


def _try(folder: Path) -> None:
    with mounted(Disk(folder, PAGE)):
        pass


@cache
def possible() -> bool:
    """Check whether this machine allows such a disk."""
    if sys.platform != "linux":
        return False
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=_try, args=(Path(folder),))
        process.start()
        process.join()
        return process.exitcode == 0
