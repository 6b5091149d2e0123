"""Atomic writes of files and directories: written beside the target, flushed to disk, then renamed.

What a killed process left beside a target is removed the next time the target is written. Only names that match the
pattern used here are removed, and only under the target's lock (:mod:`gossamer.locks`).
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gossamer.errors import TORCH_WRITER, GossamerError, cannot_write
from gossamer.locks import locked

_EXCHANGE = 2
"""RENAME_EXCHANGE of Linux."""

_AT_FDCWD = -100


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new directory beside ``target`` that becomes ``target`` if the block succeeds, and is removed otherwise.

    Args:
        target: the directory to write.
        replace: replace an existing target; otherwise a target that has appeared meanwhile is kept.

    Raises:
        GossamerError: if it cannot be written (no space, no permission); if another process is writing it; if the
            target exists and ``replace`` is False.
    """
    try:
        with locked(target):
            remove_staging(target)
            staging = _beside(target)
            staging.mkdir()
            try:
                yield staging
                set_modes(staging)
                flush(staging)
                _put_in_place(staging, target, replace)
                flush_entry(target)
            finally:
                _remove(staging)
    except (OSError, SafetensorError) as error:
        raise _named(target, error) from error


def _put_in_place(staging: Path, target: Path, replace: bool) -> None:
    if not os.path.lexists(target):
        try:
            os.rename(staging, target)  # never replaces a directory that is not empty
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
    if not replace:
        raise GossamerError(f"{target} exists already: it appeared while it was being made; give another place")
    if not _exchange(staging, target):
        retired = _beside(target, "old")
        os.rename(target, retired)
        os.rename(staging, target)
        _remove(retired)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories atomically; return False where that is not possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE)


def _beside(target: Path, kind: str = "partial") -> Path:
    """An unused name beside ``target``, with the same suffix."""
    return target.parent / f".{target.name}.{secrets.token_hex(6)}.{kind}{target.suffix}"


def remove_staging(target: Path) -> None:
    """Remove what a killed process left beside ``target``; call this under the target's lock.

    A target that the process had moved aside is restored if nothing has replaced it yet.
    """
    _remove_matching(target.parent, target.name)


def remove_staging_in(folder: Path) -> None:
    """Do the same for everything in a directory; call this under the directory's lock."""
    _remove_matching(folder, None)


_STAGING = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.(?P<kind>partial|old)(?P<suffix>\.[^.]*)?")


def _remove_matching(folder: Path, name: str | None) -> None:
    for left in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _STAGING.fullmatch(left.name)
        if match is None or name not in (None, match["name"]) or Path(match["name"]).suffix != (match["suffix"] or ""):
            continue
        if match["kind"] == "old" and not os.path.lexists(folder / match["name"]):
            os.rename(left, folder / match["name"])
        else:
            _remove(left)


def _remove(path: Path) -> None:
    """Remove a file, or a directory and its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def set_modes(folder: Path) -> None:
    """Give all files in a folder the mode of a newly created file there; safetensors creates its files as 0600."""
    probe = _beside(folder / "mode")
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)


def flush(path: Path) -> None:
    """Flush a file, or a directory and its contents, to disk."""
    if path.is_dir():
        for entry in path.iterdir():
            if not entry.is_symlink():
                flush(entry)
    _flush_one(path)


def flush_entry(path: Path) -> None:
    """Flush the directory entry of a file or directory to disk."""
    _flush_one(path.parent)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named(target: Path, error: OSError | SafetensorError) -> Exception:
    """Turn an error of writing ``target`` into one that names it; return errors of reading other files unchanged."""
    file = error.filename if isinstance(error, OSError) else None
    beside = os.path.join(os.path.abspath(target.parent), f".{target.name}.")
    if isinstance(file, str) and not os.path.abspath(file).startswith((os.path.abspath(target), beside)):
        above = os.path.abspath(target.parent)
        if above != os.path.abspath(file) and not above.startswith(os.path.abspath(file) + os.sep):
            return error
    return cannot_write(target, error)


def file_checksum(file: Path) -> int:
    """The CRC-32 of a file."""
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def same_file(a: object, b: object) -> bool:
    """Whether two paths exist and are the same file or directory."""
    return isinstance(a, str) and isinstance(b, str) and all(map(os.path.exists, (a, b))) and os.path.samefile(a, b)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A file name beside ``target`` that becomes ``target`` if the block succeeds, and is removed otherwise.

    Raises:
        GossamerError: if it cannot be written.
    """
    try:
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if target.exists() and not target.is_file():  # a directory, or a device, which a rename would replace
            raise OSError(errno.EINVAL, "it is there and is no file")
        with locked(target, wait=True):
            remove_staging(target)
            staging = _beside(target)
            staging.touch()
            mode = staging.stat().st_mode & 0o777
            try:
                yield staging
                if staging.stat().st_mode & 0o777 != mode:  # the writer has replaced the file
                    staging.chmod(mode)
                flush(staging)
                os.replace(staging, target)
                flush_entry(target)
            finally:
                staging.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise _named(target, error) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in TORCH_WRITER):
            raise
        raise cannot_write(target, error) from error


def atomic_write_text(target: Path, text: str) -> None:
    """Write a text file atomically, replacing an existing one.

    Raises:
        GossamerError: if it cannot be written.
    """
    with atomic_file(target) as staging:
        staging.write_text(text, encoding="utf-8")
