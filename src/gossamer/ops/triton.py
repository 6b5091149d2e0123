"""Gated attention on NVIDIA GPUs: Triton kernels in the style of FlashAttention-2 (arXiv 2307.08691).

forward   one program per block of queries: online softmax over the tiles of keys; the weight of a closed link is left
          out of the product with v but not of the normaliser. Also sums sigma(G) and counts G > 0 per query.
dq        one program per block of queries: recomputes the tiles, writes dq and the block's part of the bias gradient.
dk, dv    one program per block of keys and key/value head: loops over its query heads and their queries.
links     the forward kernel, without values, counts; a second kernel writes each query's links from its start offset.

Every output is written once, by one program: no atomics, no read-modify-write, the same bits in every run
(:mod:`gossamer.ops.triton_fused` gives this up). The gradients are those of docs/derivations.md. Tiles whose pairs are
all allowed skip the mask, and tiles without allowed pairs are not visited, except with a full mask. The kernels are in
:mod:`gossamer.ops.triton_kernels`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from gossamer.ops import triton_kernels as kernels
from gossamer.ops.gates import OpenLinks, Pairs, empty_rows
from gossamer.ops.options import AttentionOptions, BackwardInputs

_FAR = 1e30
"""Replaces an infinite bias: larger than any logit, but finite, to avoid inf - inf."""

FUSED_FEATURES = 64
"""Largest head size for the fused backward pass; above it, the kernel spills registers."""

Kernel = Literal["forward", "query_gradients", "key_value_gradients", "fused_gradients", "write_links"]


@dataclass(frozen=True)
class Launch:
    """Tile of ``M`` queries by ``N`` keys, warps per program, and stages of the software pipeline."""

    M: int
    N: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch. Fused multiply-add is explicit because Triton 3.10 changes the default."""
        return {**asdict(self), "enable_fp_fusion": True}


def launch(kernel: Kernel, features: int, element_size: int, queries: int, narrow: bool = False) -> Launch:
    """Choose tile sizes that spill no registers on sm_80 and sm_90 (tests/ops/test_triton.py).

    Args:
        features: head size, rounded up to a power of two.
        element_size: bytes per element of q, k and v.
        queries: number of queries; few (generation) get a small tile.
        narrow: whether there is padding, a mask, a window or a soft cap, which need additional registers.
    """
    if element_size > 2:
        rows = 32 if features > 128 or kernel in ("key_value_gradients", "fused_gradients") else 64
        return Launch(rows, 32, 4, 1)
    if queries <= 16:
        return Launch(16, 64 if features <= 128 else 32, 4, 2)
    size = min(size for size in (32, 64, 128, 256) if features <= size)
    if kernel == "forward":
        return Launch(32, 32, 4, 2) if size == 256 else Launch(128, 32 if size == 128 else 64, 8, 2)
    if kernel == "query_gradients":
        if size <= 64 and not narrow:
            return Launch(64, 64, 4, 2)
        return Launch(128, 32, 8, 2) if size <= 128 else Launch(32, 32, 4, 1)
    if kernel in ("key_value_gradients", "fused_gradients"):
        if size <= 64:
            return Launch(32 if size == 32 and kernel == "key_value_gradients" else 16, 64, 4, 1)
        return Launch(64 if size == 128 else 32, 32, 8, 1)
    return Launch(32, 32, 4, 1) if size > 128 else Launch(64, 32, 4, 2)


