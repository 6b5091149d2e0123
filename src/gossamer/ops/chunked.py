"""Gated attention over blocks of queries: memory linear in the length, with recomputation in the backward pass.

The matrix products are between blocks of :data:`BLOCK` queries and all the keys that they reach; the elementwise part
in between is in :mod:`gossamer.ops.elements`. The gradients are those of docs/derivations.md. Works on any device and
accumulates in float32 or wider. Grouped queries are rows of one product, so keys and values are not expanded.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.ops.elements import (
    Allowed,
    BackwardElements,
    ForwardElements,
    Noise,
    QueryTerms,
    backward_elements,
    forward_elements,
    run_elements,
    soft_capped,
)
from gossamer.ops.gates import OpenLinks, Pairs, empty_rows, noise_keys
from gossamer.ops.options import AttentionOptions, BackwardInputs

BLOCK = 64
"""Number of queries in a block."""

_FAR = 1e30
"""Replaces an infinite bias: larger than any logit, but finite, to avoid inf - inf."""


def open_links(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    *,
    scale: float,
    softcap: float | None,
) -> OpenLinks:
    """The same as :func:`gossamer.ops.naive.open_links`, in blocks."""
    call = _Call(q, k, gate_bias, pairs, scale, softcap)
    counts = torch.zeros_like(call.bias, dtype=torch.long)
    streams, found, weights = [], [], []
    for start in range(0, pairs.queries, BLOCK):
        block = _Block(call, start)
        logits = block.allowed.fill(soft_capped(block.logits, softcap))
        opened = logits + call.bias[:, None, None] > 0
        counts += opened.sum((-1, -2))
        stream, query, key = opened.nonzero(as_tuple=True)
        streams.append(stream)
        found.append((query + block.rows.start << 16 | key + block.columns.start).to(torch.int32))
        weights.append(torch.softmax(logits, dim=-1)[opened].float())
    order = torch.argsort(torch.cat(streams), stable=True)
    return OpenLinks(counts.view(call.batch, call.heads), torch.cat(found)[order], torch.cat(weights)[order])


class _Call:
    """State shared by all blocks of one call. A stream is one head of one sequence."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        gate_bias: Tensor,
        pairs: Pairs,
        scale: float,
        softcap: float | None,
        noise: Tensor | None = None,
    ) -> None:
        self.batch, self.heads, self.queries, _ = q.shape
        self.kv_heads = k.shape[1]
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q, self.key = q, k.to(self.dtype).contiguous()
        self.bias = gate_bias.to(self.dtype).clamp(-_FAR, _FAR).repeat(self.batch)
        self.pairs, self.scale, self.softcap = pairs, scale, softcap
        self.noise_keys = None if noise is None else noise_keys(noise, self.batch, self.heads).flatten(1)
        self.places = torch.arange(pairs.keys, dtype=torch.int32, device=q.device)
        self.words = self.places[None] if pairs.extents is None else self.by_stream(pairs.places() & 0xFFFF)
        self.real = None if pairs.real is None else self.by_stream(pairs.real)

    @property
    def work(self) -> int:
        """Total number of pairs."""
        return self.batch * self.heads * self.queries * self.pairs.keys

    def by_stream(self, x: Tensor) -> Tensor:
        """[batch, ...] repeated to [streams, ...], the same for all heads."""
        return x.repeat_interleave(self.heads, dim=0)


def _packed(x: Tensor) -> Tensor:
    """A contiguous version, whose strides do not depend on the tensor it was sliced from: strides cause recompiles."""
    return x.reshape(-1).view(x.shape)


