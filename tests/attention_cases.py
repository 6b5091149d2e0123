"""Implementations of the op, its inputs and the comparison with the definition, shared by the tests in ``ops``."""

import pytest
import torch

from gossamer import GatedAttentionOutput, gated_attention
from gossamer.ops import make_pairs, noise_of
from gossamer.ops.gates import noise_keys

GPU = torch.cuda.is_available()
GROUPS = 2
"""Query heads per key head; few, since interpreted kernels take time for each head."""
TRITON = pytest.param("triton", marks=[pytest.mark.gpu] if GPU else [])
"""Runs on the GPU if there is one (-m gpu), otherwise in Triton's interpreter."""
IMPLEMENTATIONS = ("naive", "chunked", TRITON)
TRITON_FUSED = pytest.param("triton_fused", marks=[pytest.mark.gpu] if GPU else [])
"""The same with the fused backward pass."""
DTYPES = {"naive": torch.float64, "chunked": torch.float64, "triton": torch.float32, "triton_fused": torch.float32}
"""The most precise dtype of each implementation: Triton has no matrix products in float64."""
FAST = ("chunked", TRITON)
FIELDS = ("output", "expected_open", "open_links", "allowed_links", "log_sum_exp")

PADDING = {
    "lengths": {"lengths": torch.tensor([97, 40])},
    "right": {"mask": torch.arange(97)[None] < torch.tensor([[97], [40]])},
    "left": {"mask": torch.arange(97)[None] >= torch.tensor([[0], [70]])},
    "window": {"window": 5},
    "wide window": {"window": 70},
    "window and left": {"window": 70, "mask": torch.arange(97)[None] >= torch.tensor([[0], [70]])},
    "softcap": {"softcap": 1.5},
    "not causal": {"causal": False},
    "scale": {"scale": 1.0},
    "full mask": {"mask": torch.rand(2, 1, 97, 97, generator=torch.Generator().manual_seed(0)) < 0.3},
}


def inputs(
    tokens: int,
    d: int = 16,
    groups: int = GROUPS,
    dtype: torch.dtype | None = None,
    kv_heads: int = 2,
    implementation: str = "naive",
) -> dict[str, torch.Tensor]:
    """Create random tensors in the given or the most precise dtype, on the implementation's device."""
    generator = torch.Generator().manual_seed(tokens * 1000 + d + groups)
    shapes = {
        "q": (2, kv_heads * groups, tokens, d),
        "k": (2, kv_heads, tokens, d),
        "v": (2, kv_heads, tokens, d),
        "gate_bias": (kv_heads * groups,),
    }
    return {
        name: place(torch.randn(shape, generator=generator, dtype=torch.float64), implementation, dtype)
        for name, shape in shapes.items()
    }


def place(x: torch.Tensor, implementation: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy a tensor to the implementation's device as a leaf that requires gradients."""
    device = "cuda" if implementation.startswith("triton") and GPU else "cpu"
    return x.detach().to(device, dtype or DTYPES[implementation]).requires_grad_()


def run(
    tensors: dict[str, torch.Tensor], kept: torch.Tensor | None = None, **options
) -> tuple[GatedAttentionOutput, list[torch.Tensor]]:
    """Compute the result, and the gradients of a fixed random function of its output and expected links.

    The function depends only on the ``kept`` queries; None keeps all.
    """
    result = gated_attention(**tensors, **options)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(result.output.shape, generator=generator, dtype=torch.float64)
    prices = torch.randn(result.expected_open.shape, generator=generator, dtype=torch.float64)
    if kept is not None:
        weights, prices = weights * kept[..., None], prices * kept
    value = (result.output.cpu().double() * weights).sum() + (result.expected_open.cpu().double() * prices).sum()
    return result, list(torch.autograd.grad(value, list(tensors.values())))


def without_close_calls(exact: dict[str, torch.Tensor], sample: bool = False, seed: int = 0, **options) -> torch.Tensor:
    """Mark the queries, [batch, heads, queries], of which no gate is decided by rounding in float32."""
    q, k, bias = (exact[name].detach() for name in ("q", "k", "gate_bias"))
    scale, softcap = options.get("scale", q.shape[-1] ** -0.5), options.get("softcap")
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    gate_logits = logits + bias[:, None, None]
    close = gate_logits.abs() < 1e-6 * logits.abs().max().clamp(min=1)
    if sample:
        batch, heads, queries, keys = logits.shape
        pairs = make_pairs(
            batch, queries, keys, causal=options.get("causal", True), window=options.get("window"),
            mask=options.get("mask"), lengths=options.get("lengths"), device=q.device,
        )  # fmt: skip
        noise = noise_keys(noise_of(seed, 0, q.device), batch, heads)
        uniforms = pairs.uniforms(noise, slice(0, queries), slice(0, keys))
        close |= (uniforms.double() - torch.sigmoid(-gate_logits)).abs() < 1e-6
    return ~close.any(-1)


def assert_same(tensors, tolerance: float, implementation: str, **options) -> None:
    """Compare the result and all gradients with the definition in float64, without gates that rounding decides."""
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in tensors.items()}
    kept = without_close_calls(exact, **options)
    assert kept.double().mean() > 0.9
    expected, expected_grads = run(exact, kept, implementation="naive", **options)
    moved = {key: x.to(tensors["q"].device) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    result, grads = run(tensors, kept, implementation=implementation, **moved)
    for name in FIELDS:
        found, wanted = (getattr(x, name).cpu().double()[kept] for x in (result, expected))
        scale = max(1.0, wanted[wanted.isfinite()].abs().max().item())
        torch.testing.assert_close(found / scale, wanted / scale, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(grads, expected_grads, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(found.cpu().double() / scale, wanted / scale, rtol=tolerance, atol=tolerance)