class _Call:
    """The arguments of one call that all kernels share; ``others`` are further tensors that the kernels read."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        gate_bias: Tensor,
        pairs: Pairs,
        scale: float,
        softcap: float | None,
        *others: Tensor,
    ) -> None:
        self.batch, self.heads, self.queries, self.d = q.shape
        self.q, self.k, self.pairs = q, k, pairs
        self.bias = gate_bias.float().clamp(-_FAR, _FAR)
        self.extents = pairs.extents
        self.real = None if pairs.real is None else pairs.real.contiguous().view(torch.uint8)
        self.mask = None if pairs.mask is None else pairs.mask.view(torch.uint8)
        self.mask_strides = (0, 0, 0) if self.mask is None else (self.mask.stride(0), *self.mask.stride()[2:])
        self.sizes = (self.heads, pairs.queries, pairs.keys, pairs.window or 0, scale, softcap or 1.0)
        self.flags = {
            "GROUPS": self.heads // k.shape[1],
            "D": self.d,
            "PD": padded(self.d),
            "CAUSAL": pairs.causal,
            "WINDOW": pairs.window is not None,
            "SOFTCAP": softcap is not None,
            "FAR": any(_reach(x) >= 1 << 31 for x in (q, k, *others)),
            "HAS_EXTENTS": self.extents is not None,
            "HAS_REAL": self.real is not None,
            "HAS_MASK": self.mask is not None,
            # float32 on tensor cores: three tf32 products are as exact. Reading allow_tf32 raises after the newer
            # setting has been used; the newer setting follows the older one.
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3",
        }

    def launch(self, kernel: Kernel, value_size: int = 0) -> Launch:
        narrow = any(self.flags[name] for name in ("WINDOW", "SOFTCAP", "HAS_REAL", "HAS_MASK"))
        return launch(kernel, padded(max(self.d, value_size)), self.q.element_size(), self.queries, narrow)

    def by_query(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor with one number for each query of each head."""
        return self.q.new_empty(self.batch, self.heads, self.queries, dtype=dtype)


def padded(features: int) -> int:
    """The head size that the kernels use: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(features))


def _dense_rows(*tensors: Tensor) -> list[Tensor]:
    """Make features contiguous, and row strides small enough for 32-bit offsets within a tile."""
    return [x if x.stride(-1) == 1 and x.stride(-2) < 1 << 23 else x.contiguous() for x in tensors]


def _reach(x: Tensor) -> int:
    """Elements spanned by the rows of a head, in the tensor or one laid out by :func:`empty_rows`, if that is more."""
    return x.shape[-2] * max(x.stride(-2), x.shape[1] * x.shape[-1])


def _strides(*tensors: Tensor) -> Sequence[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make the device of the tensors the current one, on which kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _attend(
    call: _Call, v: Tensor | None, noise: Tensor | None, expect: bool, count: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Output, expected and hard open links, and log-sum-exp, the last three by query."""
    output = None if v is None else empty_rows(call.q, v.shape[-1])
    opened, log_sum_exp = call.by_query(torch.int64) if count else None, call.by_query()
    expected = call.by_query() if expect else None
    values = 0 if v is None else v.shape[-1]
    sizes = call.launch("forward", values)
    with _on(call.q.device):
        kernels.forward[(triton.cdiv(call.queries, sizes.M), call.heads, call.batch)](
            call.q, call.k, v, call.bias, noise, call.real, call.extents, call.mask, output, log_sum_exp, expected,
            opened, *_strides(call.q, call.k), *((0, 0, 0) if v is None else _strides(v)),
            *((0, 0, 0) if output is None else _strides(output)), *call.mask_strides, *call.sizes,
            **call.flags, **sizes.options(), DV=values, PDV=padded(values), SAMPLE=noise is not None, EXPECT=expect,
            COUNT=count, VALUES=v is not None,
        )  # fmt: skip
    return output, expected, opened, log_sum_exp


