"""Shared parts of gated attention: counter-based noise, the allowed pairs, and the result types.

The noise of a pair is a pure function of ``(seed, batch, head, i, j)``. All arithmetic is on
unsigned 32-bit integers that wrap, and ``>>`` is a logical shift::

    mix(x)       : x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    absorb(h, w) : mix((h ^ w) + 0x9e3779b9)

    h  = absorb(absorb(absorb(absorb(0, seed mod 2^32), seed div 2^32), batch), head)
    k0 = absorb(h, 0)        k1 = absorb(h, 1)

    x  = (i << 16 | j) ^ k0
    x ^= x >> 16;  x = x * 0x7feb352d + k1;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    u  = ((x >> 9) + 1/2) / 2^23

Every step from ``i << 16 | j`` to ``x`` is a bijection of the 32-bit integers, so within one
(seed, batch, head) no value of ``x`` repeats over 2^32 pairs. ``u`` has 24 significant bits, is
exact in float32, and lies in [2^-24, 1 - 2^-24]. The multipliers are those of the `lowbias32` finaliser
(C. Wellons, "hash-prospector", public domain).

``batch`` is the row index in the whole batch of a training step, across its forward passes and processes, so a part of
the batch draws the same noise as its rows do in the whole. ``i`` and ``j`` count from the row's first real token, so
neither padding (left or right) nor truncating a sequence changes the noise of the remaining pairs.
"""

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_POSITIONS = 1 << 16
"""Number of positions that the noise can distinguish: ``i`` and ``j`` have 16 bits each."""

_WORD = 0xFFFFFFFF
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B
_GOLDEN = 0x9E3779B9


@dataclass(frozen=True)
class GatedAttentionOutput:
    """Result of :func:`gossamer.gated_attention`.

    Attributes:
        output: ``[batch, heads, queries, d_head]``, in the dtype of the queries.
        expected_open: ``[batch, heads, queries]``, float; the sum of sigma(G) over the allowed keys of each query.
            Differentiable. None if not requested.
        open_links: ``[batch, heads, queries]``, int64; number of allowed keys with G > 0, the hard gates of evaluation,
            even if the output used sampled gates. None if not requested.
        allowed_links: ``[batch, heads, queries]``, int64; number of keys that causality, padding and window allow.
        log_sum_exp: ``[batch, heads, queries]``, float32 or wider; log of the softmax denominator, closed gates
            included, so that P = exp(S - log_sum_exp). -inf for a query without allowed keys. Not differentiable.
    """

    output: Float[Tensor, "batch heads queries d_head"]
    expected_open: Float[Tensor, "batch heads queries"] | None
    open_links: Int[Tensor, "batch heads queries"] | None
    allowed_links: Int[Tensor, "batch heads queries"]
    log_sum_exp: Float[Tensor, "batch heads queries"]


@dataclass(frozen=True)
class OpenLinks:
    """Result of :func:`gossamer.open_links`: the open links in coordinate form, sorted by batch, head, query, key.

    Attributes:
        counts: ``[batch, heads]``, int64; number of open links of each head.
        pairs: ``[links]``, int32 with the bits of the unsigned word ``query << 16 | key``; indices into queries and
            keys.
        weights: ``[links]``, float32; the attention weight P of each link, not renormalised.
    """

    counts: Int[Tensor, "batch heads"]
    pairs: Int[Tensor, " links"]
    weights: Float[Tensor, " links"]

    @property
    def query(self) -> Int[Tensor, " links"]:
        """Index of each link's query, int64."""
        return (self.pairs >> 16 & 0xFFFF).long()

    @property
    def key(self) -> Int[Tensor, " links"]:
        """Index of each link's key, int64."""
        return (self.pairs & 0xFFFF).long()

    @property
    def head(self) -> Int[Tensor, " links"]:
        """``batch * heads + head`` of each link, int64."""
        counts = self.counts.flatten()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def of(self, batch: int, head: int) -> "OpenLinks":
        """The links of one head of one sequence; ``counts`` stays two-dimensional, [1, 1]."""
        stops = self.counts.flatten().cumsum(0)
        index = batch * self.counts.shape[1] + head
        stop = int(stops[index])
        own = slice(stop - int(self.counts[batch, head]), stop)
        return OpenLinks(self.counts[batch, head].view(1, 1), self.pairs[own], self.weights[own])


_Word = TypeVar("_Word", int, Tensor)


def _mix(x: _Word) -> _Word:
    x = x ^ (x >> 16)
    x = (x * _MULTIPLIER_1) & _WORD
    x = x ^ (x >> 15)
    x = (x * _MULTIPLIER_2) & _WORD
    return x ^ (x >> 16)


def _absorb(state: _Word, word: _Word) -> _Word:
    return _mix(((state ^ word) + _GOLDEN) & _WORD)


