"""What is told to users of a fault that they can mend."""


class GossamerError(Exception):
    """A fault the user can mend; its text is one clear line."""


class CollectiveError(GossamerError):
    """A fault that all processes of a run know of, and end with; the first one says it."""


def one_line(error: Exception) -> str:
    """What to tell the user of a GossamerError or an OSError."""
    if isinstance(error, OSError):
        return f"cannot read or write {error.filename or 'a file of the run'}: {error.strerror or error}"
    return " ".join(str(error).split())
