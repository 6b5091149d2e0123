"""Triton implementation with one kernel for all gradients: five matrix products per tile instead of seven.

dq is accumulated by atomic additions in float32, in no fixed order, so runs differ in the last bits. Heads larger than
:data:`gossamer.ops.triton.FUSED_FEATURES` use the two backward kernels of :mod:`gossamer.ops.triton`. The forward pass
and ``open_links`` are also those of that module.
"""

from functools import partial

from gossamer.ops import triton

forward = triton.forward
backward = partial(triton.backward, fused=True)
open_links = triton.open_links
