"""Data sets on the Hugging Face Hub: their rows, and the commit at which they are read.

A text is ``[hub:]NAME[@REVISION][:CONFIG[:SPLIT]]``; the revision is a branch, a tag or a commit. A run keeps
reading the commit that it started with, even if the repository changes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from gossamer.errors import GossamerError
from gossamer.names import SELF
from gossamer.training.documents import HUB, is_local

if TYPE_CHECKING:
    from datasets import IterableDataset


class DataSet(NamedTuple):
    """The parts of a data set's name; empty strings where the text does not give them.

    Attributes:
        name: the repository, or a directory with the same layout.
        revision: revision of the repository.
        config: one of its configurations.
        part: one of its splits.
    """

    name: str
    revision: str
    config: str
    part: str

    @classmethod
    def of(cls, text: str) -> "DataSet":
        """Parse the text that names a data set."""
        where, config, part = (*text.removeprefix(HUB).split(":", 2), "", "")[:3]
        name, _, revision = (where, "", "") if os.path.isdir(where) else where.partition("@")
        return cls(name, revision, config, part)


def data_set_commit(text: str) -> str | None:
    """Get the current commit of a data set on the Hub; None for other texts, or if the Hub cannot tell."""
    from huggingface_hub import HfApi

    if text == SELF or is_local(text) or os.path.isdir(DataSet.of(text).name):
        return None
    name, revision, *_ = DataSet.of(text)
    try:
        return HfApi().dataset_info(name, revision=revision or None).sha
    except Exception:  # reading the text will report what is wrong
        return None


def at_commit(text: str, commit: str | None) -> str:
    """Pin a text to a commit; None leaves it as it is."""
    if commit is None:
        return text
    name, _, config, part = DataSet.of(text)
    return HUB + ":".join((f"{name}@{commit}", config, part)).rstrip(":")


def check_commit(text: str, commit: str) -> None:
    """Raise if a commit of a data set can no longer be read.

    Raises:
        GossamerError: naming the text and the commit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with hub_faults(text):
        try:
            HfApi().dataset_info(DataSet.of(text).name, revision=commit)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise GossamerError(
                f"{text} on the Hub does not have the commit {commit[:12]} any more, which the run was begun with; "
                "begin anew with another --out"
            ) from error


def hub_stream(text: str) -> "IterableDataset":
    """Open the column ``text`` of a data set as a stream that is read lazily.

    Raises:
        GossamerError: if the data set cannot be reached, or has no such column.
    """
    from datasets import load_dataset

    name, revision, config, part = DataSet.of(text)
    with hub_faults(text):
        rows = load_dataset(name, config or None, split=part or "train", revision=revision or None, streaming=True)
        first = next(iter(rows), {"text": ""})
        if not isinstance(first.get("text", 0), str | None):
            columns = ", ".join(first)
            raise GossamerError(f"the data set {text} has no column 'text' of strings, only {columns}")
        return rows.select_columns("text")


@contextmanager
def hub_faults(text: str) -> Iterator[None]:
    """Context manager that turns every error of a Hub data set into a GossamerError."""
    try:
        yield
    except GossamerError:
        raise
    except Exception as error:  # the Hub client raises dozens of types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GossamerError(
            f"no text {text}: there is no such file, and as a Hub data set it cannot be read ({reason})"
        ) from error