def forward(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    v: Float[Tensor, "batch kv_heads keys d_value"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The same as :func:`gossamer.ops.chunked.forward`, on the GPU; accumulates in float32."""
    scale, softcap, noise, expect, count = options
    q, k, v = _dense_rows(q, k, v)
    call = _Call(q, k, gate_bias, pairs, scale, softcap, v)
    output, expected, opened, log_sum_exp = _attend(call, v, noise, expect, count)
    assert output is not None
    return output, expected, opened, log_sum_exp


def backward(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    v: Float[Tensor, "batch kv_heads keys d_value"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    options: AttentionOptions,
    given: BackwardInputs,
    *,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same as :func:`gossamer.ops.chunked.backward`, on the GPU.

    ``fused`` selects the backward pass of :mod:`gossamer.ops.triton_fused`.
    """
    output, log_sum_exp, d_output, d_expected = given
    scale, noise = options.scale, options.noise
    fused = fused and padded(max(q.shape[-1], v.shape[-1])) <= FUSED_FEATURES
    q, k, v, d_output = _dense_rows(q, k, v, d_output)
    call = _Call(q, k, gate_bias, pairs, scale, options.softcap, v, output, d_output)
    prices = None if d_expected is None else d_expected.float().contiguous()
    features = v.shape[-1]
    flags = {
        **call.flags, "DV": features, "PDV": padded(features), "SAMPLE": noise is not None,
        "PRICED": prices is not None, "RESCALE": q.dtype == torch.float16,
    }  # fmt: skip
    dk, dv = (empty_rows(x, x.shape[-1]) for x in (k, v))
    # Per-query terms that the first kernel computes for the second.
    terms = [call.by_query() for _ in range(3)] + [None if prices is None else call.by_query()]
    shared = (call.bias, noise, call.real, call.extents, call.mask)
    sizes = call.launch("query_gradients", features)
    blocks = triton.cdiv(call.queries, sizes.M)
    highest, d_bias = torch.empty(2, call.batch, call.heads, blocks, dtype=torch.float32, device=q.device)
    keys = call.launch("fused_gradients" if fused else "key_value_gradients", features)
    key_blocks = triton.cdiv(pairs.keys, keys.N)
    if fused:
        dq = empty_rows(q, q.shape[-1]).float().zero_()
        d_bias = torch.empty(call.batch, call.heads, key_blocks, dtype=torch.float32, device=q.device)
    else:
        dq = empty_rows(q, q.shape[-1])
    with _on(q.device):
        if fused:
            kernels.query_terms[(blocks, call.heads, call.batch)](
                call.bias, output, d_output, log_sum_exp, prices, *terms, highest, *_strides(output, d_output),
                call.heads, call.queries, DV=features, PDV=padded(features), M=sizes.M, FAR=call.flags["FAR"],
                PRICED=prices is not None,
            )  # fmt: skip
        else:
            kernels.query_gradients[(blocks, call.heads, call.batch)](
                q, k, v, *shared, output, d_output, log_sum_exp, prices, *terms, highest, dq, d_bias,
                *_strides(q, k, v, output, d_output, dq), *call.mask_strides, *call.sizes, **flags, **sizes.options(),
            )  # fmt: skip
        kernels.key_value_gradients[(key_blocks, k.shape[1], call.batch)](
            q, k, v, *shared, d_output, prices, *terms, highest, dk, dv, *((dq, d_bias) if fused else (None, None)),
            *_strides(q, k, v, d_output, dk, dv, dq), *call.mask_strides, *call.sizes, blocks, FUSED=fused, **flags,
            **keys.options(),
        )  # fmt: skip
    if fused:
        dq = dq.mul_(scale).to(q.dtype)
    return dq, dk, dv, d_bias.sum((0, 2)).to(gate_bias.dtype)


@torch.no_grad()
def open_links(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    *,
    scale: float,
    softcap: float | None,
) -> OpenLinks:
    """The same as :func:`gossamer.ops.naive.open_links`, on the GPU: one pass counts, a second writes."""
    q, k = _dense_rows(q, k)
    call = _Call(q, k, gate_bias, pairs, scale, softcap)
    _, _, opened, log_sum_exp = _attend(call, None, None, expect=False, count=True)
    assert opened is not None
    starts = opened.flatten().cumsum(0).sub_(opened.flatten())
    counts = opened.sum(-1)
    links = int(counts.sum())
    found = torch.empty(links, dtype=torch.int32, device=q.device)
    weights = torch.empty(links, dtype=torch.float32, device=q.device)
    if links:
        sizes = call.launch("write_links")
        with _on(q.device):
            kernels.write_links[(triton.cdiv(call.queries, sizes.M), call.heads, call.batch)](
                q, k, call.bias, call.real, call.extents, call.mask, log_sum_exp, starts, found, weights,
                *_strides(q, k), *call.mask_strides, *call.sizes, **call.flags, **sizes.options(),
            )  # fmt: skip
    return OpenLinks(counts, found, weights)
