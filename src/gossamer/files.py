"""Files and directories that appear whole or not at all: written beside their place, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gossamer.errors import GossamerError


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A fresh directory beside ``target`` that takes its place when the block ends well, and else vanishes.

    Raises:
        GossamerError: if it cannot be written: no room, no permission.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield staging
        staging.chmod(0o755)
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
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


def _cannot_write(target: Path, error: Exception) -> GossamerError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return GossamerError(f"cannot write {target}: {reason}; give a place that can be written and has room")


def remove_staging(target: Path) -> None:
    """Remove what a killed process left beside ``target`` while it wrote it."""
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def file_beside(target: Path) -> Iterator[Path]:
    """The name of a file beside ``target`` that takes its place when the block ends well, and else vanishes.

    Raises:
        OSError: if it cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(target: Path, text: str) -> None:
    """Write a file, replacing one that exists, whole or not at all."""
    with file_beside(target) as staging:
        staging.write_text(text, encoding="utf-8")
