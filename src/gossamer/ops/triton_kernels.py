"""The kernels behind :mod:`gossamer.ops.triton`, which holds their launches and the method as a whole.

Names: ``raw`` are logits before the factor that takes them to base 2 (the scale is in the factor, or, where there is
a soft cap, already in ``raw``); ``odds`` is exp(-G), so sigma(G) = 1 / (1 + odds); ``words`` are the parts of the
noise's pair word. Shapes of tiles: [M, N] is queries by keys, [N, M] in :func:`key_value_gradients`.

A pair that is not allowed gets raw = -inf, hence weight 0, odds inf, gate 0 and gradient 0 without further ado.
"""

import math
import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
_LOG2_E = tl.constexpr(math.log2(math.e))
_ALMOST_ONE = tl.constexpr(1 - 2.0**-24)
_INFINITY = tl.constexpr(float("inf"))


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
    """(1 + u - 2^-24) / 2 with u by the formula of gates.py: exact, in [1/2, 1). Query words are (i << 16) ^ k0."""
    x = query_words ^ key_words
    x ^= x >> 16
    x = x * 0x7FEB352D + k1
    x ^= x >> 15
    x *= 0x846CA68B
    # The formula's last two shifts at once; the top 23 bits become a float's mantissa.
    return ((x >> 9) ^ (x >> 25) | 0x3F000000).to(tl.float32, bitcast=True)


@triton.jit
def _opens(noise, probability):
    """1[u > 1 - probability]. In units of 2^-24, rounding 1 - probability / 2 to nearest makes > of it >=."""
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
    """k0 and k1 of one head of one row, by the formula of gates.py; NOISE holds the seed and the first row."""
    seed, first_row = tl.load(NOISE), tl.load(NOISE + 1)
    state = tl.full([], 0, tl.uint32)
    state = _absorb(state, seed.to(tl.uint32))
    state = _absorb(state, (seed >> 32).to(tl.uint32))
    state = _absorb(state, (first_row + batch).to(tl.uint32))
    state = _absorb(state, head.to(tl.uint32))
    return _absorb(state, tl.full([], 0, tl.uint32)), _absorb(state, tl.full([], 1, tl.uint32))


@triton.jit
def _query_words(query_places, k0):
    return (query_places << 16).to(tl.uint32, bitcast=True) ^ k0


@triton.jit
def _key_words(key_places):
    return (key_places & 0xFFFF).to(tl.uint32, bitcast=True)


@triton.jit
def _tile(POINTER, first, stride, lines, features, FAR: tl.constexpr):
    """Pointers to a tile; FAR where the row ``first`` may lie beyond what 32 bits count."""
    if FAR:
        return POINTER + (tl.full([], 0, tl.int64) + first) * stride + lines[:, None] * stride + features[None, :]
    else:
        return POINTER + (first + lines)[:, None] * stride + features[None, :]


