"""Turn errors that end a command into one line for the user: invalid input, machine limits, wrong usage."""

import os
from collections.abc import Sequence

from gossamer.cli.common import app
from gossamer.errors import GossamerError, one_line

_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")


def line_of(error: BaseException) -> str | None:
    """The line for the user; None for a bug in gossamer, which is shown with its traceback."""
    if isinstance(error, (GossamerError, OSError)):
        return one_line(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in _NO_MEMORY)):
        return "the memory is not enough for this; give a smaller batch size or sequence length, or fewer tokens"
    return None


def usage_line(error: Exception, arguments: Sequence[str]) -> str | None:
    """The line for arguments that typer rejects; None for any other error."""
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
    """Refuse names that are not UTF-8, which most of the libraries that read and write files here cannot open.

    Raises:
        GossamerError: naming the argument.
    """
    for text, what in (*((argument, "the argument") for argument in arguments), (os.getcwd(), "the directory")):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = text.encode(errors="backslashreplace").decode()
            raise GossamerError(f"{what} {shown} is not UTF-8; give a name that is") from error
