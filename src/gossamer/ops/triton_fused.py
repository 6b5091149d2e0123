"""The Triton kernels with one kernel for all gradients: five matrix products a tile instead of seven.

dq is summed up by atomic additions in float32, in whatever order the programs come: runs differ in the last bits.
Heads larger than :data:`gossamer.ops.triton.FUSED_FEATURES` have the two kernels of :mod:`gossamer.ops.triton`, from
which all else is too.
"""

from functools import partial

from gossamer.ops import triton

forward = triton.forward
backward = partial(triton.backward, fused=True)
open_links = triton.open_links
