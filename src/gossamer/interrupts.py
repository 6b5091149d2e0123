"""Ctrl-C and SIGTERM end a command in the same way at any moment: partial output is removed and one line is printed.

The first signal raises KeyboardInterrupt in the main thread; the second ends the process at once. During imports,
Python and some libraries swallow that exception, so check :meth:`Interrupts.arrived`.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 2
"""Exit code of an interrupted command."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The signal handlers of a process, and whether a signal has arrived."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.count = 0

    @property
    def arrived(self) -> bool:
        """Whether a signal has arrived, so that the command has to end."""
        return self.count > 0

    def handle(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        if os.getpid() != self.process:  # a forked worker: the signal ends it, as it would without this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.count += 1
        if self.count > 1:
            os._exit(EXIT_CODE)
        raise KeyboardInterrupt

    def swallowed(self, unraisable: Any) -> None:
        """Send SIGINT again where Python could not raise KeyboardInterrupt, for example in an import callback."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt) and os.getpid() == self.process:
            self.count = 0
            os.kill(os.getpid(), signal.SIGINT)
        else:
            sys.__unraisablehook__(unraisable)


_at_work: list[Interrupts] = []


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handle Ctrl-C and SIGTERM within the block as the module docstring describes; blocks may be nested."""
    if _at_work or threading.current_thread() is not threading.main_thread():
        yield _at_work[-1] if _at_work else Interrupts()
        return
    here = Interrupts()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    hook = sys.unraisablehook
    for number in _SIGNALS:
        if before[number] is not signal.SIG_IGN:  # a shell ignores SIGINT in background jobs
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
