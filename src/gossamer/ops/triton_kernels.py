"""The kernels of :mod:`gossamer.ops.triton`, which launches them and describes the method.

Names: ``raw`` are logits before the factor that converts them to base 2 (the scale is in the factor or, with a soft
cap, already in ``raw``); ``odds`` is exp(-G), so sigma(G) = 1 / (1 + odds); ``words`` are the query and key parts of
the pair word of the noise. Tiles have shape [M, N], queries by keys, but [N, M] in :func:`key_value_gradients`.

A pair that is not allowed has raw = -inf, so its weight is 0, odds inf, gate 0 and gradient 0 without special cases.
"""

import math
import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
_LOG2_E = tl.constexpr(math.log2(math.e))
_ALMOST_ONE = tl.constexpr(1 - 2.0**-24)
_INFINITY = tl.constexpr(float("inf"))
_HIGHEST = tl.constexpr(96.0)
_LOWEST = tl.constexpr(-64.0)


@triton.jit
def _reciprocal(x):
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _exp2(x):
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _soft_capped(products, scale, softcap):
    """softcap * tanh(scale * products / softcap)."""
    return softcap * (1 - 2 * _reciprocal(1 + _exp2(products * (2 * _LOG2_E * scale / softcap))))


@triton.jit
def _noise(query_words, key_words, k1):
    """(1 + u - 2^-24) / 2, with u by the formula in gates.py; exact, in [1/2, 1)."""
    x = (query_words ^ key_words) * 0x7FEB352D + k1
    x ^= x >> 15
    x *= 0x846CA68B
    # The last two shifts of the formula in one step; the top 23 bits become the mantissa of a float.
    return ((x >> 9) ^ (x >> 25) | 0x3F000000).to(tl.float32, bitcast=True)


@triton.jit
def _closing(height):
    """c in sigma(G) = w / (w + c) with w = 2^(S - shift), by query; ``height`` = shift + bias, all in base 2."""
    return _exp2(-tl.maximum(height, _LOWEST))


@triton.jit
def _opens(noise, probability):
    """1[u > 1 - probability]. In units of 2^-24, rounding 1 - probability / 2 to nearest turns > into >=."""
    return noise >= 1 - 0.5 * probability


@triton.jit
def _absorb(state, word):
    x = (state ^ word) + 0x9E3779B9
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise_keys(NOISE, batch, head):
    """k0 and k1 of one head of one row, by the formula in gates.py; NOISE holds the seed and the first row."""
    seed, first_row = tl.load(NOISE), tl.load(NOISE + 1)
    state = tl.full([], 0, tl.uint32)
    state = _absorb(state, seed.to(tl.uint32))
    state = _absorb(state, (seed >> 32).to(tl.uint32))
    state = _absorb(state, (first_row + batch).to(tl.uint32))
    state = _absorb(state, head.to(tl.uint32))
    return _absorb(state, tl.full([], 0, tl.uint32)), _absorb(state, tl.full([], 1, tl.uint32))


@triton.jit
def _query_words(query_places, k0):
    """x ^ (x >> 16) of the formula for x = (i << 16) ^ k0; the key word is XORed in later, as its shift is 0."""
    return (query_places * 0x10001).to(tl.uint32, bitcast=True) ^ (k0 ^ (k0 >> 16))


@triton.jit
def _key_words(key_places):
    return (key_places & 0xFFFF).to(tl.uint32, bitcast=True)


@triton.jit
def _tile(POINTER, first, stride, lines, features, FAR: tl.constexpr):
    """Pointers to a tile; FAR if the offset of row ``first`` may exceed 32 bits."""
    if FAR:
        return POINTER + (tl.full([], 0, tl.int64) + first) * stride + lines[:, None] * stride + features[None, :]
    else:
        return POINTER + (first + lines)[:, None] * stride + features[None, :]


