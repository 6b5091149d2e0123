"""Files and directories that appear whole or not at all: written beside their place, then renamed."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gossamer.errors import GossamerError


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A fresh directory beside ``target`` that takes its place when the block ends well, and else vanishes.

    Raises:
        GossamerError: if it cannot be written: no room, no permission.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = _beside(target)
        staging.mkdir()
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield staging
        set_modes(staging)
        if target.exists():
            retired = _beside(target)
            retired.mkdir()
            os.rename(target, retired / target.name)
            os.rename(staging, target)
            shutil.rmtree(retired)
        else:
            os.rename(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise _cannot_write(target, error) from error
        raise


def _beside(target: Path) -> Path:
    """A name beside ``target`` that nothing has, with the same suffix."""
    return target.parent / f".{target.name}.{secrets.token_hex(6)}{target.suffix}"


def set_modes(folder: Path) -> None:
    """Give all files in a folder the mode that umask and folder give a new file: safetensors makes its own 0600."""
    probe = _beside(folder / "mode")
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)


def _cannot_write(target: Path, error: Exception) -> GossamerError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return GossamerError(f"cannot write {target}: {reason}; give a place that can be written and has room")


def same_file(a: object, b: object) -> bool:
    """Whether two paths lead to the same file or directory."""
    return isinstance(a, str) and isinstance(b, str) and all(map(os.path.exists, (a, b))) and os.path.samefile(a, b)


def remove_staging(target: Path) -> None:
    """Remove what a killed process left beside ``target`` while it wrote it."""
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """The name of a file beside ``target`` that takes its place when the block ends well, and else vanishes.

    Raises:
        OSError: if it cannot be written.
    """
    staging = _beside(target)
    staging.touch()
    mode = staging.stat().st_mode & 0o777
    try:
        yield staging
        with open(staging, "rb") as stream:
            os.fsync(stream.fileno())
        if staging.stat().st_mode & 0o777 != mode:  # what wrote it made a file of its own
            staging.chmod(mode)
        os.replace(staging, target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def atomic_write_text(target: Path, text: str) -> None:
    """Write a file, replacing one that exists, whole or not at all."""
    with atomic_file(target) as staging:
        staging.write_text(text, encoding="utf-8")
