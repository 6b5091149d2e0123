"""Ctrl-C and SIGTERM end a command alike, at any moment: what is half written goes, and one line is said.

The first signal raises KeyboardInterrupt in the main thread, the second ends the process at once. While a module is
imported, Python and others catch that exception here and there: the one who asks :meth:`Interrupts.arrived` knows.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 2
"""Of a command that was interrupted."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Whether a signal has come."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.count = 0

    @property
    def arrived(self) -> bool:
        """Whether the command is to end."""
        return self.count > 0

    def handle(self, number: int, frame: Any) -> None:
        """Take a signal."""
        if os.getpid() != self.process:  # a worker that was forked: it dies of it, as it would have without this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.count += 1
        if self.count > 1:
            os._exit(EXIT_CODE)
        raise KeyboardInterrupt

    def swallowed(self, unraisable: Any) -> None:
        """Send the signal again where Python could not raise its exception, as in a callback of an import."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt) and os.getpid() == self.process:
            self.count = 0
            os.kill(os.getpid(), signal.SIGINT)
        else:
            sys.__unraisablehook__(unraisable)


_at_work: list[Interrupts] = []


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Within the block, Ctrl-C and SIGTERM are handled as this module says; blocks may lie in each other."""
    if _at_work or threading.current_thread() is not threading.main_thread():
        yield _at_work[-1] if _at_work else Interrupts()
        return
    here = Interrupts()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    hook = sys.unraisablehook
    for number in _SIGNALS:
        if before[number] is not signal.SIG_IGN:  # as in the background of a shell
            signal.signal(number, here.handle)
    sys.unraisablehook = here.swallowed
    _at_work.append(here)
    try:
        yield here
    finally:
        _at_work.pop()
        sys.unraisablehook = hook
        for number in _SIGNALS:
            signal.signal(number, before[number])
