"""Training in several processes: which one writes, which ones wait, and how all of them stop when one fails.

torchrun or ``accelerate launch`` starts the processes, and all run the same code. Only the first one prepares, prints
and writes; the others wait and read what it wrote. Code that can fail in a single process runs inside
:func:`synchronized`, so that no process waits for one that has ended. With a single process, they do nothing.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from gossamer.errors import CollectiveError, GossamerError, one_line

PATIENCE = timedelta(hours=6)
"""How long a process waits for another; the first one may need this long to prepare a large text."""

HOW_TO_GO_ON = "go on with the same command and --resume"

_T = TypeVar("_T")


def processes() -> PartialState:
    """The state of this process within the run; the first call joins the process group."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def check_processes(wanted: int) -> None:
    """Raise if the run is meant for another number of processes.

    Raises:
        GossamerError: with both numbers.
    """
    if (found := processes().num_processes) != wanted:
        raise GossamerError(
            f"the run is one of {wanted} processes and {found} were started; "
            f"start it with torchrun --nproc_per_node {wanted} -m gossamer"
        )


@contextmanager
def synchronized() -> Iterator[None]:
    """Context manager that all processes leave together; an error in one is raised in all of them.

    Raises:
        CollectiveError: in every process, with the message of the first one that raised a GossamerError or OSError.
    """
    here = processes()
    if here.num_processes == 1:
        yield
        return
    fault: Exception | None = None
    try:
        yield
    except (GossamerError, OSError) as error:
        fault = error
    said = gather_object([None if fault is None else one_line(fault)])
    for rank, line in enumerate(said):
        if line is not None:
            raise CollectiveError(line if rank == 0 else f"process {rank}: {line}") from fault


def on_main_process(work: Callable[[], _T]) -> _T:
    """Run ``work`` in the first process only and return its result in all of them.

    Raises:
        CollectiveError: in every process, if ``work`` raised a GossamerError or OSError.
    """
    found: list[_T | None] = [None]
    with synchronized():
        if processes().is_main_process:
            found[0] = work()
    return cast(_T, broadcast_object_list(found)[0])


def collective_error(line: str) -> GossamerError:
    """Create the exception for an error that all processes detect at the same point."""
    return CollectiveError(line) if processes().num_processes > 1 else GossamerError(line)


def exit_on_sigterm() -> None:
    """On SIGTERM, which a launcher sends when another process has ended, print how to continue and exit at once.

    A Python signal handler would not run until the collective call returns, which waits for the process that has ended.
    Only the first two processes print: if one of them is the one that ended, the other is left.
    """
    here = processes()
    if here.num_processes == 1:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer)

    def wait() -> None:
        while os.read(reader, 1)[0] != signal.SIGTERM:
            pass
        if here.process_index < 2:
            line = f"gossamer: stopped from outside, as when another process of the run ends; {HOW_TO_GO_ON}\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
        os._exit(2)

    threading.Thread(target=wait, daemon=True).start()


def leave_process_group() -> None:
    """Leave the process group once all processes have arrived; afterwards each ends independently and silently."""
    here = processes()
    if here.num_processes == 1:
        return
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    here.wait_for_everyone()
    here.destroy_process_group()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error of a collective call means that another process has ended."""
    if not torch.distributed.is_initialized():
        return False
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)
