"""Locks that allow one writer at a time per path, and are released when the process ends, however it ends.

A lock is an operating-system lock on an empty file beside the path, or inside it if the parent directory is not
writable. Forked processes do not inherit these locks: a worker that outlives its parent holds none.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gossamer.errors import GossamerError, cannot_write

_SUFFIX = ".gossamer-lock"

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems that do not support locks; nothing is locked there."""

_held: dict[Path, int] = {}
"""The paths that this process has locked, and the thread that locked each."""


@contextmanager
def locked(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a path within the block; no other process can hold it at the same time.

    If this process already holds the path or a directory above it, no further lock is taken. Missing directories above
    ``target`` are created, and removed again if they are empty at the end.

    Args:
        target: a file or directory, which need not exist.
        wait: wait for the process that holds the lock instead of raising; for locks that are held only briefly.

    Raises:
        GossamerError: if another process or thread holds the lock and ``wait`` is False; if the path cannot be written.
    """
    place = Path(os.path.realpath(target))
    owner = next((_held[above] for above in (place, *place.parents) if above in _held), None)
    if owner is not None:
        if _held.get(place, owner) != threading.get_ident() and not wait:
            raise _busy(target)
        yield
        return
    with _directories_above(place):
        file = _lock_file(place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(file, target, wait)
        except OSError as error:
            raise cannot_write(target, error) from error
        _held[place] = threading.get_ident()
        try:
            yield
        finally:
            del _held[place]
            _remove(file, descriptor)


def _lock_file(place: Path) -> Path:
    if not os.access(place.parent, os.W_OK) and os.access(place, os.W_OK) and place.is_dir():
        return place / _SUFFIX
    return place.parent / f".{place.name}{_SUFFIX}"


def _acquire(file: Path, target: Path, wait: bool) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise _busy(target) from error
                raise
        except BaseException:
            os.close(descriptor)
            raise
        # The previous holder may have removed the file in the meantime.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        os.close(descriptor)


def _remove(file: Path, descriptor: int) -> None:
    if not os.fstat(descriptor).st_size:
        with suppress(OSError):
            file.unlink()
    os.close(descriptor)


@contextmanager
def _directories_above(place: Path) -> Iterator[None]:
    """Remove the directories above a path that were missing before the block, if they are empty at its end."""
    missing = [above for above in place.parents if not above.exists()]
    try:
        yield
    finally:
        for above in missing:
            with suppress(OSError):
                above.rmdir()


def _busy(target: Path) -> GossamerError:
    return GossamerError(f"another process is at work on {target}; wait until it has ended, or give another place")
