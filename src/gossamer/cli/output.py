"""Standard output and error: unsupported characters, a reader that has gone, and silence."""

import codecs
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

from gossamer.errors import why_not_written

PIPE_CLOSED = 141
"""Exit code of a command whose reader has gone, as after ``| head -1``: the shells' code for SIGPIPE (128 + 13)."""

_PLAIN = {
    "τ": "tau", "λ": "lambda", "ε": "epsilon", "±": "+-", "×": "x", "−": "-", "–": "-", "‖": "||", "→": "->",
    "↑": "^", "↓": "v", "≥": ">=", "≤": "<=", "…": "...", "“": '"', "”": '"', "’": "'",
}  # fmt: skip
"""Replacements for characters that the encoding of the terminal or file lacks."""


def write_plain_characters() -> None:
    """Make the standard streams replace characters that their encoding lacks."""
    codecs.register_error("gossamer", _in_plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="gossamer")


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in lost), error.end


def unwritten() -> str | None:
    """Flush standard output; if that fails, drop the rest of the output and return the reason as one line.

    Raises:
        BrokenPipeError: if the reader has gone.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop(1)
        return f"cannot write to standard output: {why_not_written(error)}"
    return None


def broken_pipe(error: BaseException) -> BrokenPipeError | None:
    """Find a BrokenPipeError in an error's chain, where typer and rich turn it into an exit; None if there is none."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, BrokenPipeError):
        seen = seen.__cause__ or seen.__context__
    return seen


@contextmanager
def watched_output() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether a standard stream has lost its reader, and then drops its pending output."""
    copies: dict[int, int] = {}  # rich replaces a broken stream by the null device
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            copies[descriptor] = os.dup(descriptor)

    def reader_gone() -> bool:
        gone = [descriptor for descriptor, copy in copies.items() if _is_broken(copy)]
        for descriptor in gone:
            _drop(descriptor)
        return bool(gone)

    try:
        yield reader_gone
    finally:
        for copy in copies.values():
            os.close(copy)


def _is_broken(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _drop(descriptor: int) -> None:
    # At exit, the interpreter then writes the rest of the buffer to the null device instead of failing again.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def silence() -> Iterator[None]:
    """Discard all output to the standard streams within the block."""
    with (
        open(os.devnull, "w", encoding="utf-8", errors="replace") as nothing,
        redirect_stdout(nothing),
        redirect_stderr(nothing),
    ):
        yield
