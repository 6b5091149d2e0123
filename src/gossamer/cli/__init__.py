"""The command line: one verb a job. Faults of the user end in one line and exit code 2."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext

# The order in which --help names the commands.
from gossamer.cli import pictures, training, evaluation, circuits, explain, hub  # noqa: F401
from gossamer.cli.common import app
from gossamer.cli.faults import check_encoding, line_of, usage_line
from gossamer.cli.output import PIPE_CLOSED, broken_pipe, silence, unwritten, watched_output, write_plain_characters
from gossamer.errors import CollectiveError, one_line
from gossamer.interrupts import EXIT_CODE, Interrupts, interrupts


_INTERRUPTED = 130
"""The exit code that typer makes of Ctrl-C."""


def main() -> None:
    """Run the command line; one line to stderr and exit code 2 for what the user can mend.

    Of several processes the first one speaks; faults that are not the user's have their traceback from any. Characters
    that the output cannot hold are written in others. Where nobody reads the output any more, as after ``| head -1``,
    the command ends without a word and with exit code 141, as one that SIGPIPE ended.
    """
    write_plain_characters()
    with interrupts() as signals, watched_output() as reader_gone:
        try:
            code = _run(signals, reader_gone)
        except BaseException as error:
            if broken_pipe(error) is None or not reader_gone():
                raise
            code = PIPE_CLOSED
    raise SystemExit(code)


def _run(signals: Interrupts, reader_gone: Callable[[], bool]) -> int:
    """Run the command, and say what ended it; the exit code."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        with nullcontext() if first else silence():
            check_encoding(sys.argv[1:])
            code = app(standalone_mode=False) or 0
        line = _interrupted() if code == _INTERRUPTED else unwritten()
    except CollectiveError as error:
        from gossamer.training.distributed import leave_process_group

        if first:
            _say(one_line(error))
        leave_process_group()
        return EXIT_CODE
    except SystemExit as stopped:  # typer and rich end so where a pipe is broken, whichever it is
        pipe = broken_pipe(stopped)
        if pipe is None or reader_gone():
            raise
        line = one_line(pipe)
    except Exception as error:
        if broken_pipe(error) is not None and reader_gone():
            raise
        line = _line_of(error, signals)
    if line is None:
        return code
    if first and line:
        _say(line)
    unwritten()  # else the interpreter fails at it once more
    return EXIT_CODE


def _line_of(error: Exception, signals: Interrupts) -> str:
    """What to tell of an error that ended the command; nothing where typer prints the help instead."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return ""
    if (line := line_of(error) or usage_line(error, sys.argv[1:])) is not None:
        return line
    if signals.arrived:
        return _interrupted()
    if isinstance(error, RuntimeError) and "torch" in sys.modules:
        from gossamer.training.distributed import HOW_TO_GO_ON, is_lost_peer

        if is_lost_peer(error):
            _say(f"another process of the run ended; {HOW_TO_GO_ON}")
            os._exit(EXIT_CODE)
    raise error


def _interrupted() -> str:
    return "interrupted" + ("; go on with --resume" if "sparsify" in sys.argv[1:2] else "")


def _say(line: str) -> None:
    print(f"gossamer: {line}", file=sys.stderr, flush=True)
