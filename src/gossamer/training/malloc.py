"""Make malloc keep freed memory; otherwise page faults can take half of a training step on a CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Tell glibc's malloc to reuse large blocks instead of returning them to the system; elsewhere, do nothing.

    On SmolLM2-135M (batch 4, T = 256, bf16 autocast, 2 cores) a training step took 3.5 s instead of 5.2 s.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**28)
