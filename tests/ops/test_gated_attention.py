"""Every implementation compared with the definition in float64, and the definition with worked examples."""

import math
import mmap
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attention_cases import FAST, GPU, GROUPS, IMPLEMENTATIONS, PADDING, TRITON, assert_same, inputs, place, run
from gossamer import gated_attention
from gossamer.ops import make_pairs, noise_of


@pytest.mark.parametrize("implementation", FAST)
def test_gates_that_rounding_decides_fail_no_comparison(implementation: str) -> None:
    """Each head's bias is minus the float32 logit of one of its pairs, so rounding decides the gate of that pair."""
    tensors = inputs(65, dtype=torch.float32, implementation=implementation)
    q, k = (tensors[name].detach() for name in "qk")
    logits = q @ k.repeat_interleave(GROUPS, dim=1).mT * q.shape[-1] ** -0.5
    tensors["gate_bias"] = (-logits[0, :, 60, 30]).requires_grad_()
    exact = {name: x.detach().cpu().double() for name, x in tensors.items()}
    found, wanted = (
        gated_attention(**x, implementation=name).open_links.cpu()
        for x, name in ((tensors, implementation), (exact, "naive"))
    )
    assert not torch.equal(found, wanted)
    assert_same(tensors, 1e-5, implementation)


TOLERANCES = {"chunked": 1e-10, "triton": 1e-5}
"""Tolerances for inputs in the most precise dtype."""


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 300])
@pytest.mark.parametrize("implementation", FAST)
def test_lengths(implementation: str, tokens: int, sample: bool) -> None:
    if implementation == "triton" and tokens > 128 and not GPU:
        pytest.skip("long in the interpreter; runs on a GPU")
    tensors = inputs(tokens, implementation=implementation)
    assert_same(tensors, TOLERANCES[implementation], implementation, sample=sample, seed=9)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("d,groups", [(32, 1), (64, 3), (80, 4), (128, 1)])
@pytest.mark.parametrize("implementation", FAST)
def test_head_sizes_and_grouped_queries(implementation: str, d: int, groups: int, sample: bool) -> None:
    tensors = inputs(65, d, groups, implementation=implementation)
    assert_same(tensors, TOLERANCES[implementation], implementation, sample=sample, seed=9)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("case", PADDING)
@pytest.mark.parametrize("implementation", FAST)
def test_masks_and_settings(implementation: str, case: str, sample: bool) -> None:
    tensors = inputs(97, implementation=implementation)
    assert_same(tensors, TOLERANCES[implementation], implementation, sample=sample, seed=9, **PADDING[case])


@pytest.mark.parametrize(
    "implementation,dtype,tolerance",
    [
        ("chunked", torch.float32, 1e-5),
        ("chunked", torch.bfloat16, 1e-2),
        pytest.param("triton", torch.float16, 2e-3, marks=TRITON.marks),  # bf16 is wrong in the interpreter
    ],
)
@pytest.mark.parametrize("sample", [False, True])
def test_lower_precision_stays_near_float64(
    implementation: str, dtype: torch.dtype, tolerance: float, sample: bool
) -> None:
    tensors = inputs(65, dtype=dtype, implementation=implementation)
    assert_same(tensors, tolerance, implementation, sample=sample, seed=9)


