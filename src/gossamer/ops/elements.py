"""Elementwise part of gated attention on a block of queries, between the matrix products; compiled if possible.

There are two functions, one for each direction. Each reads the logits of a block once and returns the inputs of the
matrix products that follow. ``torch.compile`` turns each function into one C++ loop. Compilation takes some seconds on
the first call (less in later processes, because torch caches the code) and needs a C++ compiler. Small inputs, and
machines without a compiler, run the same functions op by op.

A stream is one head of one sequence. Streams, not batch and heads, are the first dimension of all tensors here, so
that each function compiles to a single loop nest.

From p = sigma(G) and the uniform number u, A = 1[u > 1 - p] and the soft gate is
g = sigma(G + n) = p u / (p u + (1 - p)(1 - u)), which needs neither a logarithm nor a second exponential.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.fx.experimental import _config as fx_config

from gossamer.ops.gates import uniforms_of_words

COMPILED_FROM = 1 << 20
"""Number of pairs in a call from which compilation pays off."""


class Allowed(NamedTuple):
    """The allowed pairs of a block; fields that are None do not restrict them.

    Attributes:
        queries, keys: ``[rows]`` and ``[columns]``, int32, their positions; read for causality and window.
        window: number of last keys that a query may read.
        causal: whether keys after the query are forbidden.
        real_queries, real_keys: ``[streams, rows]`` and ``[streams, columns]``, the tokens that are not padding.
        mask: ``[streams, rows, columns]``, True where allowed.
    """

    queries: Int[Tensor, " rows"]
    keys: Int[Tensor, " columns"]
    causal: bool
    window: int | None
    real_queries: Bool[Tensor, "streams rows"] | None
    real_keys: Bool[Tensor, "streams columns"] | None
    mask: Bool[Tensor, "streams rows columns"] | None

    def fill(self, logits: Tensor) -> Tensor:
        """The logits, with -inf for pairs that are not allowed."""
        closed = float("-inf")
        if self.causal:
            logits = logits.masked_fill(self.keys > self.queries[:, None], closed)
        if self.window is not None:
            logits = logits.masked_fill(self.queries[:, None] - self.keys >= self.window, closed)
        if self.real_queries is not None and self.real_keys is not None:
            logits = logits.masked_fill(~self.real_queries[:, :, None], closed)
            logits = logits.masked_fill(~self.real_keys[:, None, :], closed)
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask, closed)
        return logits


class Noise(NamedTuple):
    """The inputs of the noise of a block; see :mod:`gossamer.ops.gates`.

    Attributes:
        keys: ``[2, streams]``.
        query_words: ``[streams_or_1, rows]``, int32, ``i << 16``.
        key_words: ``[streams_or_1, columns]``, int32, ``j``.
    """

    keys: Int[Tensor, "2 streams"]
    query_words: Int[Tensor, "streams_or_1 rows"]
    key_words: Int[Tensor, "streams_or_1 columns"]

    def uniforms(self) -> Float[Tensor, "streams rows columns"]:
        """u of every pair."""
        return uniforms_of_words(self.query_words[:, :, None] | self.key_words[:, None, :], self.keys)


class ForwardElements(NamedTuple):
    """Result of :func:`forward_elements` for a block.

    Attributes:
        weights: exp(S - top) where the gate is open, else 0.
        top: largest allowed logit of each query; 0 if no key is allowed.
        total: sum of exp(S - top) over the allowed keys, closed gates included.
        opened: number of allowed keys with G > 0.
        expected: sum of sigma(G), or None.
    """

    weights: Float[Tensor, "streams rows columns"]
    top: Float[Tensor, "streams rows"]
    total: Float[Tensor, "streams rows"]
    opened: Int[Tensor, "streams rows"]
    expected: Float[Tensor, "streams rows"] | None


def _exp(x: Tensor) -> Tensor:
    """exp by ``exp2``: inductor writes results of ``exp`` and ``sigmoid`` to memory if they are used twice."""
    return torch.exp2(x * 1.4426950408889634)  # log2(e); a literal, because torch.compile takes a global for a variable


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap); the logits unchanged if there is no cap."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def forward_elements(
    logits: Tensor,
    bias: Tensor,
    allowed: Allowed,
    softcap: float | None,
    noise: Noise | None,
    expect: bool,
) -> ForwardElements:
    """Forward pass of one block; ``logits`` are q k^T times the scale, ``bias`` is ``[streams]`` and finite."""
    logits = allowed.fill(soft_capped(logits, softcap))
    top = logits.amax(-1)
    top = torch.where(top == float("-inf"), 0.0, top)
    weights = _exp(logits - top[..., None])
    total = weights.sum(-1)
    gate_logits = logits + bias[:, None, None]
    gates = gate_logits > 0
    opened = gates.sum(-1, dtype=torch.int32)
    expected = None
    if expect or noise is not None:
        probability = 1 / (1 + _exp(-gate_logits))
        if expect:
            expected = probability.sum(-1)
        if noise is not None:
            gates = noise.uniforms().to(logits.dtype) > 1 - probability
    return ForwardElements(torch.where(gates, weights, 0.0), top, total, opened, expected)


class BackwardElements(NamedTuple):
    """Result of :func:`backward_elements` for a block.

    Attributes:
        weights: A P.
        d_logits: gradient with respect to q k^T times the scale.
        d_bias: gradient with respect to the bias, by query.
    """

    weights: Float[Tensor, "streams rows columns"]
    d_logits: Float[Tensor, "streams rows columns"]
    d_bias: Float[Tensor, "streams rows"]


class QueryTerms(NamedTuple):
    """Per-query inputs of the backward pass (docs/derivations.md).

    Attributes:
        normaliser: log-sum-exp of the query's logits, inf if no key is allowed.
        delta: dO . O.
        d_expected: gradient of the loss with respect to the query's expected open links.
    """

    normaliser: Float[Tensor, "streams rows"]
    delta: Float[Tensor, "streams rows"]
    d_expected: Float[Tensor, "streams rows"]


def backward_elements(
    logits: Float[Tensor, "streams rows columns"],
    products: Float[Tensor, "streams rows columns"],
    terms: QueryTerms,
    bias: Float[Tensor, " streams"],
    allowed: Allowed,
    softcap: float | None,
    noise: Noise | None,
) -> BackwardElements:
    """Backward pass of one block; ``products`` are dO v^T."""
    normaliser, delta, d_expected = terms
    capped = soft_capped(logits, softcap)
    logits = allowed.fill(capped)
    pattern = _exp(logits - normaliser[..., None])
    gate_logits = logits + bias[:, None, None]
    probability = 1 / (1 + _exp(-gate_logits))
    weighted = pattern * products
    if noise is None:
        gates, soft = gate_logits > 0, probability
    else:
        u = noise.uniforms().to(logits.dtype)
        gates = u > 1 - probability
        opening = probability * u
        soft = opening / (opening + (1 - probability) * (1 - u))
    d_gates = weighted * (soft * (1 - soft)) + d_expected[..., None] * (probability * (1 - probability))
    d_logits = torch.where(gates, weighted, 0.0) - pattern * delta[..., None] + d_gates
    if softcap is not None:
        d_logits = d_logits * (1 - (capped / softcap) ** 2)
    return BackwardElements(torch.where(gates, pattern, 0.0), d_logits, d_gates.sum(-1))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Without these thresholds, inductor writes intermediate results of a block to memory and reads them back.
    options: dict[str, Any] = {"realize_opcount_threshold": 10_000, "realize_reads_threshold": 10_000}
    return torch.compile(function, dynamic=True, options=options)


_failed = False


def run_elements(function: Callable[..., Any], pairs: int, *arguments: Any) -> Any:
    """Call one of the functions above, compiled if the whole attention call has at least COMPILED_FROM ``pairs``."""
    global _failed
    if pairs < COMPILED_FROM or _failed or torch.compiler.is_compiling():
        return function(*arguments)
    try:
        # Each combination of mask, softcap and noise is compiled separately; two sizes that happen to be equal must
        # not cause a further variant.
        with torch._dynamo.config.patch(recompile_limit=64), fx_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return _compiled(function)(*arguments)
    except (torch._dynamo.exc.BackendCompilerFailed, OSError) as error:
        _failed = True
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logging.getLogger(__name__).warning("gated attention runs uncompiled and slower: %s", first_line)
        return function(*arguments)
