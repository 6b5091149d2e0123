"""Read the documents of a local text: a file, or a folder of files.

    .txt           one document
    .jsonl         one document per line, under the key ``text``
    .json          the same, or a list of such objects, or a single one

Each may be compressed: ``.gz``, ``.bz2``, ``.xz``, ``.zst``. Upper-case suffixes work too.

From a folder, all files with these suffixes are read, including subfolders, sorted by name. Names that start with a dot
are skipped, such as notebook backups and macOS metadata. Symbolic links are followed; no file is read twice.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from pyarrow import input_stream

from gossamer.errors import GossamerError
from gossamer.names import SELF

HUB = "hub:"
"""Prefix of the name of a Hub data set, needed where a local file has the same name."""

KINDS = (".txt", ".jsonl", ".json")

_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {
    "": lambda path: path.open("rb"),
    ".gz": lambda path: cast(IO[bytes], gzip.open(path)),  # noqa: SIM115
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: cast(IO[bytes], input_stream(path, compression="zstd")),
}

_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}

ENDINGS = f"{', '.join(KINDS)}, each also with {', '.join(_NAMES)}"

_END = 1 << 16
"""Bytes at each end of a file that enter its fingerprint."""

_SHOWN = 3
"""Maximum number of skipped names listed per reason."""


def file_kind(name: str) -> tuple[str, str] | None:
    """Kind and compression of a file by its name, as ``(".jsonl", ".gz")``; None if it is not a text file."""
    stem, ending = os.path.splitext(name.lower())
    compression = ending if ending in _OPENERS else ""
    kind = os.path.splitext(stem)[1] if compression else ending
    return (kind, compression) if kind in KINDS else None


def is_local(text: str) -> bool:
    """Whether a text is a local file or directory rather than a Hub data set.

    Raises:
        GossamerError: if it looks like a local path that does not exist.
    """
    if os.path.exists(text):
        return True
    looks = file_kind(text) is not None or text.count("/") > 1 or text.startswith(("/", ".", "~")) or not text
    if looks and not text.startswith(HUB):
        raise GossamerError(f"no text {text}: there is no such file or directory")
    return False


def text_files(path: Path) -> list[Path]:
    """List the files of a text: the file itself, or those in a directory, sorted by name.

    Raises:
        GossamerError: if a directory contains none, or cannot be read.
    """
    if not path.is_dir():
        return [path]
    found = _Folder(path)
    if not found.files:
        raise GossamerError(f"{path} holds no text: no file ends in {ENDINGS}{_list(found.skipped)}")
    return found.files


def skipped_files(text: str) -> str | None:
    """Describe in one line which files of a directory are not read; None if all of them are."""
    if not os.path.isdir(text):
        return None
    said = _list(_Folder(Path(text)).skipped)
    return f"{text}{said}" if said else None


def text_fingerprint(text: str) -> str | None:
    """Compute the CRC-32 of the names, sizes and both ends of a text's files; None for a text that is not local.

    Raises:
        GossamerError: if the text no longer exists, or cannot be read.
    """
    if text == SELF:
        return None
    path = Path(text)
    if is_local(text):
        files = text_files(path)
    elif (path := Path(text.removeprefix(HUB).split(":")[0])).is_dir():  # a data set as the Hub lays it out
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    else:
        return None
    crc = 0
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else ""
        try:
            with file.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                ends = b""
                for place in (0, max(0, size - _END)):
                    stream.seek(place)
                    ends += stream.read(_END)
        except OSError as error:
            raise GossamerError(f"{file} cannot be read: {error.strerror or error}") from error
        crc = zlib.crc32(f"{name}\0{size}\0".encode(errors="surrogateescape") + ends, crc)
    return f"{crc:08x}"


def _list(names: dict[str, list[str]]) -> str:
    said = []
    for reason, all_names in names.items():
        more = f" and {len(all_names) - _SHOWN} more" if len(all_names) > _SHOWN else ""
        said.append(f"{', '.join(sorted(all_names)[:_SHOWN])}{more} ({reason})")
    return f"; passed over: {'; '.join(said)}" if said else ""


@dataclass
class _Folder:
    """The contents of a directory: its text files, and the skipped names by reason.

    Links are visited last, so that a file is listed under its own name.
    """

    path: Path
    files: list[Path] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    links: list[Path] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        try:
            self._read(self.path)
            while self.links:
                self._visit(self.links.pop(0))
        except OSError as error:
            raise GossamerError(f"{error.filename or self.path} cannot be read: {error.strerror or error}") from error
        self.files.sort()

    def _read(self, folder: Path) -> None:
        if self._is_new(folder):
            for path in (folder / name for name in sorted(os.listdir(folder))):
                if path.name.startswith("."):
                    self._skip(path, "hidden")
                elif path.is_symlink():
                    self.links.append(path)
                else:
                    self._visit(path)

    def _visit(self, path: Path) -> None:
        if path.is_dir():
            target = path.resolve()
            if path.is_symlink() and path.parent.resolve().is_relative_to(target):
                self._skip(path, "leads back to where it lies")
            else:
                self._read(path)
        elif (kind := file_kind(path.name)) is None:
            self._skip(path, "of another kind")
        elif not path.exists():  # a dangling link; reading it raises the error
            self.files.append(path)
        elif not path.is_file():
            self._skip(path, "no file")
        elif self._is_new(path):
            if kind[0] == ".json" and not _has_documents(path):
                self._skip(path, "without documents")
            else:
                self.files.append(path)

    def _is_new(self, path: Path) -> bool:
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in self.seen:
            self._skip(path, "found already")
            return False
        self.seen.add(identity)
        return True

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.setdefault(reason, []).append(str(path.relative_to(self.path)))


def _has_documents(path: Path) -> bool:
    """Whether a .json file contains documents; many are settings instead."""
    try:
        return next(read_documents(path), None) is not None
    except GossamerError:
        return False


def read_documents(path: Path) -> Iterator[str]:
    """Read the documents of a file, or of all files of a directory sorted by name.

    Raises:
        GossamerError: naming the file, and for JSON the line, that cannot be read.
    """
    if path.is_dir():
        for file in text_files(path):
            yield from read_documents(file)
        return
    if (found := file_kind(path.name)) is None:
        raise GossamerError(f"{path} is of an unknown kind; text files end in {ENDINGS}")
    kind, compression = found
    try:
        with io.TextIOWrapper(_OPENERS[compression](path), encoding="utf-8-sig") as stream:
            if kind == ".txt":
                yield stream.read()
            else:
                yield from _json_documents(stream, path, lines=kind == ".jsonl")
    except UnicodeDecodeError as error:
        raise GossamerError(f"{path} is not UTF-8 text: {error}") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise GossamerError(f"{path} is not a whole {_NAMES[compression]} file: {error}") from error
    except OSError as error:
        # Errors of the operating system have an errno; those of the decompressors have none.
        if error.errno is None and compression:
            raise GossamerError(f"{path} is not a whole {_NAMES[compression]} file: {error}") from error
        raise GossamerError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_documents(stream: io.TextIOWrapper, path: Path, *, lines: bool) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        if not lines:
            with suppress(ValueError, RecursionError):  # a value that spans several lines, or invalid JSON
                lines = isinstance(json.loads(line), dict)
            if not lines:
                yield from _whole_documents("\n" * (number - 1) + line + stream.read(), path)
                return
        yield _document(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")


def _whole_documents(content: str, path: Path) -> Iterator[str]:
    value = _parsed(content, str(path))
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _document(row, f"{path}, object {number}")


def _parsed(content: str, place: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise GossamerError(f"{place}: not valid JSON ({error})") from error


def _document(row: Any, place: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise GossamerError(f"{place}: no string under the key 'text'")
    text: str = row["text"]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GossamerError(f"{place}: the text holds half a character ({text[error.start]!a})") from error
    return text