@pytest.mark.gpu
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("tokens,d,groups", [(1, 64, 3), (65, 64, 1), (127, 80, 8), (300, 128, 3), (300, 256, 1)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_on_a_gpu(
    dtype: torch.dtype, tolerance: float, tokens: int, d: int, groups: int, sample: bool
) -> None:
    tensors = inputs(tokens, d, groups, dtype, implementation="triton")
    assert_same(tensors, tolerance, "triton", sample=sample, seed=9)


@pytest.mark.gpu
def test_long_sequences_on_a_gpu() -> None:
    """T = 65,536: the last rows equal those computed alone, and memory does not grow with the squared length."""
    q, k, v = (torch.randn(1, 1, 65_536, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.zeros(1, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = gated_attention(q, k, v, bias, sample=True).output
    assert torch.cuda.max_memory_allocated() - before < 100 * 2**20
    tail = gated_attention(q[:, :, -64:], k, v, bias, sample=True, implementation="chunked").output
    torch.testing.assert_close(whole[:, :, -64:], tail, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sample", [False, True])
def test_closed_rows_are_zero_without_nan(implementation: str, sample: bool) -> None:
    tensors = inputs(70, implementation=implementation)
    tensors["gate_bias"] = torch.full_like(tensors["gate_bias"], -1e4).requires_grad_()
    lengths = torch.tensor([70, 3], device=tensors["q"].device)
    result, grads = run(tensors, implementation=implementation, sample=sample, lengths=lengths)
    assert not result.output.any()
    assert not result.open_links.any()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    "implementation,dtype",
    [
        *((name, dtype) for name in ("naive", "chunked") for dtype in (torch.float32, torch.bfloat16)),
        *(pytest.param("triton", dtype, marks=TRITON.marks) for dtype in (torch.float32, torch.float16)),
    ],
)
@pytest.mark.parametrize("sample", [False, True])
def test_saturated_gates_give_no_nan(implementation: str, dtype: torch.dtype, sample: bool) -> None:
    tensors = inputs(65, dtype=dtype, implementation=implementation)
    big = {name: (x * 60 if name in "qk" else x).detach().requires_grad_() for name, x in tensors.items()}
    assert (big["q"][:, :1].float() @ big["k"][:, :1].float().mT).abs().max() > 1e4
    result, grads = run(big, implementation=implementation, sample=sample, scale=1.0)
    assert result.output.isfinite().all()
    assert result.expected_open.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_infinite_bias_forces_open_and_shut(implementation: str, padded: bool) -> None:
    tensors = inputs(33, groups=1, implementation=implementation)
    tensors["gate_bias"] = place(torch.tensor([math.inf, -math.inf]), implementation)
    mask = torch.ones(2, 33, dtype=torch.bool, device=tensors["q"].device) if padded else None
    result, grads = run(tensors, implementation=implementation, sample=True, mask=mask)
    dense = torch.nn.functional.scaled_dot_product_attention(
        tensors["q"][:, :1], tensors["k"][:, :1], tensors["v"][:, :1], is_causal=True
    )
    torch.testing.assert_close(result.output[:, :1], dense)
    assert not result.output[:, 1].any()
    assert result.open_links.tolist() == [[list(range(1, 34)), [0] * 33]] * 2
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pencil_and_paper(implementation: str) -> None:
    """Two tokens: S = [[0], [ln 3, 0]], so P = [[1], [3/4, 1/4]]; G = S + b with b = -1/2 opens only (1, 0)."""
    q = place(torch.tensor([[[[0.0], [math.log(3)]]]]), implementation)
    k = place(torch.tensor([[[[1.0], [0.0]]]]), implementation)
    v = place(torch.tensor([[[[8.0], [100.0]]]]), implementation)
    bias = place(torch.tensor([-0.5]), implementation)
    result = gated_attention(q, k, v, bias, scale=1.0, implementation=implementation)
    torch.testing.assert_close(result.output.flatten().cpu().double(), torch.tensor([0.0, 6.0]).double())
    assert result.open_links.tolist() == [[[0, 1]]]
    assert result.allowed_links.tolist() == [[[1, 2]]]
    sigma = [1 / (1 + math.exp(-g)) for g in (-0.5, math.log(3) - 0.5, -0.5)]
    assert result.expected_open.flatten().tolist() == pytest.approx([sigma[0], sigma[1] + sigma[2]])
    assert result.log_sum_exp.flatten().tolist() == pytest.approx([0.0, math.log(4)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sampled_gates_open_as_often_as_their_probability_says(implementation: str) -> None:
    """With v = 1 and equal weights, the output of a query times its allowed links is the number of its open links."""
    tokens = 160
    shapes = ((1, 1, tokens, 4), (1, 1, tokens, 4), (1, 1, tokens, 1))
    q, k, v = (place(torch.full(shape, shape[-1] == 1.0), implementation) for shape in shapes)
    for bias in (-3.0, 0.0, 2.0):
        biases = place(torch.tensor([bias]), implementation)
        result = gated_attention(q, k, v, biases, sample=True, seed=3, implementation=implementation)
        opened, allowed = (result.output[..., 0] * result.allowed_links).sum(), int(result.allowed_links.sum())
        p = 1 / (1 + math.exp(-bias))
        assert allowed == tokens * (tokens + 1) // 2
        assert abs(opened / allowed - p) < 4.5 * math.sqrt(p * (1 - p) / allowed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_straight_through_gradient_is_that_of_the_soft_gate(implementation: str) -> None:
    """With hard gates forward, d output / d bias equals the analytic P * v * g (1 - g), where g = sigma(G + n)."""
    zero = torch.zeros(1, 1, 1, 2)
    q, k, v = (place(x, implementation) for x in (zero, zero, torch.full((1, 1, 1, 1), 5.0)))
    bias = place(torch.tensor([0.3]), implementation)
    gated_attention(q, k, v, bias, implementation=implementation).output.sum().backward()
    g = 1 / (1 + math.exp(-0.3))
    assert bias.grad.item() == pytest.approx(5 * g * (1 - g))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("padding", [0, 33])
def test_implementations_draw_the_same_gates(implementation: str, padding: int) -> None:
    """With the identity as values, the output is A * P, which shows the open gates pair by pair."""
    tokens = 97

    def gates(name: str, seed: int) -> torch.Tensor:
        tensors = inputs(tokens, groups=1, implementation=name)
        tensors["v"] = place(torch.eye(tokens).expand(2, 2, -1, -1), name)
        mask = torch.arange(tokens, device=tensors["q"].device).expand(2, -1) >= padding
        return gated_attention(**tensors, mask=mask, sample=True, seed=seed, implementation=name).output.cpu() > 0

    assert torch.equal(gates(implementation, 4), gates("naive", 4))
    assert not torch.equal(gates(implementation, 5), gates("naive", 4))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cached_keys_equal_the_last_rows_of_the_whole(implementation: str) -> None:
    tensors = inputs(80, implementation=implementation)
    whole = gated_attention(**tensors, window=30, implementation=implementation)
    tensors["q"] = tensors["q"][:, :, -3:]
    tail = gated_attention(**tensors, window=30, implementation=implementation)
    torch.testing.assert_close(tail.output, whole.output[:, :, -3:])


@pytest.mark.parametrize("window", [None, 1, 16, 40])
@pytest.mark.parametrize("implementation", FAST)
def test_fewer_queries_than_keys_have_the_gradients_of_the_definition(implementation: str, window: int | None) -> None:
    tensors = inputs(65, implementation=implementation)
    tensors["q"] = tensors["q"][:, :, -7:].detach().requires_grad_()
    for sample in (False, True):
        assert_same(tensors, TOLERANCES[implementation], implementation, window=window, sample=sample, seed=3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_batch_has_an_empty_result(implementation: str) -> None:
    tensors = {name: x if name == "gate_bias" else x[:0] for name, x in inputs(5).items()}
    result = gated_attention(**tensors, sample=True, implementation=implementation)
    assert result.output.shape == (0, 2 * GROUPS, 5, 16)
    assert result.open_links.shape == result.expected_open.shape == (0, 2 * GROUPS, 5)


def test_a_second_derivative_is_refused() -> None:
    tensors = inputs(6)
    (first,) = torch.autograd.grad(
        gated_attention(**tensors, implementation="chunked").output.square().sum(), tensors["v"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_expected_links_are_left_out_when_not_asked_for(implementation: str) -> None:
    tensors = inputs(20, implementation=implementation)
    whole = gated_attention(**tensors, implementation=implementation)
    bare = gated_attention(**tensors, expect=False, implementation=implementation)
    uncounted = gated_attention(**tensors, count=False, implementation=implementation)
    assert bare.expected_open is None
    assert uncounted.open_links is None
    assert torch.equal(bare.output, whole.output)
    assert torch.equal(uncounted.output, whole.output)
    assert torch.equal(bare.open_links, whole.open_links)
    assert torch.equal(uncounted.expected_open, whole.expected_open)
    bare.output.sum().backward()
    assert tensors["gate_bias"].grad.any()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"gate_bias": torch.zeros(5)}, "one bias per query head"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "mask has shape"),
        ({"window": 0}, "window is 0"),
        ({"lengths": torch.tensor([1, 1]), "mask": torch.ones(2, 8, dtype=torch.bool)}, "not both"),
        ({"q": torch.zeros(2, 5, 8, 16)}, "no multiple"),
        ({"k": torch.zeros(2, 2, 8, 4)}, "do not fit together"),
        ({"q": torch.zeros(2, 2 * GROUPS, 9, 16)}, "9 queries but only 8 keys"),
        ({"scale": -1.0}, "must be positive"),
        ({"scale": math.nan}, "scale is nan"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"softcap": math.nan}, "softcap is nan"),
        ({"mask": torch.ones(2, 8, dtype=torch.long)}, "dtype torch.int64, not torch.bool"),
        ({"lengths": torch.tensor([[4], [8]])}, "lengths has shape"),
        ({"implementation": "flash"}, "'flash' is none of naive, chunked, triton"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_attention(**{**inputs(8), **change})


def _distances_from_float64(
    attend: Callable[..., torch.Tensor], tensors: list[torch.Tensor], d_output: torch.Tensor
) -> list[float]:
    """Compute the relative distances of the output and the gradients of q, k and v from dense float64 attention."""

    def graded(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        output = function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, d_output.to(dtype))]

    with sdpa_kernel(SDPBackend.MATH):
        exact = graded(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), torch.float64)
    return [((x - y).norm() / y.norm()).item() for x, y in zip(graded(attend, torch.bfloat16), exact, strict=True)]


@pytest.mark.parametrize("size", [1, 4, 16])
def test_bfloat16_is_as_exact_as_flash_attention(size: int) -> None:
    """The gates are forced open. Larger q make the gradients cancel more."""
    generator = torch.Generator().manual_seed(size)
    q, k, v, d_output = (torch.randn(2, 4, 128, 64, generator=generator).bfloat16() for _ in range(4))
    bias = torch.full((4,), math.inf)

    def gated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return gated_attention(q, k, v, bias, implementation="chunked").output

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    found, peer = (_distances_from_float64(f, [q * size, k, v], d_output) for f in (gated, flash))
    assert all(mine <= 1.05 * its for mine, its in zip(found, peer, strict=True))


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("case", ["plain", "left", "full mask", "window", "softcap"])
@pytest.mark.parametrize("implementation", FAST)
def test_the_operator_keeps_what_torch_asks_of_operators(implementation: str, case: str, sample: bool) -> None:
    if implementation == "triton" and (case, sample) != ("plain", True) and not GPU:
        pytest.skip("long in the interpreter; runs on a GPU")
    tokens = 6 if case == "plain" else 97
    q, k, v, bias = inputs(tokens, implementation=implementation).values()
    options = {key: x.to(q.device) if isinstance(x, torch.Tensor) else x for key, x in PADDING.get(case, {}).items()}
    mask = options.get("mask")
    pairs = make_pairs(
        2, tokens, tokens, causal=True, window=options.get("window"), mask=mask, lengths=None, device=q.device
    )
    noise = noise_of(3, 0, q.device) if sample else None
    arguments = (
        q, k, v, bias, pairs.real, pairs.mask, pairs.extents, noise,
        0.25, True, pairs.window, options.get("softcap"), True, True, implementation,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.gossamer.gated_attention.default, arguments)


@pytest.mark.parametrize("implementation", FAST)
def test_seeds_as_tensors_are_the_same_seeds(implementation: str) -> None:
    tensors = inputs(20, implementation=implementation)
    for seed, row in ((3, 0), (2**63 + 5, 2)):
        signed = torch.tensor(seed - (seed >> 63 << 64), device=tensors["q"].device)
        found, wanted = (
            gated_attention(**tensors, sample=True, seed=s, first_row=r, implementation=implementation).output
            for s, r in ((signed, torch.tensor(row)), (seed, row))
        )
        assert torch.equal(found, wanted)


def test_compiled_and_sampled_the_op_is_compiled_once_for_all_seeds() -> None:
    torch.compiler.reset()
    tensors = inputs(20)
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(seed: torch.Tensor) -> torch.Tensor:
        return gated_attention(**tensors, sample=True, seed=seed, implementation="chunked").output

    for seed in range(12):
        wanted = gated_attention(**tensors, sample=True, seed=seed, implementation="chunked").output
        assert torch.equal(compiled(torch.tensor(seed)), wanted)
    assert counter.frame_count == 1


def _far_rows(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Copy a tensor to rows that are ``stride`` elements apart; the memory between them is never touched."""
    room = mmap.mmap(-1, x.shape[-2] * stride * x.element_size(), flags=mmap.MAP_PRIVATE | 0x4000)  # MAP_NORESERVE
    far = torch.frombuffer(room, dtype=x.dtype).as_strided(x.shape, (0, 0, stride, 1))
    return far.copy_(x)


@pytest.mark.skipif(GPU, reason="memory that is only reserved is the CPU's; the kernels are the same")
def test_rows_may_lie_beyond_32_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 300, 16, generator=generator) for _ in range(3))
    bias = torch.zeros(1)
    wanted = gated_attention(q, k, v, bias, implementation="triton").output
    for stride in ((1 << 23) - 16, 1 << 23):
        far = [_far_rows(x, stride) for x in (q, k, v)]
        assert 300 * far[0].stride(2) > 2**31
        assert torch.equal(gated_attention(*far, bias, implementation="triton").output, wanted)


@pytest.mark.parametrize("implementation", [TRITON])
def test_float16_sums_up_prices_too_small_for_it(implementation: str) -> None:
    """A price of 1e-6 times sigma' = 0.018 is zero in float16; its sum over the queries and keys is not."""
    axes = 30 * torch.eye(16)[:2, None].expand(-1, 40, -1)  # q and k at right angles: all logits are 0
    q, k = (place(x.expand(1, 1, -1, -1), implementation, torch.float16) for x in axes)
    v = place(torch.zeros(1, 1, 40, 16), implementation, torch.float16)
    bias = place(torch.tensor([-4.0]), implementation)
    result = gated_attention(q, k, v, bias, causal=False, implementation=implementation)
    dq, dk = torch.autograd.grad(result.expected_open.sum() * 1e-6, (q, k))
    wanted = 0.25 * 40 * 30 * 1e-6 * torch.sigmoid(torch.tensor(4.0)) * torch.sigmoid(torch.tensor(-4.0))
    torch.testing.assert_close(dq[..., 1].cpu().float(), wanted.expand(1, 1, 40), rtol=0.02, atol=0)
    torch.testing.assert_close(dk[..., 0].cpu().float(), wanted.expand(1, 1, 40), rtol=0.02, atol=0)


def test_dtypes_that_differ_are_cast_under_autocast_and_refused_without() -> None:
    tensors = inputs(9, dtype=torch.float32)
    mixed = {**tensors, "v": tensors["v"].bfloat16()}
    with pytest.raises(ValueError, match="different dtypes"):
        gated_attention(**mixed)
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_attention(**mixed).output
    low = {name: x if name == "gate_bias" else x.bfloat16() for name, x in tensors.items()}
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, gated_attention(**low).output)