class _Block:
    """One block of queries."""

    def __init__(self, call: _Call, start: int) -> None:
        pairs = call.pairs
        stop = min(start + BLOCK, pairs.queries)
        self.call = call
        self.rows, self.columns = slice(start, stop), slice(*pairs.key_range(start, stop))
        at = slice(start + pairs.offset, stop + pairs.offset)
        self.allowed = Allowed(
            call.places[at],
            call.places[self.columns],
            pairs.causal,
            pairs.window,
            None if call.real is None else _packed(call.real[:, at]),
            None if call.real is None else _packed(call.real[:, self.columns]),
            None if pairs.mask is None else call.by_stream(pairs.mask[:, 0, self.rows, self.columns]),
        )
        self.noise = None
        if call.noise_keys is not None:
            words = call.words
            self.noise = Noise(call.noise_keys, _packed(words[:, at] << 16), _packed(words[:, self.columns]))
        self.logits = self.pairwise(self.grouped(call.q).to(call.dtype), call.key, call.scale)

    def grouped(self, x: Tensor) -> Tensor:
        """The block's rows of [batch, heads, queries, n] as [batch, kv_heads, group * rows, n]."""
        x = x[:, :, self.rows]
        return x.reshape(self.call.batch, self.call.kv_heads, -1, x.shape[-1])

    def by_group(self, x: Tensor) -> Tensor:
        """[streams, rows, n] as [batch, kv_heads, group * rows, n]."""
        return x.view(self.call.batch, self.call.kv_heads, -1, x.shape[-1])

    def by_head(self, x: Tensor) -> Tensor:
        """[..., n], all rows of the block, as [batch, heads, rows, n]."""
        return x.view(self.call.batch, self.call.heads, -1, x.shape[-1])

    def pairwise(self, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        """``factor`` times the products of rows x with the block's keys or values in y, [streams, rows, columns]."""
        x, y = x.flatten(0, 1), y[:, :, self.columns].flatten(0, 1)
        products = torch.baddbmm(x.new_empty(()), x, y.mT, beta=0, alpha=factor)
        return products.view(self.call.batch * self.call.heads, -1, products.shape[-1])

    def forward(self, expect: bool) -> ForwardElements:
        """The forward pass of the block's pairs."""
        call = self.call
        result: ForwardElements = run_elements(
            forward_elements, call.work, self.logits, call.bias, self.allowed, call.softcap, self.noise, expect,
        )  # fmt: skip
        return result

    def backward(self, products: Tensor, terms: QueryTerms) -> BackwardElements:
        """The backward pass of the block's pairs."""
        call = self.call
        result: BackwardElements = run_elements(
            backward_elements, call.work, self.logits, products, terms, call.bias, self.allowed, call.softcap,
            self.noise,
        )  # fmt: skip
        return result


def forward(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    v: Float[Tensor, "batch kv_heads keys d_value"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Output, expected and hard open links, and log-sum-exp, the last three by query; not differentiable."""
    scale, softcap, noise, expect, count = options
    call = _Call(q, k, gate_bias, pairs, scale, softcap, noise)
    value = v.to(call.dtype).contiguous()
    output = empty_rows(q, v.shape[-1])
    log_sum_exp = q.new_empty(call.batch * call.heads, call.queries, dtype=call.dtype)
    expected = torch.empty_like(log_sum_exp) if expect else None
    opened = torch.empty_like(log_sum_exp, dtype=torch.long) if count else None
    for start in range(0, call.queries, BLOCK):
        block = _Block(call, start)
        elements = block.forward(expect)
        total = torch.where(elements.total == 0, 1.0, elements.total)
        sums = block.by_group(elements.weights) @ value[:, :, block.columns]
        output[:, :, block.rows] = block.by_head(sums) / block.by_head(total[..., None])
        log_sum_exp[:, block.rows] = elements.top + elements.total.log()
        if opened is not None:
            opened[:, block.rows] = elements.opened
        if expected is not None and elements.expected is not None:
            expected[:, block.rows] = elements.expected
    shape = (call.batch, call.heads, call.queries)
    expected, opened = (None if x is None else x.view(shape) for x in (expected, opened))
    return output, expected, opened, log_sum_exp.view(shape)


def backward(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    v: Float[Tensor, "batch kv_heads keys d_value"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    options: AttentionOptions,
    given: BackwardInputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias."""
    output, log_sum_exp, d_output, d_expected = given
    scale = options.scale
    call = _Call(q, k, gate_bias, pairs, scale, options.softcap, options.noise)
    value = v.to(call.dtype).contiguous()
    normaliser = torch.where(log_sum_exp.isinf(), torch.inf, log_sum_exp).flatten(0, 1)
    price = torch.zeros_like(normaliser) if d_expected is None else d_expected.flatten(0, 1).to(call.dtype)
    dq, dk, dv = (empty_rows(x, x.shape[-1]) for x in (q, k, v))
    # Transposed, [batch * kv_heads, features, keys]: this product is a third faster than its transpose.
    d_key, d_value = (torch.zeros(x.mT.flatten(0, 1).shape, dtype=call.dtype, device=x.device) for x in (k, v))
    d_bias = torch.zeros_like(call.bias)
    for start in range(0, call.queries, BLOCK):
        block = _Block(call, start)
        d_out = block.grouped(d_output).to(call.dtype)
        delta = (d_out * block.grouped(output)).sum(-1).view(len(call.bias), -1)
        normalisers, prices = (_packed(x[:, block.rows]) for x in (normaliser, price))
        elements = block.backward(block.pairwise(d_out, value), QueryTerms(normalisers, delta, prices))
        d_bias += elements.d_bias.sum(-1)
        d_logits = block.by_group(elements.d_logits)
        own = block.grouped(q).to(call.dtype)
        columns = block.columns
        d_value[..., columns].baddbmm_(d_out.mT.flatten(0, 1), block.by_group(elements.weights).flatten(0, 1))
        d_key[..., columns].baddbmm_(own.mT.flatten(0, 1), d_logits.flatten(0, 1))
        dq[:, :, block.rows] = block.by_head(d_logits @ call.key[:, :, columns]).mul_(scale)
    dk.copy_(d_key.mul_(scale).mT.view(k.shape))
    dv.copy_(d_value.mT.view(v.shape))
    return dq, dk, dv, d_bias.view(call.batch, call.heads).sum(0).to(gate_bias.dtype)
