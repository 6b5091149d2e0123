"""Several processes that train one model: who writes, who waits, and how all of them end when one does.

torchrun or ``accelerate launch`` starts them, and each goes through the same code. The first one alone prepares, prints
and writes; the others wait for it and read what it wrote. What can fail on one process only stands in
:func:`synchronized`, so that no process waits for one that is gone. With one process nothing here does anything.
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
"""How long a process waits for another: as long as the first may need to prepare a large text."""

HOW_TO_GO_ON = "go on with the same command and --resume"

_T = TypeVar("_T")


def processes() -> PartialState:
    """This process among those of the run; the first call joins them."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def check_processes(wanted: int) -> None:
    """Stop if a run for another number of processes is to be trained.

    Raises:
        GossamerError: saying how many there are.
    """
    if (found := processes().num_processes) != wanted:
        raise GossamerError(
            f"the run is one of {wanted} processes and {found} were started; "
            f"start it with torchrun --nproc_per_node {wanted} -m gossamer"
        )


@contextmanager
def synchronized() -> Iterator[None]:
    """Leave the block only when all processes are through it; a fault of one of them ends it on all.

    Raises:
        StoppedTogether: on every process, in the words of the first one that raised a GossamerError or OSError.
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
    """What ``work`` returns on the first process, on all of them; it runs there only.

    Raises:
        StoppedTogether: on every process, if it raised a GossamerError or OSError there.
    """
    found: list[_T | None] = [None]
    with synchronized():
        if processes().is_main_process:
            found[0] = work()
    return cast(_T, broadcast_object_list(found)[0])


def collective_error(line: str) -> GossamerError:
    """What to raise for a fault that all processes find at the same place."""
    return CollectiveError(line) if processes().num_processes > 1 else GossamerError(line)


def exit_on_sigterm() -> None:
    """Let a process that its launcher ends, because another one ended, say how to go on, and end at once.

    A signal handler of Python's would have to wait for the collective call that waits for the process that is gone.
    Only the first two processes speak: one of them is left if the other was the one that ended.
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
    """Part from the other processes, when all have come here; from then on each ends on its own, in silence."""
    here = processes()
    if here.num_processes == 1:
        return
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    here.wait_for_everyone()
    here.destroy_process_group()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether the error of a collective call says that another process is gone."""
    if not torch.distributed.is_initialized():
        return False
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)
