"""The noise: its exact formula, its independence of padding and length, and its distribution."""

import math

import pytest
import torch

from gossamer.ops.gates import fold_seed, make_pairs, noise_keys, noise_of, pair_uniforms

WORD = 0xFFFFFFFF


def reference_uniform(seed: int, batch: int, head: int, i: int, j: int) -> float:
    """Compute the documented formula in Python integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & WORD
        x ^= x >> 15
        x = x * 0x846CA68B & WORD
        return x ^ x >> 16

    def absorb(state: int, word: int) -> int:
        return mix((state ^ word) + 0x9E3779B9 & WORD)

    state = 0
    for word in (seed & WORD, seed >> 32, batch, head):
        state = absorb(state, word)
    k0, k1 = absorb(state, 0), absorb(state, 1)
    x = (i << 16 | j) ^ k0
    x ^= x >> 16
    x = x * 0x7FEB352D + k1 & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    x ^= x >> 16
    return ((x >> 9) + 0.5) / 2**23


def _keys(seed: int, batch: int, heads: int) -> torch.Tensor:
    return noise_keys(noise_of(seed, 0, torch.device("cpu")), batch, heads)


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    positions = torch.arange(512)[None].expand(2, -1)
    return pair_uniforms(_keys(7, 2, 4), positions, positions)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 + 12345])
def test_uniforms_follow_the_documented_formula_bit_for_bit(seed: int) -> None:
    positions = torch.tensor([[0, 1, 2, 255, 256, 40_000, 65_535]]).expand(3, -1)
    uniforms = pair_uniforms(_keys(seed, 3, 2), positions, positions)
    for b in range(3):
        for h in range(2):
            for a, i in enumerate(positions[0].tolist()):
                for c, j in enumerate(positions[0].tolist()):
                    assert uniforms[b, h, a, c].item() == reference_uniform(seed, b, h, i, j)


def test_uniforms_stay_off_zero_and_one() -> None:
    extremes = torch.tensor([0.0, 2**23 - 1]).add_(0.5).mul_(2.0**-23)
    assert extremes[0] == 2**-24
    assert extremes[1] == 1 - 2**-24
    assert torch.logit(extremes).isfinite().all()


def test_no_word_repeats_within_a_stream() -> None:
    """All steps are bijections: the 2^20 pairs here give 2^20 different words, so few share their top 23 bits."""
    positions = torch.arange(1024)[None]
    uniforms = pair_uniforms(_keys(3, 1, 1), positions, positions).flatten()
    pairs, values = uniforms.numel(), 2**23
    expected_distinct = values * (1 - math.exp(-pairs / values))
    assert abs(uniforms.unique().numel() - expected_distinct) < 6 * math.sqrt(pairs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_noise_of_real_pairs(side: str) -> None:
    keys = _keys(11, 1, 2)
    real, padded = 5, 9
    plain = _uniforms(keys, torch.ones(1, real, dtype=torch.bool))
    mask = torch.zeros(1, padded, dtype=torch.bool)
    where = slice(0, real) if side == "right" else slice(padded - real, padded)
    mask[:, where] = True
    assert torch.equal(_uniforms(keys, mask)[:, :, where, where], plain)


def test_truncation_does_not_change_the_noise() -> None:
    keys = _keys(11, 1, 2)
    long = _uniforms(keys, torch.ones(1, 300, dtype=torch.bool))
    assert torch.equal(long[:, :, :65, :65], _uniforms(keys, torch.ones(1, 65, dtype=torch.bool)))


def _uniforms(keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    length = mask.shape[1]
    pairs = make_pairs(1, length, length, causal=True, window=None, mask=mask, lengths=None, device=torch.device("cpu"))
    return pairs.uniforms(keys, slice(0, length), slice(0, length))


def test_noise_is_logistic(sample: torch.Tensor) -> None:
    noise = torch.logit(sample.double()).flatten()
    n = noise.numel()
    deviation = math.pi / math.sqrt(3)
    assert abs(noise.mean()) < 4 * deviation / math.sqrt(n)
    assert abs(noise.var() / deviation**2 - 1) < 4 * math.sqrt(3.2 / n)  # the logistic's kurtosis is 4.2
    for threshold in (-8.0, -5.5, -2.0, 0.0, 2.0, 5.5, 8.0):
        p = 1 / (1 + math.exp(threshold))
        assert abs((noise > threshold).double().mean() - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 2**-23


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_neighbours_are_uncorrelated(sample: torch.Tensor, dimension: int) -> None:
    size = sample.shape[dimension]
    a, b = sample.narrow(dimension, 0, size - 1), sample.narrow(dimension, 1, size - 1)
    correlation = torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1]
    assert abs(correlation) < 4.5 / math.sqrt(a.numel())


def test_seeds_are_uncorrelated(sample: torch.Tensor) -> None:
    positions = torch.arange(512)[None].expand(2, -1)
    for other in (6, 8, 7 + 2**32):
        second = pair_uniforms(_keys(other, 2, 4), positions, positions)
        correlation = torch.corrcoef(torch.stack([sample.flatten().double(), second.flatten().double()]))[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(sample.numel())


def test_fold_seed_tells_step_layer_and_order_apart() -> None:
    seeds = {fold_seed(s, step, layer) for s in range(4) for step in range(50) for layer in range(30)}
    assert len(seeds) == 4 * 50 * 30
    assert fold_seed(0, 1, 2) != fold_seed(0, 2, 1)
    assert fold_seed(0, 1) != fold_seed(1, 0)
    assert all(0 <= seed < 2**64 for seed in seeds)
