"""The one place where what ends a command becomes a line for its user: faults of input, of the machine, of its use."""

import os
from collections.abc import Sequence

from gossamer.cli.common import app
from gossamer.errors import GossamerError, one_line

_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")


def line_of(error: BaseException) -> str | None:
    """What to tell the user; None of a fault that is gossamer's own, of which the traceback is told."""
    if isinstance(error, (GossamerError, OSError)):
        return one_line(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in _NO_MEMORY)):
        return "the memory is not enough for this; give a smaller batch size or sequence length, or fewer tokens"
    return None


def usage_line(error: Exception, arguments: Sequence[str]) -> str | None:
    """What to tell of arguments that typer cannot use; None if the error is not one of those."""
    message = getattr(error, "format_message", None)
    if message is None:
        return None
    said = " ".join(message().split()).rstrip(".")
    verbs = [
        one.name or (one.callback.__name__.replace("_", "-") if one.callback else "") for one in app.registered_commands
    ]
    command = next((f"{word} " for word in arguments[:1] if word in verbs), "")
    return f"{said}; see gossamer {command}--help"


def check_encoding(arguments: Sequence[str]) -> None:
    """Stop at names that are not UTF-8: most of what reads and writes files here cannot open them.

    Raises:
        GossamerError: naming the argument.
    """
    for text, what in (*((argument, "the argument") for argument in arguments), (os.getcwd(), "the directory")):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = text.encode(errors="backslashreplace").decode()
            raise GossamerError(f"{what} {shown} is not UTF-8; give a name that is") from error