def fold_seed(seed: int, *words: int) -> int:
    """Derive a 64-bit seed from ``seed`` and counters (step, layer, ...); different counters give different seeds."""
    low, high = seed & _WORD, seed >> 32 & _WORD
    for word in words:
        low = _absorb(_absorb(low, high), word & _WORD)
        high = _absorb(_absorb(high, low), word & _WORD)
    return high << 32 | low


def noise_of(seed: int | Tensor, first_row: int | Tensor, device: torch.device) -> Int[Tensor, " 2"]:
    """The parameters of the noise as one tensor: the seed, its 64 bits as a signed number, and the first batch row."""
    return torch.cat([_word(x, device) for x in (seed, first_row)])


def _word(x: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(x, Tensor):
        return x.reshape(1).to(device, torch.int64)
    return torch.full((1,), (x + (1 << 63)) % (1 << 64) - (1 << 63), dtype=torch.int64, device=device)


def noise_keys(noise: Int[Tensor, " 2"], batch: int, heads: int) -> Int[Tensor, "2 batch heads"]:
    """The keys k0 and k1 of every (batch, head), as int32 with the bits of the unsigned words.

    torch has no arithmetic on unsigned 32-bit integers, so the words are computed in int64.

    Args:
        noise: the seed and the first row, from ``noise_of``.
        batch: number of rows, starting at the first row in ``noise``.
        heads: number of query heads.
    """
    device = noise.device
    seed, first_row = noise[0], noise[1]
    start = _absorb(_absorb(torch.zeros_like(seed), seed & _WORD), seed >> 32 & _WORD)
    rows = (torch.arange(batch, device=device) + first_row & _WORD)[:, None]
    streams = _absorb(_absorb(start, rows), torch.arange(heads, device=device)[None])
    return _absorb(streams, torch.arange(2, device=device)[:, None, None]).to(torch.int32)


def pair_uniforms(
    keys: Int[Tensor, "2 batch heads"],
    queries: Int[Tensor, "batch queries"],
    key_positions: Int[Tensor, "batch keys"],
) -> Float[Tensor, "batch heads queries keys"]:
    """The uniform numbers u of all given pairs, float32, by the formula in the module docstring.

    Args:
        keys: from :func:`noise_keys`.
        queries: position i of each query, counted from the row's first real token.
        key_positions: position j of each key, counted the same way. Pairs with a negative position are padding;
            the same formula defines their value, but it has no meaning.
    """
    words = (queries[:, :, None] << 16 | key_positions[:, None, :] & 0xFFFF).to(torch.int32)
    return uniforms_of_words(words[:, None], keys)


def uniforms_of_words(
    words: Int[Tensor, "... rows columns"], keys: Int[Tensor, "2 ..."]
) -> Float[Tensor, "... rows columns"]:
    """u of the pair words ``i << 16 | j``, int32 with the bits of the unsigned words."""
    k0, k1 = keys[..., None, None]
    x = words ^ k0
    x ^= (x >> 16) & 0xFFFF
    x *= _MULTIPLIER_1
    x += k1
    x ^= (x >> 15) & 0x1FFFF
    x *= _MULTIPLIER_2 - (1 << 32)  # the int32 with the same bits
    x ^= (x >> 16) & 0xFFFF
    x >>= 9
    x &= 0x7FFFFF
    return x.float().add_(0.5).mul_(2.0**-23)


@dataclass(frozen=True)
class Pairs:
    """The allowed (query, key) pairs, and the positions of queries and keys.

    Attributes:
        batch, queries, keys: sizes. The last query is aligned with the last key, so with a cache of earlier keys, query
            i is at key ``i + keys - queries``.
        causal: forbid keys after the query.
        window: allow only the last ``window`` keys, including the query's position.
        real: ``[batch, keys]``, True for tokens that are not padding, or None if all are real. Padding queries get no
            allowed pairs, so they are neither computed nor counted.
        mask: ``[batch, 1, queries, keys]``, True where allowed, a further restriction; or None.
        extents: ``[batch, 4]``, int32, by row: index of the first real token, from which the noise counts (negative
            if the keys begin after it); first and one past the last real key; 1 if all between them are real.
            None if every row's first token is its first key, and all are real.
        device: of the queries.
    """

    batch: int
    queries: int
    keys: int
    causal: bool
    window: int | None
    real: Bool[Tensor, "batch keys"] | None
    mask: Bool[Tensor, "batch 1 queries keys"] | None
    extents: Int[Tensor, "batch 4"] | None
    device: torch.device
    _counts: list[Int[Tensor, "batch_or_1 queries"]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @property
    def offset(self) -> int:
        """Index of the key at the position of the first query."""
        return self.keys - self.queries

    def places(self) -> Int[Tensor, "batch_or_1 keys"]:
        """Position of each key, counted from its row's first real token, int32."""
        places = torch.arange(self.keys, dtype=torch.int32, device=self.device)[None]
        return places if self.extents is None else places - self.extents[:, :1]

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """Range of keys that causality and window allow queries ``start`` to ``stop``; ignores padding and mask."""
        first, last = 0, self.keys
        if self.causal:
            last = min(last, stop + self.offset)
        if self.window is not None:
            first = max(0, start + self.offset - self.window + 1)
        return first, max(first, last)

    def allowed(self, rows: slice, columns: slice) -> Bool[Tensor, "batch_or_1 1 rows columns"]:
        """The allowed pairs among the queries ``rows`` and the keys ``columns``."""
        i = torch.arange(rows.start, rows.stop, device=self.device)[:, None] + self.offset
        j = torch.arange(columns.start, columns.stop, device=self.device)[None, :]
        allowed = j <= i if self.causal else torch.ones(len(i), j.shape[1], dtype=torch.bool, device=self.device)
        if self.window is not None:
            allowed = allowed & (i - j < self.window)
        allowed = allowed[None, None]
        if self.real is not None:
            real_queries = self.real[:, rows.start + self.offset : rows.stop + self.offset]
            allowed = allowed & real_queries[:, None, :, None] & self.real[:, None, None, columns]
        return allowed if self.mask is None else allowed & self.mask[:, :, rows, columns]

    def _allowed_counts(self) -> Int[Tensor, "batch_or_1 queries"]:
        """Number of allowed keys per query; without a mask, in memory linear in the length."""
        if self.mask is not None:
            return self.allowed(slice(0, self.queries), slice(0, self.keys)).sum((-1, -3))
        i = torch.arange(self.offset, self.keys, device=self.device)
        stop = i + 1 if self.causal else torch.full_like(i, self.keys)
        start = torch.zeros_like(i) if self.window is None else (i + 1 - self.window).clamp(min=0)
        if self.real is None:
            return (stop - start)[None]
        before = torch.nn.functional.pad(self.real.cumsum(-1), (1, 0))
        return (before[:, stop] - before[:, start]) * self.real[:, i]

    def allowed_links(self, heads: int) -> Int[Tensor, "batch heads queries"]:
        """Number of keys that each query is allowed; computed once and cached."""
        if not self._counts:
            self._counts.append(self._allowed_counts())
        return self._counts[0][:, None].expand(self.batch, heads, -1)

    def uniforms(
        self, keys: Int[Tensor, "2 batch heads"], rows: slice, columns: slice
    ) -> Float[Tensor, "batch heads rows columns"]:
        """:func:`pair_uniforms` of the queries ``rows`` and the keys ``columns``."""
        places = self.places().long().expand(self.batch, -1)
        return pair_uniforms(keys, places[:, rows.start + self.offset : rows.stop + self.offset], places[:, columns])


def make_pairs(
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None,
    mask: Bool[Tensor, "batch keys"] | Bool[Tensor, "batch 1 queries keys"] | None,
    lengths: Int[Tensor, " batch"] | None,
    device: torch.device,
    first_real: Int[Tensor, " batch"] | None = None,
) -> Pairs:
    """Convert padding lengths, a padding mask or a full mask to the common form that implementations read."""
    real = None
    if lengths is not None:
        real = torch.arange(keys, device=device) < lengths[:, None]
    if mask is not None and mask.ndim == 2:
        real, mask = mask, None
    extents = _extents(batch, keys, real, mask, first_real)
    return Pairs(batch, queries, keys, causal, window, real, mask, extents, device)


def _extents(
    batch: int, keys: int, real: Tensor | None, mask: Tensor | None, first_real: Tensor | None
) -> Int[Tensor, "batch 4"] | None:
    if real is not None:
        start = real.int().argmax(-1)
        stop = keys - real.flip(-1).int().argmax(-1)
        origin, whole = start, real.sum(-1) == stop - start
    elif mask is not None:
        origin = mask[:, 0].any(-2).int().argmax(-1)
        start, whole = torch.zeros_like(origin), torch.zeros_like(origin)
        stop = start + keys
    elif first_real is not None:
        origin, start, whole = first_real, torch.zeros_like(first_real), torch.ones_like(first_real)
        stop = start + keys
    else:
        return None
    return torch.stack([origin if first_real is None else first_real, start, stop, whole], -1).int()


def empty_rows(
    like: Float[Tensor, "batch heads tokens _"], features: int
) -> Float[Tensor, "batch heads tokens features"]:
    """An uninitialised tensor, ``[batch, heads, tokens, features]``, in the memory layout of attention projections."""
    batch, heads, tokens, _ = like.shape
    return like.new_empty(batch, tokens, heads, features).transpose(1, 2)