@triton.jit
def _load(
    POINTER, first, stride, lines, features, count,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, FAR: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Load a tile, with zeros for padding features and, if BOUNDED, for lines from ``count`` on."""
    pointers = _tile(POINTER, first, stride, lines, features, FAR)
    if BOUNDED:
        return tl.load(pointers, mask=(first + lines < count)[:, None] & (features < WIDTH)[None, :], other=0.0)
    elif WIDTH < PADDED:
        return tl.load(pointers, mask=(features < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _allowed(
    i, j, offset, keys, window, REAL, MASK, mask_row, mask_key, queries,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_REAL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The allowed pairs of queries i and keys j, broadcast against each other."""
    inside = (i < queries) & (j < keys)
    allowed = inside
    if CAUSAL:
        allowed &= j <= i + offset
    if WINDOW:
        allowed &= i + offset - j < window
    if HAS_REAL:
        allowed &= tl.load(REAL + i + offset, mask=i < queries, other=0) != 0
        allowed &= tl.load(REAL + j, mask=j < keys, other=0) != 0
    if HAS_MASK:
        allowed &= tl.load(MASK + i.to(tl.int64) * mask_row + j * mask_key, mask=inside, other=0) != 0
    return allowed


@triton.jit
def _extents(EXTENTS, batch, keys, HAS_EXTENTS: tl.constexpr):
    """For the batch row: origin of the noise, first and one past the last real key, whether all between are real."""
    origin, start, stop, whole = 0, 0, keys, 1
    if HAS_EXTENTS:
        EXTENTS += 4 * batch
        origin, start = tl.load(EXTENTS), tl.load(EXTENTS + 1)
        stop, whole = tl.load(EXTENTS + 2), tl.load(EXTENTS + 3)
    return origin, start, stop, whole


@triton.jit
def _key_range(
    first, last, offset, keys, window, real_start, real_stop, whole,
    N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_REAL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Key range of the queries first .. last - 1: (low, whole_low, whole_high, high).

    Tiles of N keys are visited from low to high; tiles from whole_low to whole_high need no mask.
    """
    low, high = real_start, real_stop
    whole_low, whole_high = real_start, real_stop
    if CAUSAL:
        high = tl.minimum(high, last + offset)
        whole_high = tl.minimum(whole_high, first + offset + 1)
    if WINDOW:
        low = tl.maximum(low, first + offset - window + 1)
        whole_low = tl.maximum(low, last + offset - window)
    low = low // N * N
    if HAS_MASK:
        return low, low, low, high
    else:
        if HAS_REAL:
            # Padding queries reach nothing.
            inside = (whole != 0) & (first + offset >= real_start) & (last + offset <= real_stop)
            whole_high = tl.where(inside, whole_high, low)
        whole_low = tl.maximum(tl.minimum((whole_low + N - 1) // N * N, high), low)
        return low, whole_low, tl.maximum(whole_high // N * N, whole_low), high


@triton.jit
def forward(
    Q, K, V, BIAS, NOISE, REAL, EXTENTS, MASK, OUT, LOG_SUM_EXP, EXPECTED, OPENED,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    mask_batch, mask_row, mask_key, heads, queries, keys, window, scale, softcap,
    GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FAR: tl.constexpr, HAS_EXTENTS: tl.constexpr, HAS_REAL: tl.constexpr, HAS_MASK: tl.constexpr, SAMPLE: tl.constexpr,
    EXPECT: tl.constexpr, COUNT: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output, log-sum-exp, and expected and hard open links per query, for M queries of one head."""
    # Start with the last blocks, which have the longest rows.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offset = keys - queries
    tile_rows = tl.arange(0, M)
    rows = first + tile_rows
    row_inside = rows < queries
    features, value_features = tl.arange(0, PD), tl.arange(0, PDV)
    Q += batch * q_batch + head.to(tl.int64) * q_head
    K += batch * k_batch + (head // GROUPS).to(tl.int64) * k_head
    if VALUES:
        V += batch * v_batch + (head // GROUPS).to(tl.int64) * v_head
    q = _load(Q, first, q_row, tile_rows, features, queries, D, PD, FAR, True)
    factor = _LOG2_E if SOFTCAP else scale * _LOG2_E
    bias = tl.load(BIAS + head)
    threshold = -bias if SOFTCAP else -bias / scale
    bias *= _LOG2_E
    origin, real_start, real_stop, whole = _extents(EXTENTS, batch, keys, HAS_EXTENTS)
    if HAS_REAL:
        REAL += batch * keys
    if HAS_MASK:
        MASK += batch * mask_batch
    if SAMPLE:
        k0, k1 = _noise_keys(NOISE, batch, head)
        query_words = _query_words(rows + offset - origin, k0)

    accumulated = tl.zeros([M, PDV], tl.float32)
    top = tl.full([M], -_INFINITY, tl.float32)
    total = tl.zeros([M], tl.float32)
    expected = tl.zeros([M], tl.float32)
    opened = tl.zeros([M], tl.float32)  # exact up to 2^24; adding floats takes one instruction fewer
    low, whole_low, whole_high, high = _key_range(
        first, tl.minimum(first + M, queries), offset, keys, window, real_start, real_stop, whole,
        N, CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
    )  # fmt: skip
    # Tiles without a mask come first. There sigma(G) is w / (w + c), provided that the weights w of open gates are in
    # the range of float32. That is known only after the last such tile; if not, all are redone with the masked tiles.
    if EXPECT or SAMPLE:
        whole_high = tl.where(bias > _HIGHEST, whole_low, whole_high)
    for phase in tl.static_range(0, 3 if WINDOW or HAS_REAL else 2):
        if phase == 0:
            begin, end = whole_low if WINDOW or HAS_REAL else low, whole_high
        elif phase == 1:
            if EXPECT or SAMPLE:
                fits = tl.max(top, 0) * factor + bias <= _HIGHEST
                whole_high = tl.where(fits, whole_high, whole_low)
                accumulated = tl.where(fits, accumulated, 0.0)
                top = tl.where(fits, top, -_INFINITY)
                total = tl.where(fits, total, 0.0)
                expected = tl.where(fits, expected, 0.0)
                opened = tl.where(fits, opened, 0.0)
            begin, end = whole_high, high
        else:
            begin, end = low, whole_low
        for start in tl.range(begin, end, N, num_stages=1 if phase != 0 and (WINDOW or HAS_REAL) else None):
            tile_columns = tl.arange(0, N)
            columns = start + tile_columns
            k = _load(K, start, k_row, tile_columns, features, keys, D, PD, FAR, phase != 0)
            raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if SOFTCAP:
                raw = _soft_capped(raw, scale, softcap)
            if phase != 0:
                allowed = _allowed(
                    rows[:, None], columns[None, :], offset, keys, window, REAL, MASK, mask_row, mask_key, queries,
                    CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
                )  # fmt: skip
                raw = tl.where(allowed, raw, -_INFINITY)
            higher = tl.maximum(top, tl.max(raw, 1))
            shift = higher * factor
            if phase != 0:
                shift = tl.where(higher == -_INFINITY, 0.0, shift)
            weights = _exp2(raw * factor - shift[:, None])
            rescale = _exp2(top * factor - shift)
            total = total * rescale + tl.sum(weights, 1)
            top = higher
            open_gates = raw > threshold
            if COUNT:
                opened += tl.sum(tl.where(open_gates, 1.0, 0.0), 1)
            if EXPECT or SAMPLE:
                if phase == 0:
                    probability = weights * _reciprocal(weights + _closing(shift + bias)[:, None])
                else:
                    probability = _reciprocal(1 + _exp2(-raw * factor - bias))
                if EXPECT:
                    expected += tl.sum(probability, 1)
                if SAMPLE:
                    noise = _noise(query_words[:, None], _key_words(columns - origin)[None, :], k1)
                    open_gates = _opens(noise, probability)
            if VALUES:
                v = _load(V, start, v_row, tile_columns, value_features, keys, DV, PDV, FAR, phase != 0)
                kept = tl.where(open_gates, weights, 0.0).to(v.dtype)
                accumulated = tl.dot(kept, v, accumulated * rescale[:, None], input_precision=PRECISION)

    closed = total == 0.0
    lines = (batch * heads + head) * queries + rows
    if VALUES:
        OUT += batch * o_batch + head.to(tl.int64) * o_head
        output = accumulated / tl.where(closed, 1.0, total)[:, None]
        tl.store(
            _tile(OUT, first, o_row, tile_rows, value_features, FAR),
            output.to(OUT.dtype.element_ty),
            mask=row_inside[:, None] & (value_features < DV)[None, :],
        )
    log_sum_exp = (top * factor + tl.log2(tl.where(closed, 1.0, total))) / _LOG2_E
    tl.store(LOG_SUM_EXP + lines, tl.where(closed, -_INFINITY, log_sum_exp), mask=row_inside)
    if COUNT:
        tl.store(OPENED + lines, opened.to(tl.int64), mask=row_inside)
    if EXPECT:
        tl.store(EXPECTED + lines, expected, mask=row_inside)


@triton.jit
def _normaliser(POINTERS, inside):
    """Base-2 logarithms of the softmax denominators; inf if no key is allowed, so that P is 0."""
    log_sum_exp = tl.load(POINTERS, mask=inside, other=-_INFINITY)
    return tl.where(log_sum_exp == -_INFINITY, _INFINITY, log_sum_exp * _LOG2_E)


@triton.jit
def _terms(
    d_out, output, LOG_SUM_EXP, D_EXPECTED, DELTA, NORMALISER, CLOSING, PRICE, HIGHEST, lines, inside, bias, block,
    PRICED: tl.constexpr,
):  # fmt: skip
    """Compute and store the per-query terms of the backward pass for a block.

    delta = dO . O; the base-2 normaliser; the closing term; dE and price = dE times closing. Also one value for the
    block: the largest log-sum-exp above the gate threshold among its queries that have allowed keys, in base 2.
    """
    delta = tl.sum(d_out.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(DELTA + lines, delta, mask=inside)
    normaliser = _normaliser(LOG_SUM_EXP + lines, inside)
    tl.store(NORMALISER + lines, normaliser, mask=inside)
    reached = normaliser < _INFINITY
    closing = _closing(tl.where(reached, normaliser + bias, 0.0))
    tl.store(CLOSING + lines, closing, mask=inside)
    d_expected = tl.zeros_like(closing)
    if PRICED:
        d_expected = tl.load(D_EXPECTED + lines, mask=inside, other=0.0)
        tl.store(PRICE + lines, d_expected * closing, mask=inside)
    highest = tl.max(tl.where(reached, normaliser, -_INFINITY), 0) + bias
    tl.store(HIGHEST + block, highest)
    return delta, normaliser, closing, d_expected, d_expected * closing, highest


@triton.jit
def query_terms(
    BIAS, OUT, D_OUT, LOG_SUM_EXP, D_EXPECTED, DELTA, NORMALISER, CLOSING, PRICE, HIGHEST,
    o_batch, o_head, o_row, do_batch, do_head, do_row, heads, queries,
    DV: tl.constexpr, PDV: tl.constexpr, M: tl.constexpr, FAR: tl.constexpr, PRICED: tl.constexpr,
):  # fmt: skip
    """The terms that :func:`query_gradients` stores for :func:`key_value_gradients`, for the fused backward pass."""
    first = tl.program_id(0) * M
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile_rows, features = tl.arange(0, M), tl.arange(0, PDV)
    OUT += batch * o_batch + head.to(tl.int64) * o_head
    D_OUT += batch * do_batch + head.to(tl.int64) * do_head
    line = batch * heads + head
    rows = first + tile_rows
    _terms(
        _load(D_OUT, first, do_row, tile_rows, features, queries, DV, PDV, FAR, True),
        _load(OUT, first, o_row, tile_rows, features, queries, DV, PDV, FAR, True),
        LOG_SUM_EXP, D_EXPECTED, DELTA, NORMALISER, CLOSING, PRICE, HIGHEST, line * queries + rows, rows < queries,
        tl.load(BIAS + head) * _LOG2_E, line * tl.num_programs(0) + tl.program_id(0), PRICED,
    )  # fmt: skip


@triton.jit
def _logit_gradients(
    raw, products, query_words, key_words, k1, normaliser, closing, delta, price, factor, threshold,
    SAMPLE: tl.constexpr, PRICED: tl.constexpr,
):  # fmt: skip
    """For one tile: the open gates, the weights P, and the gradients of the gate logits and of the logits.

    ``products`` are dO v^T; ``normaliser``, ``closing``, ``delta`` and ``price`` (dE times closing) are broadcast along
    the keys. With c for closing, sigma(G) = P / (P + c), and its derivative is P c / (P + c)^2.
    """
    pattern = _exp2(raw * factor - normaliser)
    if PRICED or not SAMPLE:
        scale = _reciprocal(pattern + closing)
    if SAMPLE:
        u = 2 * _noise(query_words, key_words, k1) - _ALMOST_ONE
        against = tl.fma(-u, closing, closing)
        towards = u * pattern
        open_gates = towards > against
        soft = towards * _reciprocal(against + towards)
    else:
        open_gates = raw > threshold
        soft = pattern * scale
    gate_gradients = products * (soft - soft * soft)
    if PRICED:
        gate_gradients += price * scale * scale
    d_logits = pattern * (tl.where(open_gates, products - delta, -delta) + gate_gradients)
    return open_gates, pattern, pattern * gate_gradients, d_logits


@triton.jit
def _exact_logit_gradients(
    raw, products, query_words, key_words, k1, normaliser, delta, factor, bias, threshold, d_expected,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """:func:`_logit_gradients` for cases where P of an open gate may underflow; needs one more exponential."""
    pattern = _exp2(raw * factor - normaliser)
    odds = _exp2(-raw * factor - bias)
    probability = _reciprocal(1 + odds)
    soft = probability
    open_gates = raw > threshold
    if SAMPLE:
        noise = _noise(query_words, key_words, k1)
        open_gates = _opens(noise, probability)
        u = 2 * noise - _ALMOST_ONE
        soft = u * _reciprocal(odds * (1 - u) + u)
    weighted = pattern * products
    d_gates = weighted * (soft - soft * soft) + d_expected * (probability - probability * probability)
    return open_gates, pattern, d_gates, tl.where(open_gates, weighted, 0.0) - pattern * delta + d_gates


@triton.jit
def _added(total, gradients, rows, RESCALE: tl.constexpr, PRECISION: tl.constexpr):
    """total + gradients @ rows. With RESCALE, each line of the gradients is scaled to about 1 first, for float16."""
    if RESCALE:
        largest = tl.max(tl.abs(gradients), 1)
        # A power of two, so that nothing is rounded; lines that are (almost) 0 are not scaled.
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.where((power > 1e-30) & (power < 1e30), power, 1.0)[:, None]
        return total + power * tl.dot((gradients / power).to(rows.dtype), rows, input_precision=PRECISION)
    else:
        return tl.dot(gradients.to(rows.dtype), rows, total, input_precision=PRECISION)


@triton.jit
def query_gradients(
    Q, K, V, BIAS, NOISE, REAL, EXTENTS, MASK, OUT, D_OUT, LOG_SUM_EXP, D_EXPECTED, DELTA, NORMALISER,
    CLOSING, PRICE, HIGHEST, D_Q, D_BIAS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    do_batch, do_head, do_row, dq_batch, dq_head, dq_row,
    mask_batch, mask_row, mask_key, heads, queries, keys, window, scale, softcap,
    GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FAR: tl.constexpr, HAS_EXTENTS: tl.constexpr, HAS_REAL: tl.constexpr, HAS_MASK: tl.constexpr, SAMPLE: tl.constexpr,
    PRICED: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of M queries of one head, their part of the bias gradient, and the per-query terms for the other kernel."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    first = block * M
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offset = keys - queries
    tile_rows = tl.arange(0, M)
    rows = first + tile_rows
    row_inside = rows < queries
    features, value_features = tl.arange(0, PD), tl.arange(0, PDV)
    inside = row_inside[:, None] & (features < D)[None, :]
    Q += batch * q_batch + head.to(tl.int64) * q_head
    K += batch * k_batch + (head // GROUPS).to(tl.int64) * k_head
    V += batch * v_batch + (head // GROUPS).to(tl.int64) * v_head
    OUT += batch * o_batch + head.to(tl.int64) * o_head
    D_OUT += batch * do_batch + head.to(tl.int64) * do_head
    q = _load(Q, first, q_row, tile_rows, features, queries, D, PD, FAR, True)
    d_out = _load(D_OUT, first, do_row, tile_rows, value_features, queries, DV, PDV, FAR, True)
    output = _load(OUT, first, o_row, tile_rows, value_features, queries, DV, PDV, FAR, True)
    lines = (batch * heads + head) * queries + rows
    factor = _LOG2_E if SOFTCAP else scale * _LOG2_E
    bias = tl.load(BIAS + head)
    threshold = -bias if SOFTCAP else -bias / scale
    bias *= _LOG2_E
    origin, real_start, real_stop, whole = _extents(EXTENTS, batch, keys, HAS_EXTENTS)
    if HAS_REAL:
        REAL += batch * keys
    if HAS_MASK:
        MASK += batch * mask_batch
    k1 = 0
    query_words = rows
    if SAMPLE:
        k0, k1 = _noise_keys(NOISE, batch, head)
        query_words = _query_words(rows + offset - origin, k0)

    delta, normaliser, closing, d_expected, price, highest = _terms(
        d_out, output, LOG_SUM_EXP, D_EXPECTED, DELTA, NORMALISER, CLOSING, PRICE, HIGHEST, lines, row_inside, bias,
        (batch * heads + head) * tl.num_programs(0) + block, PRICED,
    )  # fmt: skip
    d_q = tl.zeros([M, PD], tl.float32)
    d_bias = tl.zeros([M], tl.float32)
    low, whole_low, whole_high, high = _key_range(
        first, tl.minimum(first + M, queries), offset, keys, window, real_start, real_stop, whole,
        N, CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
    )  # fmt: skip
    whole_high = tl.where(highest > _HIGHEST, whole_low, whole_high)
    for phase in tl.static_range(0, 3 if WINDOW or HAS_REAL else 2):
        if phase == 0:
            begin, end = whole_low if WINDOW or HAS_REAL else low, whole_high
        elif phase == 1:
            begin, end = whole_high, high
        else:
            begin, end = low, whole_low
        for start in tl.range(begin, end, N, num_stages=1 if phase != 0 and (WINDOW or HAS_REAL) else None):
            tile_columns = tl.arange(0, N)
            columns = start + tile_columns
            k = _load(K, start, k_row, tile_columns, features, keys, D, PD, FAR, phase != 0)
            v = _load(V, start, v_row, tile_columns, value_features, keys, DV, PDV, FAR, phase != 0)
            raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            products = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            if SOFTCAP:
                raw = _soft_capped(raw, scale, softcap)
                cap_slope = 1 - (raw / softcap) * (raw / softcap)
            if phase != 0:
                allowed = _allowed(
                    rows[:, None], columns[None, :], offset, keys, window, REAL, MASK, mask_row, mask_key, queries,
                    CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
                )  # fmt: skip
                raw = tl.where(allowed, raw, -_INFINITY)
            key_words = _key_words(columns - origin)[None, :]
            if phase == 0:
                _, _, d_gates, d_logits = _logit_gradients(
                    raw, products, query_words[:, None], key_words, k1, normaliser[:, None], closing[:, None],
                    delta[:, None], price[:, None], factor, threshold, SAMPLE, PRICED,
                )  # fmt: skip
            else:
                _, _, d_gates, d_logits = _exact_logit_gradients(
                    raw, products, query_words[:, None], key_words, k1, normaliser[:, None], delta[:, None], factor,
                    bias, threshold, d_expected[:, None], SAMPLE,
                )  # fmt: skip
            d_bias += tl.sum(d_gates, 1)
            if SOFTCAP:
                d_logits *= cap_slope
            d_q = _added(d_q, d_logits, k, RESCALE, PRECISION)

    D_Q += batch * dq_batch + head.to(tl.int64) * dq_head
    tl.store(_tile(D_Q, first, dq_row, tile_rows, features, FAR), (d_q * scale).to(D_Q.dtype.element_ty), mask=inside)
    total = tl.sum(tl.where(row_inside, d_bias, 0.0), 0)
    tl.store(D_BIAS + (batch * heads + head) * tl.num_programs(0) + block, total)


@triton.jit
def key_value_gradients(
    Q, K, V, BIAS, NOISE, REAL, EXTENTS, MASK, D_OUT, D_EXPECTED, DELTA, NORMALISER, CLOSING, PRICE, HIGHEST, D_K, D_V,
    D_Q, D_BIAS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, dq_batch, dq_head, dq_row,
    mask_batch, mask_row, mask_key, heads, queries, keys, window, scale, softcap, blocks,
    GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FAR: tl.constexpr, HAS_EXTENTS: tl.constexpr, HAS_REAL: tl.constexpr, HAS_MASK: tl.constexpr, SAMPLE: tl.constexpr,
    PRICED: tl.constexpr, RESCALE: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys of one key/value head, summed over its query heads. Tiles are [N, M].

    FUSED atomically adds these keys' part of dq / scale to D_Q (float32, initially zero), in no fixed order, and stores
    their part of the bias gradient.
    """
    first = tl.program_id(0) * N
    last = tl.minimum(first + N, keys)
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offset = keys - queries
    tile_columns = tl.arange(0, N)
    columns = first + tile_columns
    features, value_features = tl.arange(0, PD), tl.arange(0, PDV)
    inside = (columns < keys)[:, None] & (features < D)[None, :]
    value_inside = (columns < keys)[:, None] & (value_features < DV)[None, :]
    K += batch * k_batch + kv_head.to(tl.int64) * k_head
    V += batch * v_batch + kv_head.to(tl.int64) * v_head
    k = _load(K, first, k_row, tile_columns, features, keys, D, PD, FAR, True)
    v = _load(V, first, v_row, tile_columns, value_features, keys, DV, PDV, FAR, True)
    factor = _LOG2_E if SOFTCAP else scale * _LOG2_E
    origin, real_start, real_stop, whole = _extents(EXTENTS, batch, keys, HAS_EXTENTS)
    if HAS_REAL:
        REAL += batch * keys
    if HAS_MASK:
        MASK += batch * mask_batch
    key_words = _key_words(columns - origin)

    # Queries that reach any of these keys and, within them, the whole tiles of queries that reach all of these keys.
    low, high = tl.maximum(real_start - offset, 0), real_stop - offset
    whole_low, whole_high = low, queries
    if CAUSAL:
        low = tl.maximum(low, first - offset)
        whole_low = tl.maximum(low, last - 1 - offset)
    if WINDOW:
        high = tl.minimum(high, last - 1 + window - offset)
        whole_high = tl.minimum(whole_high, first + window - offset)
    low = low // M * M
    high = tl.maximum(high, low)  # possibly no query reaches these keys; // rounds negative numbers towards zero
    if HAS_MASK:
        whole_low, whole_high = low, low
    else:
        if HAS_REAL:
            inside_real = (whole != 0) & (first >= real_start) & (last <= real_stop)
            whole_high = tl.where(inside_real, tl.minimum(whole_high, real_stop - offset), low)
        whole_low = tl.minimum((whole_low + M - 1) // M * M, high)
        whole_high = tl.maximum(whole_high // M * M, whole_low)

    d_k = tl.zeros([N, PD], tl.float32)
    d_v = tl.zeros([N, PDV], tl.float32)
    for member in range(GROUPS):
        head = kv_head * GROUPS + member
        queries_of_head = Q + batch * q_batch + head.to(tl.int64) * q_head
        d_out_of_head = D_OUT + batch * do_batch + head.to(tl.int64) * do_head
        line = (batch * heads + head) * queries
        bias = tl.load(BIAS + head)
        threshold = -bias if SOFTCAP else -bias / scale
        bias *= _LOG2_E
        k0 = tl.full([], 0, tl.uint32)
        k1 = tl.full([], 0, tl.uint32)
        if SAMPLE:
            k0, k1 = _noise_keys(NOISE, batch, head)
        highest = bias
        for start in range(0, blocks, 128):
            block = start + tl.arange(0, 128)
            heights = tl.load(HIGHEST + (batch * heads + head) * blocks + block, mask=block < blocks, other=-_INFINITY)
            highest = tl.maximum(highest, tl.max(heights, 0))
        whole_stop = tl.where(highest > _HIGHEST, whole_low, whole_high)
        d_bias = tl.zeros([N, M], tl.float32)
        d_q_of_head = D_Q
        if FUSED:
            d_q_of_head += batch * dq_batch + head.to(tl.int64) * dq_head
        for phase in tl.static_range(0, 3):
            if phase == 0:
                begin, end = whole_low, whole_stop
            elif phase == 1:
                begin, end = low, whole_low
            else:
                begin, end = whole_stop, high
            for start in range(begin, end, M):
                tile_rows = tl.arange(0, M)
                rows = start + tile_rows
                q = _load(queries_of_head, start, q_row, tile_rows, features, queries, D, PD, FAR, phase != 0)
                d_out = _load(
                    d_out_of_head, start, do_row, tile_rows, value_features, queries, DV, PDV, FAR, phase != 0
                )
                raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                products = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
                if SOFTCAP:
                    raw = _soft_capped(raw, scale, softcap)
                    cap_slope = 1 - (raw / softcap) * (raw / softcap)
                if phase != 0:
                    allowed = _allowed(
                        rows[None, :], columns[:, None], offset, keys, window, REAL, MASK, mask_row, mask_key, queries,
                        CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
                    )  # fmt: skip
                    raw = tl.where(allowed, raw, -_INFINITY)
                query_words = _query_words(rows + offset - origin, k0)[None, :]
                terms = line + rows
                if phase == 0:
                    price = tl.zeros([M], tl.float32)
                    if PRICED:
                        price = tl.load(PRICE + terms)
                    open_gates, pattern, d_gates, d_logits = _logit_gradients(
                        raw, products, query_words, key_words[:, None], k1, tl.load(NORMALISER + terms)[None, :],
                        tl.load(CLOSING + terms)[None, :], tl.load(DELTA + terms)[None, :], price[None, :], factor,
                        threshold, SAMPLE, PRICED,
                    )  # fmt: skip
                else:
                    row_inside = rows < queries
                    d_expected = tl.zeros([M], tl.float32)
                    if PRICED:
                        d_expected = tl.load(D_EXPECTED + terms, mask=row_inside, other=0.0)
                    open_gates, pattern, d_gates, d_logits = _exact_logit_gradients(
                        raw, products, query_words, key_words[:, None], k1,
                        tl.load(NORMALISER + terms, mask=row_inside, other=_INFINITY)[None, :],
                        tl.load(DELTA + terms, mask=row_inside, other=0.0)[None, :],
                        factor, bias, threshold, d_expected[None, :], SAMPLE,
                    )  # fmt: skip
                kept = tl.where(open_gates, pattern, 0.0)
                d_v = tl.dot(kept.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
                if SOFTCAP:
                    d_logits *= cap_slope
                d_k = _added(d_k, d_logits, q, RESCALE, PRECISION)
                if FUSED:
                    d_bias += d_gates
                    if not RESCALE:
                        d_logits = d_logits.to(k.dtype)
                    part = _added(tl.zeros([M, PD], tl.float32), tl.trans(d_logits), k, RESCALE, PRECISION)
                    target = _tile(d_q_of_head, start, dq_row, tile_rows, features, FAR)
                    if phase == 0 and D == PD:
                        tl.atomic_add(target, part, sem="relaxed")
                    else:
                        inside_tile = (rows < queries)[:, None] & (features < D)[None, :]
                        tl.atomic_add(target, part, mask=inside_tile, sem="relaxed")
        if FUSED:
            # Keys past the end were loaded as zeros; their gates must not count.
            total = tl.sum(tl.sum(tl.where((columns < keys)[:, None], d_bias, 0.0), 1), 0)
            tl.store(D_BIAS + (batch * heads + head) * tl.num_programs(0) + tl.program_id(0), total)

    D_K += batch * dk_batch + kv_head.to(tl.int64) * dk_head
    D_V += batch * dv_batch + kv_head.to(tl.int64) * dv_head
    tl.store(
        _tile(D_K, first, dk_row, tile_columns, features, FAR), (d_k * scale).to(D_K.dtype.element_ty), mask=inside
    )
    tl.store(
        _tile(D_V, first, dv_row, tile_columns, value_features, FAR), d_v.to(D_V.dtype.element_ty), mask=value_inside
    )


@triton.jit
def write_links(
    Q, K, BIAS, REAL, EXTENTS, MASK, LOG_SUM_EXP, STARTS, PAIRS, WEIGHTS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, mask_batch, mask_row, mask_key,
    heads, queries, keys, window, scale, softcap,
    GROUPS: tl.constexpr, D: tl.constexpr, PD: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FAR: tl.constexpr, HAS_EXTENTS: tl.constexpr, HAS_REAL: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the open links of M queries of one head, from each query's start offset, in the order of the keys."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offset = keys - queries
    tile_rows = tl.arange(0, M)
    rows = first + tile_rows
    row_inside = rows < queries
    features = tl.arange(0, PD)
    Q += batch * q_batch + head.to(tl.int64) * q_head
    K += batch * k_batch + (head // GROUPS).to(tl.int64) * k_head
    q = _load(Q, first, q_row, tile_rows, features, queries, D, PD, FAR, True)
    factor = _LOG2_E if SOFTCAP else scale * _LOG2_E
    bias = tl.load(BIAS + head)
    threshold = -bias if SOFTCAP else -bias / scale
    _, real_start, real_stop, whole = _extents(EXTENTS, batch, keys, HAS_EXTENTS)
    if HAS_REAL:
        REAL += batch * keys
    if HAS_MASK:
        MASK += batch * mask_batch
    lines = (batch * heads + head) * queries + rows
    normaliser = _normaliser(LOG_SUM_EXP + lines, row_inside)
    place = tl.load(STARTS + lines, mask=row_inside, other=0)
    low, _, _, high = _key_range(
        first, tl.minimum(first + M, queries), offset, keys, window, real_start, real_stop, whole,
        N, CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
    )  # fmt: skip
    for start in range(low, high, N):
        tile_columns = tl.arange(0, N)
        columns = start + tile_columns
        k = _load(K, start, k_row, tile_columns, features, keys, D, PD, FAR, True)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            raw = _soft_capped(raw, scale, softcap)
        allowed = _allowed(
            rows[:, None], columns[None, :], offset, keys, window, REAL, MASK, mask_row, mask_key, queries,
            CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
        )  # fmt: skip
        open_gates = allowed & (raw > threshold)
        counted = open_gates.to(tl.int32)
        target = place[:, None] + tl.cumsum(counted, 1) - counted
        tl.store(PAIRS + target, (rows << 16)[:, None] | columns[None, :], mask=open_gates)
        tl.store(WEIGHTS + target, _exp2(raw * factor - normaliser[:, None]), mask=open_gates)
        place += tl.sum(counted, 1)
