"""The command line: one verb per task. User errors end with one line and exit code 2."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext

# The order of the commands in --help.
from gossamer.cli import pictures, training, evaluation, circuits, explain, hub  # noqa: F401
from gossamer.cli.common import app
from gossamer.cli.faults import check_encoding, line_of, usage_line
from gossamer.cli.output import PIPE_CLOSED, broken_pipe, silence, unwritten, watched_output, write_plain_characters
from gossamer.errors import CollectiveError, one_line
from gossamer.interrupts import EXIT_CODE, Interrupts, interrupts


_INTERRUPTED = 130
"""The exit code that typer returns for Ctrl-C."""


def main() -> None:
    """Run the command line; errors that the user can fix end with one line on stderr and exit code 2.

    With several processes, only the first prints; any process prints the traceback of an error that is not the user's.
    Characters that the output encoding lacks are replaced. If the reader of the output has gone, as after
    ``| head -1``, the command ends silently with exit code 141, as if ended by SIGPIPE.
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
    """Run the command, print what ended it, and return the exit code."""
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
    except SystemExit as stopped:  # typer and rich exit like this for any broken pipe
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
    unwritten()  # otherwise the interpreter fails to flush it again at exit
    return EXIT_CODE


def _line_of(error: Exception, signals: Interrupts) -> str:
    """The line to print for an error that ended the command; empty where the help is shown instead."""
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
