"""Every implementation against the definition in float64, and the definition against pencil and paper."""

import math

import pytest
import torch

from gossamer import GatedAttention, gated_attention

FIELDS = ("output", "expected_open", "open_links", "allowed_links")


def inputs(
    tokens: int, d: int = 16, groups: int = 3, dtype: torch.dtype = torch.float64, kv_heads: int = 2
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1000 + d + groups)
    shapes = {
        "q": (2, kv_heads * groups, tokens, d),
        "k": (2, kv_heads, tokens, d),
        "v": (2, kv_heads, tokens, d),
        "gate_bias": (kv_heads * groups,),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def run(tensors: dict[str, torch.Tensor], **options) -> tuple[GatedAttention, list[torch.Tensor]]:
    """The result, and the gradients of a fixed random function of output and expected links."""
    result = gated_attention(**tensors, **options)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(result.output.shape, generator=generator, dtype=torch.float64)
    prices = torch.randn(result.expected_open.shape, generator=generator, dtype=torch.float64)
    value = (result.output.double() * weights).sum() + (result.expected_open.double() * prices).sum()
    return result, list(torch.autograd.grad(value, list(tensors.values())))


def assert_same(tensors, tolerance: float, exact=None, **options) -> None:
    exact = exact or {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    expected, expected_grads = run(exact, implementation="naive", **options)
    result, grads = run(tensors, implementation="chunked", **options)
    for name in FIELDS:
        found, wanted = getattr(result, name).double(), getattr(expected, name).double()
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(grads, expected_grads, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(found.double() / scale, wanted / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 300])
def test_lengths(tokens: int, sample: bool) -> None:
    assert_same(inputs(tokens), 1e-10, sample=sample, seed=9)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("d,groups", [(32, 1), (64, 3), (80, 8), (128, 1)])
def test_head_sizes_and_grouped_queries(d: int, groups: int, sample: bool) -> None:
    assert_same(inputs(65, d, groups), 1e-10, sample=sample, seed=9)


PADDING = {
    "lengths": {"lengths": torch.tensor([97, 40])},
    "right": {"mask": torch.arange(97)[None] < torch.tensor([[97], [40]])},
    "left": {"mask": torch.arange(97)[None] >= torch.tensor([[0], [70]])},
    "window": {"window": 5},
    "window and left": {"window": 70, "mask": torch.arange(97)[None] >= torch.tensor([[0], [70]])},
    "softcap": {"softcap": 1.5},
    "not causal": {"causal": False},
    "scale": {"scale": 1.0},
    "full mask": {"mask": torch.rand(2, 1, 97, 97, generator=torch.Generator().manual_seed(0)) < 0.3},
}


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("case", PADDING)
def test_masks_and_settings(case: str, sample: bool) -> None:
    assert_same(inputs(97), 1e-10, sample=sample, seed=9, **PADDING[case])


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("sample", [False, True])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, tolerance: float, sample: bool) -> None:
    # Closed or open by the same decisions: rounding must not flip a gate, so gates are kept off the threshold.
    tensors = inputs(65, dtype=dtype)
    if not sample:
        tensors["gate_bias"] = torch.full((6,), 50.0, dtype=dtype, requires_grad=True)
    assert_same(tensors, tolerance, sample=False, seed=9)


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
@pytest.mark.parametrize("sample", [False, True])
def test_closed_rows_are_zero_without_nan(implementation: str, sample: bool) -> None:
    tensors = inputs(70)
    tensors["gate_bias"] = torch.full((6,), -1e4, dtype=torch.float64, requires_grad=True)
    result, grads = run(tensors, implementation=implementation, sample=sample, lengths=torch.tensor([70, 3]))
    assert not result.output.any()
    assert not result.open_links.any()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sample", [False, True])
def test_saturated_gates_give_no_nan(implementation: str, dtype: torch.dtype, sample: bool) -> None:
    tensors = inputs(65, dtype=dtype)
    big = {name: (x * 60 if name in "qk" else x).detach().requires_grad_() for name, x in tensors.items()}
    assert (big["q"][:, :1] @ big["k"][:, :1].mT).abs().max() > 1e4
    result, grads = run(big, implementation=implementation, sample=sample, scale=1.0)
    assert result.output.isfinite().all()
    assert result.expected_open.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_infinite_bias_forces_open_and_shut(implementation: str) -> None:
    tensors = inputs(33, groups=1)
    tensors["gate_bias"] = torch.tensor([math.inf, -math.inf], dtype=torch.float64, requires_grad=True)
    result, grads = run(tensors, implementation=implementation, sample=True)
    dense = torch.nn.functional.scaled_dot_product_attention(
        tensors["q"][:, :1], tensors["k"][:, :1], tensors["v"][:, :1], is_causal=True
    )
    torch.testing.assert_close(result.output[:, :1], dense)
    assert not result.output[:, 1].any()
    assert result.open_links.tolist() == [[33 * 34 // 2, 0]] * 2
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_pencil_and_paper(implementation: str) -> None:
    """Two tokens: S = [[0], [ln 3, 0]], so P = [[1], [3/4, 1/4]]; G = S + b with b = -1/2 opens only (1, 0)."""
    q = torch.tensor([[[[0.0], [math.log(3)]]]])
    k = torch.tensor([[[[1.0], [0.0]]]])
    v = torch.tensor([[[[8.0], [100.0]]]])
    options = {"scale": 1.0, "implementation": implementation}
    result = gated_attention(q, k, v, torch.tensor([-0.5]), **options)
    torch.testing.assert_close(result.output.flatten(), torch.tensor([0.0, 6.0]))
    assert result.open_links.item() == 1
    assert result.allowed_links.item() == 3
    sigma = [1 / (1 + math.exp(-g)) for g in (-0.5, math.log(3) - 0.5, -0.5)]
    assert result.expected_open.item() == pytest.approx(sum(sigma))


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_sampled_gates_open_as_often_as_their_probability_says(implementation: str) -> None:
    """With v = 1 and P = 1 / T, the output of the last row is the share of open gates; mean over seeds."""
    tokens, seeds = 64, 200
    q, k, v = torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4), torch.ones(1, 1, tokens, 1)
    for bias in (-3.0, 0.0, 2.0):
        shares = [
            gated_attention(
                q, k, v, torch.tensor([bias]), sample=True, seed=seed, implementation=implementation
            ).output[0, 0, -1, 0]
            for seed in range(seeds)
        ]
        p = 1 / (1 + math.exp(-bias))
        deviation = math.sqrt(p * (1 - p) / (tokens * seeds))
        assert abs(torch.stack(shares).mean() - p) < 4.5 * deviation


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_straight_through_gradient_is_that_of_the_soft_gate(implementation: str) -> None:
    """d output / d bias with hard gates forward equals the analytic P * v * g (1 - g) of sigma(G + n)."""
    q, k = torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    v = torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64)
    bias = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    gated_attention(q, k, v, bias, implementation=implementation).output.sum().backward()
    g = 1 / (1 + math.exp(-0.3))
    assert bias.grad.item() == pytest.approx(5 * g * (1 - g))


def test_implementations_draw_the_same_gates() -> None:
    tensors = inputs(130)
    outputs = [
        gated_attention(**tensors, sample=True, seed=4, implementation=name).output for name in ("naive", "chunked")
    ]
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], gated_attention(**tensors, sample=True, seed=5).output)


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_cached_keys_equal_the_last_rows_of_the_whole(implementation: str) -> None:
    tensors = inputs(80)
    whole = gated_attention(**tensors, window=30, implementation=implementation)
    tail = gated_attention(
        tensors["q"][:, :, -3:],
        tensors["k"],
        tensors["v"],
        tensors["gate_bias"],
        window=30,
        implementation=implementation,
    )
    torch.testing.assert_close(tail.output, whole.output[:, :, -3:])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"gate_bias": torch.zeros(5)}, "one bias per query head"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "mask has shape"),
        ({"window": 0}, "window is 0"),
        ({"lengths": torch.tensor([1, 1]), "mask": torch.ones(2, 8, dtype=torch.bool)}, "not both"),
        ({"q": torch.zeros(2, 5, 8, 16)}, "no multiple"),
        ({"k": torch.zeros(2, 2, 8, 4)}, "do not fit together"),
        ({"q": torch.zeros(2, 6, 9, 16)}, "9 queries but only 8 keys"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_attention(**{**inputs(8), **change})
