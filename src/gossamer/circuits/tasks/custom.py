"""Custom tasks from a JSONL file in UTF-8, with one object per line.

The keys are those of :class:`gossamer.circuits.tasks.base.Example`:

    {"clean": "The capital of France is", "corrupted": "The capital of Italy is",
     "answers": [" Paris"], "wrong": [" Rome"]}

(on one line). The first line may also have ``metric``: ``logit_difference`` (default) or ``probability_difference``.
"""

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from gossamer.circuits.tasks.base import Example, MetricKind, Task
from gossamer.errors import GossamerError
from gossamer.inputs import parse_json, read_text

_KEYS = {"clean": str, "corrupted": str, "answers": list, "wrong": list}


def task_from_jsonl(file: str | Path) -> Task:
    """Load a task whose examples are the lines of a file; the seed determines their order.

    Raises:
        GossamerError: naming the file, the line and the problem.
    """
    file = Path(file)
    if file.stem.startswith("."):
        raise GossamerError(f"{file} is called by a dot and nothing before it; give the file a name, as own.jsonl")
    # Not splitlines(): it also splits at U+2028, U+0085 and others, which JSON strings may contain.
    lines = read_text(file).split("\n")
    # A file starts with a byte-order mark; in concatenated files, a later line can have one too.
    numbered = ((number, line.removeprefix("\ufeff")) for number, line in enumerate(lines, 1))
    rows = [_row(file, number, line) for number, line in numbered if line.strip()]
    if not rows:
        raise GossamerError(f"{file} holds no example")
    metric: MetricKind = rows[0].get("metric", "logit_difference")
    if metric not in get_args(MetricKind):
        raise GossamerError(f"{file}, line 1: metric is {metric!r}, must be one of {', '.join(get_args(MetricKind))}")
    found = [Example(row["clean"], row["corrupted"], tuple(row["answers"]), tuple(row["wrong"])) for row in rows]

    def examples(source: random.Random, tokenizer: PreTrainedTokenizerBase, corruption: str) -> Iterator[Example]:
        yield from source.sample(found, len(found))

    checksum = zlib.crc32(json.dumps([metric, [astuple(example) for example in found]]).encode())
    return Task(file.stem, f"the examples of {file}", metric, ("file",), examples, file_checksum=checksum)


def _row(file: Path, number: int, line: str) -> dict[str, Any]:
    row: Any = parse_json(line, Any, place=f"{file}, line {number}")
    for key, kind in _KEYS.items():
        fits = isinstance(row, dict) and isinstance(row.get(key), kind)
        if not fits or (kind is list and not all(isinstance(text, str) for text in row[key])):
            wanted = "a list of texts" if kind is list else "a text"
            raise GossamerError(f"{file}, line {number}: {key!r} must be {wanted}")
        for text in row[key] if kind is list else [row[key]]:
            _check_text(file, number, key, text)
    return dict(row)


def _check_text(file: Path, number: int, key: str, text: str) -> None:
    """Reject lone surrogates, which JSON allows but tokenizers do not accept."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise GossamerError(f"{file}, line {number}: {key!r} holds half a character ({half})") from error