@triton.jit
def _allowed(
    i, j, offset, keys, window, REAL, MASK, mask_row, mask_key, queries,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_REAL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Which pairs of queries i and keys j, broadcast against each other, are allowed."""
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
    """Of the row: where the noise counts from, first and one past the last real key, whether all between are real."""
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
    """Keys that the queries first .. last - 1 can reach: (low, whole_low, whole_high, high).

    Tiles of N keys are visited from low to high; those from whole_low to whole_high need no mask.
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
    EXPECT: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output, base-2 normaliser, and per query the expected and the hard open links, of M queries of one head."""
    # The longest rows first: they are the last blocks.
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
    inside = row_inside[:, None] & (features < D)[None, :]
    q = tl.load(_tile(Q, first, q_row, tile_rows, features, FAR), mask=inside, other=0.0)
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
    opened = tl.zeros([M], tl.float32)  # exact up to 2^24; adding floats takes an instruction less
    low, whole_low, whole_high, high = _key_range(
        first, tl.minimum(first + M, queries), offset, keys, window, real_start, real_stop, whole,
        N, CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
    )  # fmt: skip
    for phase in tl.static_range(0 if WINDOW or HAS_REAL else 1, 3):
        if phase == 0:
            begin, end = low, whole_low
        elif phase == 1:
            begin, end = whole_low if WINDOW or HAS_REAL else low, whole_high
        else:
            begin, end = whole_high, high
        for start in range(begin, end, N):
            tile_columns = tl.arange(0, N)
            columns = start + tile_columns
            key_mask = (features < D)[None, :]
            value_mask = (value_features < DV)[None, :]
            if phase != 1:
                key_mask &= (columns < keys)[:, None]
                value_mask &= (columns < keys)[:, None]
            k = tl.load(_tile(K, start, k_row, tile_columns, features, FAR), mask=key_mask, other=0.0)
            raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if SOFTCAP:
                raw = _soft_capped(raw, scale, softcap)
            if phase != 1:
                allowed = _allowed(
                    rows[:, None], columns[None, :], offset, keys, window, REAL, MASK, mask_row, mask_key, queries,
                    CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
                )  # fmt: skip
                raw = tl.where(allowed, raw, -_INFINITY)
            higher = tl.maximum(top, tl.max(raw, 1))
            shift = higher * factor
            if phase != 1:
                shift = tl.where(higher == -_INFINITY, 0.0, shift)
            weights = _exp2(raw * factor - shift[:, None])
            rescale = _exp2(top * factor - shift)
            total = total * rescale + tl.sum(weights, 1)
            top = higher
            open_gates = raw > threshold
            opened += tl.sum(tl.where(open_gates, 1.0, 0.0), 1)
            if EXPECT or SAMPLE:
                probability = _reciprocal(1 + _exp2(-raw * factor - bias))
                if EXPECT:
                    expected += tl.sum(probability, 1)
                if SAMPLE:
                    noise = _noise(query_words[:, None], _key_words(columns - origin)[None, :], k1)
                    open_gates = _opens(noise, probability)
            if VALUES:
                v = tl.load(_tile(V, start, v_row, tile_columns, value_features, FAR), mask=value_mask, other=0.0)
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
    tl.store(OPENED + lines, opened.to(tl.int64), mask=row_inside)
    if EXPECT:
        tl.store(EXPECTED + lines, expected, mask=row_inside)


@triton.jit
def _normaliser(POINTERS, inside):
    """Base-2 logarithms of the softmax's denominators; infinite where nothing is allowed, so that P is 0."""
    log_sum_exp = tl.load(POINTERS, mask=inside, other=-_INFINITY)
    return tl.where(log_sum_exp == -_INFINITY, _INFINITY, log_sum_exp * _LOG2_E)


@triton.jit
def _logit_gradients(
    raw, products, query_words, key_words, k1, normaliser, delta, factor, bias, threshold, d_expected,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """Of one tile: the weights left by the gates, the gradients of the gate logits and of the logits.

    ``products`` are dO v^T; ``normaliser``, ``delta`` and ``d_expected`` broadcast along the keys.
    """
    pattern = _exp2(raw * factor - normaliser)
    odds = _exp2(-raw * factor - bias)
    probability = _reciprocal(1 + odds)
    slope = probability - probability * probability
    weighted = pattern * products
    if SAMPLE:
        noise = _noise(query_words, key_words, k1)
        open_gates = _opens(noise, probability)
        u = 2 * noise - _ALMOST_ONE
        soft = u * _reciprocal(odds * (1 - u) + u)
        d_gates = weighted * (soft - soft * soft) + d_expected * slope
    else:
        open_gates = raw > threshold
        d_gates = (weighted + d_expected) * slope
    kept = tl.where(open_gates, pattern, 0.0)
    return kept, d_gates, tl.where(open_gates, weighted, 0.0) - pattern * delta + d_gates


@triton.jit
def _added(total, gradients, rows, RESCALE: tl.constexpr, PRECISION: tl.constexpr):
    """total + gradients @ rows. Each line of the gradients is brought near 1 first where float16 would lose it."""
    if RESCALE:
        largest = tl.max(tl.abs(gradients), 1)
        # A power of two, so that nothing is rounded; 0 and what lies near it stay as they are.
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.where((power > 1e-30) & (power < 1e30), power, 1.0)[:, None]
        return total + power * tl.dot((gradients / power).to(rows.dtype), rows, input_precision=PRECISION)
    else:
        return tl.dot(gradients.to(rows.dtype), rows, total, input_precision=PRECISION)


@triton.jit
def query_gradients(
    Q, K, V, BIAS, NOISE, REAL, EXTENTS, MASK, OUT, D_OUT, LOG_SUM_EXP, D_EXPECTED, DELTA, D_Q, D_BIAS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    do_batch, do_head, do_row, dq_batch, dq_head, dq_row,
    mask_batch, mask_row, mask_key, heads, queries, keys, window, scale, softcap,
    GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FAR: tl.constexpr, HAS_EXTENTS: tl.constexpr, HAS_REAL: tl.constexpr, HAS_MASK: tl.constexpr, SAMPLE: tl.constexpr,
    PRICED: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of M queries of one head, their part of the bias gradient, and Delta = dO . O for the other kernel."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    first = block * M
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offset = keys - queries
    tile_rows = tl.arange(0, M)
    rows = first + tile_rows
    row_inside = rows < queries
    features, value_features = tl.arange(0, PD), tl.arange(0, PDV)
    inside = row_inside[:, None] & (features < D)[None, :]
    value_inside = row_inside[:, None] & (value_features < DV)[None, :]
    Q += batch * q_batch + head.to(tl.int64) * q_head
    K += batch * k_batch + (head // GROUPS).to(tl.int64) * k_head
    V += batch * v_batch + (head // GROUPS).to(tl.int64) * v_head
    OUT += batch * o_batch + head.to(tl.int64) * o_head
    D_OUT += batch * do_batch + head.to(tl.int64) * do_head
    q = tl.load(_tile(Q, first, q_row, tile_rows, features, FAR), mask=inside, other=0.0)
    d_out = tl.load(_tile(D_OUT, first, do_row, tile_rows, value_features, FAR), mask=value_inside, other=0.0)
    output = tl.load(_tile(OUT, first, o_row, tile_rows, value_features, FAR), mask=value_inside, other=0.0)
    lines = (batch * heads + head) * queries + rows
    delta = tl.sum(d_out.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(DELTA + lines, delta, mask=row_inside)
    normaliser = _normaliser(LOG_SUM_EXP + lines, row_inside)
    d_expected = tl.zeros([M], tl.float32)
    if PRICED:
        d_expected = tl.load(D_EXPECTED + lines, mask=row_inside, other=0.0)
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

    d_q = tl.zeros([M, PD], tl.float32)
    d_bias = tl.zeros([M], tl.float32)
    low, whole_low, whole_high, high = _key_range(
        first, tl.minimum(first + M, queries), offset, keys, window, real_start, real_stop, whole,
        N, CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
    )  # fmt: skip
    for phase in tl.static_range(0 if WINDOW or HAS_REAL else 1, 3):
        if phase == 0:
            begin, end = low, whole_low
        elif phase == 1:
            begin, end = whole_low if WINDOW or HAS_REAL else low, whole_high
        else:
            begin, end = whole_high, high
        for start in range(begin, end, N):
            tile_columns = tl.arange(0, N)
            columns = start + tile_columns
            key_mask = (features < D)[None, :]
            value_mask = (value_features < DV)[None, :]
            if phase != 1:
                key_mask &= (columns < keys)[:, None]
                value_mask &= (columns < keys)[:, None]
            k = tl.load(_tile(K, start, k_row, tile_columns, features, FAR), mask=key_mask, other=0.0)
            v = tl.load(_tile(V, start, v_row, tile_columns, value_features, FAR), mask=value_mask, other=0.0)
            raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            products = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            if SOFTCAP:
                raw = _soft_capped(raw, scale, softcap)
                cap_slope = 1 - (raw / softcap) * (raw / softcap)
            if phase != 1:
                allowed = _allowed(
                    rows[:, None], columns[None, :], offset, keys, window, REAL, MASK, mask_row, mask_key, queries,
                    CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
                )  # fmt: skip
                raw = tl.where(allowed, raw, -_INFINITY)
            _, d_gates, d_logits = _logit_gradients(
                raw, products, query_words[:, None], _key_words(columns - origin)[None, :], k1,
                normaliser[:, None], delta[:, None], factor, bias, threshold, d_expected[:, None], SAMPLE,
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
    Q, K, V, BIAS, NOISE, REAL, EXTENTS, MASK, D_OUT, LOG_SUM_EXP, D_EXPECTED, DELTA, D_K, D_V,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    mask_batch, mask_row, mask_key, heads, queries, keys, window, scale, softcap,
    GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FAR: tl.constexpr, HAS_EXTENTS: tl.constexpr, HAS_REAL: tl.constexpr, HAS_MASK: tl.constexpr, SAMPLE: tl.constexpr,
    PRICED: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys of one key/value head, summed over its query heads. Tiles are [N, M]."""
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
    k = tl.load(_tile(K, first, k_row, tile_columns, features, FAR), mask=inside, other=0.0)
    v = tl.load(_tile(V, first, v_row, tile_columns, value_features, FAR), mask=value_inside, other=0.0)
    factor = _LOG2_E if SOFTCAP else scale * _LOG2_E
    origin, real_start, real_stop, whole = _extents(EXTENTS, batch, keys, HAS_EXTENTS)
    if HAS_REAL:
        REAL += batch * keys
    if HAS_MASK:
        MASK += batch * mask_batch
    key_words = _key_words(columns - origin)

    # Queries that reach these keys, and among them those that reach all of them. Rows past the end need no mask:
    # their q and dO are zero and their normaliser is infinite.
    low, high = tl.maximum(real_start - offset, 0), real_stop - offset
    whole_low, whole_high = low, queries
    if CAUSAL:
        low = tl.maximum(low, first - offset)
        whole_low = tl.maximum(low, last - 1 - offset)
    if WINDOW:
        high = tl.minimum(high, last - 1 + window - offset)
        whole_high = tl.minimum(whole_high, first + window - offset) // M * M
    low = low // M * M
    high = tl.maximum(high, low)  # no query may reach these keys; // rounds towards zero below it
    if HAS_MASK:
        whole_low, whole_high = low, low
    else:
        if HAS_REAL:
            inside_real = (whole != 0) & (first >= real_start) & (last <= real_stop)
            whole_high = tl.where(inside_real, tl.minimum(whole_high, real_stop - offset) // M * M, low)
        whole_low = tl.minimum((whole_low + M - 1) // M * M, high)
        whole_high = tl.maximum(whole_high, whole_low)

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
        for phase in tl.static_range(0, 3 if WINDOW or HAS_REAL or HAS_MASK else 2):
            if phase == 0:
                begin, end = low, whole_low
            elif phase == 1:
                begin, end = whole_low, whole_high
            else:
                begin, end = whole_high, high
            for start in range(begin, end, M):
                tile_rows = tl.arange(0, M)
                rows = start + tile_rows
                row_inside = rows < queries
                q = tl.load(
                    _tile(queries_of_head, start, q_row, tile_rows, features, FAR),
                    mask=row_inside[:, None] & (features < D)[None, :],
                    other=0.0,
                )
                d_out = tl.load(
                    _tile(d_out_of_head, start, do_row, tile_rows, value_features, FAR),
                    mask=row_inside[:, None] & (value_features < DV)[None, :],
                    other=0.0,
                )
                normaliser = _normaliser(LOG_SUM_EXP + line + rows, row_inside)
                delta = tl.load(DELTA + line + rows, mask=row_inside, other=0.0)
                d_expected = tl.zeros([M], tl.float32)
                if PRICED:
                    d_expected = tl.load(D_EXPECTED + line + rows, mask=row_inside, other=0.0)
                raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                products = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
                if SOFTCAP:
                    raw = _soft_capped(raw, scale, softcap)
                    cap_slope = 1 - (raw / softcap) * (raw / softcap)
                if phase != 1:
                    allowed = _allowed(
                        rows[None, :], columns[:, None], offset, keys, window, REAL, MASK, mask_row, mask_key, queries,
                        CAUSAL, WINDOW, HAS_REAL, HAS_MASK,
                    )  # fmt: skip
                    raw = tl.where(allowed, raw, -_INFINITY)
                kept, _, d_logits = _logit_gradients(
                    raw, products, _query_words(rows + offset - origin, k0)[None, :], key_words[:, None], k1,
                    normaliser[None, :], delta[None, :], factor, bias, threshold, d_expected[None, :], SAMPLE,
                )  # fmt: skip
                d_v = tl.dot(kept.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
                if SOFTCAP:
                    d_logits *= cap_slope
                d_k = _added(d_k, d_logits, q, RESCALE, PRECISION)

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
    """The open links of M queries of one head, each query's from its own start, in the order of the keys."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offset = keys - queries
    tile_rows = tl.arange(0, M)
    rows = first + tile_rows
    row_inside = rows < queries
    features = tl.arange(0, PD)
    Q += batch * q_batch + head.to(tl.int64) * q_head
    K += batch * k_batch + (head // GROUPS).to(tl.int64) * k_head
    inside = row_inside[:, None] & (features < D)[None, :]
    q = tl.load(_tile(Q, first, q_row, tile_rows, features, FAR), mask=inside, other=0.0)
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
        k = tl.load(
            _tile(K, start, k_row, tile_columns, features, FAR),
            mask=(columns < keys)[:, None] & (features < D)[None, :],
            other=0.0,
        )
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
