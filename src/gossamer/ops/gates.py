"""The gates of gated attention: counter-based noise, the pairs that are allowed, the result record.

The noise of a pair is a pure function of ``(seed, batch, head, i, j)``, all arithmetic in
unsigned 32-bit integers that wrap, ``>>`` logical::

    mix(x)       : x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    absorb(h, w) : mix((h ^ w) + 0x9e3779b9)

    h  = absorb(absorb(absorb(absorb(0, seed mod 2^32), seed div 2^32), batch), head)
    k0 = absorb(h, 0)        k1 = absorb(h, 1)

    x  = (i << 16 | j) ^ k0
    x ^= x >> 16;  x = x * 0x7feb352d + k1;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    u  = ((x >> 9) + 1/2) / 2^23

Every step from ``i << 16 | j`` to ``x`` is a bijection of the 32-bit integers, so within one
(seed, batch, head) no value of ``x`` comes twice in 2^32 pairs. ``u`` has 24 significant bits and is
exact in float32, and lies in [2^-24, 1 - 2^-24]. The multipliers are those of the `lowbias32` finaliser
(C. Wellons, "hash-prospector", public domain).

``i`` and ``j`` count from the row's first real token, so neither padding (left or right) nor
truncating a sequence changes the noise of the pairs that stay.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_POSITIONS = 1 << 16
"""Positions that the noise can tell apart: ``i`` and ``j`` have 16 bits each."""

_WORD = 0xFFFFFFFF
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B
_GOLDEN = 0x9E3779B9


@dataclass(frozen=True)
class GatedAttention:
    """What :func:`gossamer.gated_attention` returns.

    Attributes:
        output: ``[batch, heads, queries, d_head]``, in the dtype of the queries.
        expected_open: ``[batch, heads]``, float; the sum of sigma(G) over the allowed pairs. Differentiable.
        open_links: ``[batch, heads]``, int64; allowed pairs with G > 0, the gates of evaluation, even
            when the output was made with sampled ones.
        allowed_links: ``[batch, heads]``, int64; pairs that causality, padding and window allow.
    """

    output: Float[Tensor, "batch heads queries d_head"]
    expected_open: Float[Tensor, "batch heads"]
    open_links: Int[Tensor, "batch heads"]
    allowed_links: Int[Tensor, "batch heads"]


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
    """A 64-bit seed made of ``seed`` and counters (step, layer, ...); other counters, other seed."""
    low, high = seed & _WORD, seed >> 32 & _WORD
    for word in words:
        low = _absorb(_absorb(low, high), word & _WORD)
        high = _absorb(_absorb(high, low), word & _WORD)
    return high << 32 | low


def noise_keys(seed: int, batch: int, heads: int, device: torch.device) -> Int[Tensor, "2 batch heads"]:
    """The keys k0 and k1 of every (batch, head), as int32 with the bits of the unsigned words.

    torch has no arithmetic on unsigned 32-bit integers; words are kept in int64 here.
    """
    start = torch.tensor(_absorb(_absorb(0, seed & _WORD), seed >> 32 & _WORD))
    streams = _absorb(_absorb(start, torch.arange(batch)[:, None]), torch.arange(heads)[None])
    keys = torch.stack([_absorb(streams, torch.tensor(which)) for which in (0, 1)])
    return keys.to(torch.int32).to(device)


def pair_uniforms(
    keys: Int[Tensor, "2 batch heads"],
    queries: Int[Tensor, "batch queries"],
    key_positions: Int[Tensor, "batch keys"],
) -> Float[Tensor, "batch heads queries keys"]:
    """The uniform numbers u of all given pairs, float32, by the formula at the head of this file.

    Args:
        keys: from :func:`noise_keys`.
        queries: position i of each query, counted from the row's first real token.
        key_positions: position j of each key, counted likewise. Pairs with a negative position are padding;
            their value is defined by the same formula but means nothing.
    """
    pairs = (queries[:, :, None] << 16 | key_positions[:, None, :] & 0xFFFF).to(torch.int32)
    k0, k1 = keys[..., None, None]
    x = pairs[:, None] ^ k0
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
    """Which (query, key) pairs are allowed, and where queries and keys stand.

    Attributes:
        queries, keys: how many there are. The last query stands at the last key, so with a cache of earlier
            keys query i stands at key ``i + keys - queries``.
        causal: keys after the query are not allowed.
        window: only the last ``window`` keys, the query's own included, are allowed.
        mask: ``[batch, 1, queries, keys]``, further pairs that are not allowed, or None.
        first_real: ``[batch]``, index of each row's first real token.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None
    mask: Bool[Tensor, "batch 1 queries keys"] | None
    first_real: Int[Tensor, " batch"]

    @property
    def offset(self) -> int:
        """Index of the key at which the first query stands."""
        return self.keys - self.queries

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """The keys that queries ``start`` to ``stop`` can reach by causality and window, mask aside."""
        first, last = 0, self.keys
        if self.causal:
            last = min(last, stop + self.offset)
        if self.window is not None:
            first = max(0, start + self.offset - self.window + 1)
        return first, last

    def allowed(self, rows: slice, columns: slice) -> Bool[Tensor, "batch_or_1 1 rows columns"]:
        """The allowed pairs among the queries ``rows`` and the keys ``columns``."""
        device = self.first_real.device
        i = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.offset
        j = torch.arange(columns.start, columns.stop, device=device)[None, :]
        allowed = j <= i if self.causal else torch.ones(len(i), j.shape[1], dtype=torch.bool, device=device)
        if self.window is not None:
            allowed &= i - j < self.window
        allowed = allowed[None, None]
        return allowed if self.mask is None else allowed & self.mask[:, :, rows, columns]

    def uniforms(
        self, keys: Int[Tensor, "2 batch heads"], rows: slice, columns: slice
    ) -> Float[Tensor, "batch heads rows columns"]:
        """:func:`pair_uniforms` of the queries ``rows`` and the keys ``columns``."""
        device = self.first_real.device
        i = torch.arange(rows.start, rows.stop, device=device) + self.offset - self.first_real[:, None]
        j = torch.arange(columns.start, columns.stop, device=device) - self.first_real[:, None]
        return pair_uniforms(keys, i, j)


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
) -> Pairs:
    """Bring padding lengths, a padding mask or a full mask into the one form that implementations read.

    Padding queries get no allowed pairs, so that they are neither computed nor counted.
    """
    first_real = torch.zeros(batch, dtype=torch.long, device=device)
    if lengths is not None:
        mask = torch.arange(keys, device=device) < lengths[:, None]
    if mask is not None and mask.ndim == 2:
        first_real = mask.int().argmax(-1)
        mask = mask[:, None, keys - queries :, None] & mask[:, None, None, :]
    elif mask is not None:
        first_real = mask[:, 0].any(-2).int().argmax(-1)
    return Pairs(queries, keys, causal, window, mask, first_real)
