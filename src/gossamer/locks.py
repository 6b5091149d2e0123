"""One writer at a time for each place: a lock that ends with the process that holds it, however that ends.

The lock is one of the operating system on an empty file beside the place, or in it where nothing can be written beside
it. Locks of this kind are not handed on to forked processes: a worker that outlives its parent holds nothing.
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
"""What file systems without locks say: there, nothing is locked."""

_held: dict[Path, int] = {}
"""The places that this process holds, and the thread that took each."""


@contextmanager
def locked(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Within the block, no other process is within such a block for the same place, or for a directory above it.

    Directories above ``target`` are made, and go again if nothing was put into them.

    Args:
        target: a file or directory, there or not.
        wait: for another process to be through, where that takes no long time; else refuse.

    Raises:
        GossamerError: if another process, or another thread, is at work there; if the place cannot be written.
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
        # The process that held it may have removed the file in between.
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
    """Those that are made within it go again if they are empty at its end."""
    missing = [above for above in place.parents if not above.exists()]
    try:
        yield
    finally:
        for above in missing:
            with suppress(OSError):
                above.rmdir()


def _busy(target: Path) -> GossamerError:
    return GossamerError(f"another process is at work on {target}; wait until it has ended, or give another place")
