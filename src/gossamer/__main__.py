"""The command line, for the script ``gossamer`` and for launchers of several processes: ``python -m gossamer``."""

import signal
import sys

from gossamer.interrupts import EXIT_CODE, interrupts


def main() -> None:
    """Run the command line; whatever is imported for it can be interrupted."""
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
            for number in (signal.SIGINT, signal.SIGTERM):  # what ends now shall not be disturbed
                signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
