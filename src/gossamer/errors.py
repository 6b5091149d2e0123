"""What is told to users of a fault that they can mend."""


class GossamerError(Exception):
    """A fault the user can mend; its text is one clear line."""


class CollectiveError(GossamerError):
    """A fault that all processes of a run know of, and end with; the first one says it."""


def cannot_write(target: object, error: Exception) -> GossamerError:
    """What to tell the user of a file or directory that could not be written."""
    return GossamerError(f"cannot write {target}: {_reason(error)}; give a place that can be written and has room")


def _reason(error: Exception) -> str:
    if "inline_container" in str(error):  # torch's zip writer, which does not say why
        return "it could not be written whole; is the disk full?"
    return error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())


def one_line(error: Exception) -> str:
    """What to tell the user of a GossamerError or an OSError."""
    if isinstance(error, OSError):
        return f"cannot read or write {error.filename or 'a file of the run'}: {error.strerror or error}"
    return " ".join(str(error).split())
