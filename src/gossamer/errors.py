"""What is told to users of a fault that they can mend."""

TORCH_WRITER = ("inline_container", "iostream error")
"""What torch says when it could not write a file; it does not say why."""


class GossamerError(Exception):
    """A fault the user can mend; its text is one clear line."""


class CollectiveError(GossamerError):
    """A fault that all processes of a run know of, and end with; the first one says it."""


def cannot_write(target: object, error: Exception) -> GossamerError:
    """What to tell the user of a file or directory that could not be written."""
    return GossamerError(
        f"cannot write {target}: {why_not_written(error)}; give a place that can be written and has room"
    )


def why_not_written(error: BaseException) -> str:
    """The reason, in words for somebody who has to make room or choose another place."""
    if any(words in str(error) for words in TORCH_WRITER):
        return "it could not be written whole; is the disk full?"
    return error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())


def one_line(error: Exception) -> str:
    """What to tell the user of a GossamerError or an OSError."""
    if isinstance(error, OSError):
        return f"cannot read or write {error.filename or 'a file, or the output'}: {error.strerror or error}"
    return " ".join(str(error).split())
