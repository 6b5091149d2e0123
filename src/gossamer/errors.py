"""Errors that users can fix, and their messages."""

TORCH_WRITER = ("inline_container", "iostream error")
"""Parts of torch's error messages when it cannot write a file; the messages do not give the reason."""


class GossamerError(Exception):
    """An error that the user can fix; its message is one clear line."""


class CollectiveError(GossamerError):
    """An error that is known to all processes of a run and ends them all; only the first process reports it."""


def cannot_write(target: object, error: Exception) -> GossamerError:
    """The error to raise for a file or directory that could not be written."""
    return GossamerError(
        f"cannot write {target}: {why_not_written(error)}; give a place that can be written and has room"
    )


def why_not_written(error: BaseException) -> str:
    """The reason for a failed write, worded for a user who has to free space or choose another location."""
    if any(words in str(error) for words in TORCH_WRITER):
        return "it could not be written whole; is the disk full?"
    return error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())


def one_line(error: Exception) -> str:
    """The one-line message of a GossamerError or an OSError."""
    if isinstance(error, OSError):
        return f"cannot read or write {error.filename or 'a file, or the output'}: {error.strerror or error}"
    return " ".join(str(error).split())
