"""Training checkpoints on disk: list them and verify their files."""

import json
from pathlib import Path

from gossamer.errors import GossamerError
from gossamer.files import file_checksum, flush, set_modes
from gossamer.inputs import read_json

_SEAL = "checksums.json"


def write_checksums(checkpoint: Path) -> None:
    """Record size and CRC-32 of every file of a checkpoint, for :func:`checkpoint_error`, and flush all to disk.

    The files get the permissions of newly created files.
    """
    set_modes(checkpoint)
    sums = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        sums[str(file.relative_to(checkpoint))] = [file.stat().st_size, file_checksum(file)]
    (checkpoint / _SEAL).write_text(json.dumps(sums, indent=2))
    flush(checkpoint)


def checkpoint_error(checkpoint: Path) -> str | None:
    """Describe what is wrong with a checkpoint's files; None if they are intact."""
    try:
        sums: dict[str, list[int]] = read_json(checkpoint / _SEAL, dict[str, list[int]])
    except GossamerError:
        return f"{_SEAL} is missing or damaged"
    for name, (size, crc, *_) in sums.items():
        file = checkpoint / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
        if file_checksum(file) != crc:
            return f"{name} has changed since it was written"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def last_valid_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest intact checkpoint; also return one line about each newer, damaged one."""
    faults: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        if (wrong := checkpoint_error(checkpoint)) is None:
            return checkpoint, faults
        faults.append(f"{checkpoint} is damaged: {wrong}")
    return None, faults
