"""Gated attention over blocks of queries: memory linear in the length, the backward pass recomputes.

With g = sigma(G + n), A = 1[g > 1/2], dA = P * (dO v^T) and Delta_i = dO_i . O_i, the gradient of the
attention logits is (derivation: docs/derivations.md)

    dS = P * (A * (dO v^T) - Delta) + dG
    dG = P * (dO v^T) * g (1 - g) + dE * sigma(G) (1 - sigma(G))

where dE is the gradient of the expected open links. From p = sigma(G) and the uniform number u,
g = p u / (p u + (1 - p)(1 - u)) needs neither a logarithm nor a second exponential.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.ops.gates import GatedAttention, Pairs

BLOCK = 64
"""Queries worked on at once."""


def gated_attention_chunked(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch kv_heads keys d_head"],
    v: Float[Tensor, "batch kv_heads keys d_value"],
    gate_bias: Float[Tensor, " heads"],
    pairs: Pairs,
    *,
    scale: float,
    softcap: float | None,
    noise_keys: Int[Tensor, "2 batch heads"] | None,
) -> GatedAttention:
    """The same as :func:`gossamer.ops.naive.gated_attention_naive`, in blocks; accumulates in float32 at least."""
    with torch.autocast(q.device.type, enabled=False):
        output, expected, opened, allowed = _Chunked.apply(q, k, v, gate_bias, pairs, scale, softcap, noise_keys)
    return GatedAttention(output, expected, opened, allowed)


class _Block:
    """One block of queries: what forward and backward both compute of it."""

    def __init__(
        self, q: Tensor, k: Tensor, bias: Tensor, pairs: Pairs, scale: float, softcap: float | None, start: int
    ) -> None:
        batch, heads, _, _ = q.shape
        stop = min(start + BLOCK, pairs.queries)
        first, last = pairs.key_range(start, stop)
        self.rows, self.columns = slice(start, stop), slice(first, max(first, last))
        self.shape = (batch, heads, stop - start, max(first, last) - first)
        self.grouped = (batch, k.shape[1], heads // k.shape[1] * (stop - start), -1)
        self.q = q[:, :, self.rows].to(bias.dtype).reshape(self.grouped) * scale
        self.logits = (self.q @ k[:, :, self.columns].transpose(-1, -2)).view(self.shape)
        if softcap is not None:
            self.logits.div_(softcap).tanh_().mul_(softcap)
        self.closed = ~pairs.allowed(self.rows, self.columns)
        self.probability = torch.sigmoid(self.logits + bias[:, None, None]).masked_fill_(self.closed, 0.0)

    def soft_gates(self, pairs: Pairs, noise_keys: Tensor | None) -> Tensor:
        """g = sigma(G + n); without noise the probability itself."""
        if noise_keys is None:
            return self.probability
        u = pairs.uniforms(noise_keys, self.rows, self.columns).to(self.probability.dtype)
        opening = self.probability * u
        closing = torch.mul(1 - self.probability, u.neg_().add_(1), out=u)
        return torch.div(opening, closing.add_(opening), out=closing)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate_bias: Tensor,
        pairs: Pairs,
        scale: float,
        softcap: float | None,
        noise_keys: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exact = torch.promote_types(q.dtype, torch.float32)
        bias, key, value = (x.to(exact) for x in (gate_bias, k, v))
        batch, heads, queries, _ = q.shape
        output = q.new_empty(batch, heads, queries, v.shape[-1])
        normaliser = q.new_empty(batch, heads, queries, dtype=exact)
        expected = q.new_zeros(batch, heads, dtype=exact)
        opened = torch.zeros(batch, heads, dtype=torch.long, device=q.device)
        allowed = torch.zeros_like(opened)
        for start in range(0, queries, BLOCK):
            block = _Block(q, key, bias, pairs, scale, softcap, start)
            expected += block.probability.sum((-1, -2))
            opened += (block.probability > 0.5).sum((-1, -2))
            allowed += (~block.closed).sum((-1, -2))
            gates = block.soft_gates(pairs, noise_keys) > 0.5
            scores = block.logits.masked_fill_(block.closed, float("-inf"))
            if scores.shape[-1]:
                # A row without any allowed key has normaliser -inf; +inf makes its pattern zero.
                total = torch.logsumexp(scores, dim=-1)
                total = total.masked_fill_(total == float("-inf"), float("inf"))
            else:
                total = scores.new_full(scores.shape[:-1], float("inf"))
            weights = scores.sub_(total[..., None]).exp_().mul_(gates)
            part = weights.view(block.grouped) @ value[:, :, block.columns]
            output[:, :, block.rows] = part.view(batch, heads, -1, v.shape[-1]).to(q.dtype)
            normaliser[:, :, block.rows] = total
        ctx.save_for_backward(q, k, v, gate_bias, output, normaliser)
        ctx.settings = (pairs, scale, softcap, noise_keys)
        ctx.mark_non_differentiable(opened, allowed)
        return output, expected, opened, allowed

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_expected: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        q, k, v, gate_bias, output, normaliser = ctx.saved_tensors
        pairs, scale, softcap, noise_keys = ctx.settings
        exact = normaliser.dtype
        bias, key, value = (x.to(exact) for x in (gate_bias, k, v))
        batch, heads, queries, _ = q.shape
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(key), torch.zeros_like(value)
        d_bias = torch.zeros_like(bias)
        for start in range(0, queries, BLOCK):
            block = _Block(q, key, bias, pairs, scale, softcap, start)
            d_out = d_output[:, :, block.rows].to(exact)
            delta = (d_out * output[:, :, block.rows]).sum(-1, keepdim=True)
            d_out = d_out.reshape(block.grouped)
            soft = block.soft_gates(pairs, noise_keys)
            gates = soft > 0.5
            slope = 1 - block.logits.div(softcap).square_() if softcap is not None else None
            pattern = block.logits.sub_(normaliser[:, :, block.rows, None]).exp_().masked_fill_(block.closed, 0.0)
            weights = pattern * gates
            dv[:, :, block.columns] += weights.view(block.grouped).transpose(-1, -2) @ d_out
            d_weights = (d_out @ value[:, :, block.columns].transpose(-1, -2)).view(block.shape)
            d_logits = weights.mul_(d_weights).sub_(delta * pattern)
            d_gates = d_weights.mul_(pattern).mul_(soft * (1 - soft))
            open_slope = block.probability.mul_(1 - block.probability)
            d_gates.add_(open_slope.mul_(d_expected[:, :, None, None].to(exact)))
            d_bias += d_gates.sum((0, 2, 3))
            d_logits += d_gates
            if slope is not None:
                d_logits *= slope
            d_logits = d_logits.view(block.grouped)
            part = (d_logits @ key[:, :, block.columns]).mul_(scale)
            dq[:, :, block.rows] = part.view(batch, heads, -1, q.shape[-1]).to(q.dtype)
            dk[:, :, block.columns] += d_logits.transpose(-1, -2) @ block.q
        return dq, dk.to(k.dtype), dv.to(v.dtype), d_bias.to(gate_bias.dtype), None, None, None, None
