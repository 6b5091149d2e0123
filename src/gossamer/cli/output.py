"""Standard output and error: characters that they do not hold, a reader that has gone, silence."""

import codecs
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

from gossamer.errors import why_not_written

PIPE_CLOSED = 141
"""The exit code of a command whose reader has gone, as after ``| head -1``: what shells say of SIGPIPE (128 + 13)."""

_PLAIN = {
    "τ": "tau", "λ": "lambda", "ε": "epsilon", "±": "+-", "×": "x", "−": "-", "–": "-", "‖": "||", "→": "->",
    "↑": "^", "↓": "v", "≥": ">=", "≤": "<=", "…": "...", "“": '"', "”": '"', "’": "'",
}  # fmt: skip
"""What stands for characters that the terminal's or the file's encoding does not have."""


def write_plain_characters() -> None:
    """Have the streams write other characters where they do not hold one."""
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
    """Write what is still to be written to standard output; in one line, why that cannot be done. It is dropped then.

    Raises:
        BrokenPipeError: if its reader has gone.
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
    """The error of a pipe that nobody reads, which others made an exit with code 1 of; None of any other error."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, BrokenPipeError):
        seen = seen.__cause__ or seen.__context__
    return seen


@contextmanager
def watched_output() -> Iterator[Callable[[], bool]]:
    """Gives what says whether nobody reads a standard stream any more; what it still has to write is dropped then."""
    copies: dict[int, int] = {}  # rich puts the null device in the place of a stream that is broken
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
    # What a buffer still holds goes nowhere when the interpreter ends, instead of failing there once more.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def silence() -> Iterator[None]:
    """Within the block nothing is written to the standard streams."""
    with (
        open(os.devnull, "w", encoding="utf-8", errors="replace") as nothing,
        redirect_stdout(nothing),
        redirect_stderr(nothing),
    ):
        yield
