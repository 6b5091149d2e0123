"""Entry point of the ``gossamer`` script, and of ``python -m gossamer`` for multi-process launchers."""

import signal
import sys

from gossamer.interrupts import EXIT_CODE, interrupts


def main() -> None:
    """Run the command line; its imports can be interrupted too."""
    with interrupts() as signals:
        try:
            from gossamer.cli import main as command_line

            command_line()
        except SystemExit:
            raise
        except BaseException:
            if not signals.arrived:
                raise
            print("gossamer: interrupted", file=sys.stderr, flush=True)
            sys.exit(EXIT_CODE)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):  # do not interrupt the shutdown
                signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
