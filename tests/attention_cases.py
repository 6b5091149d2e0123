"""Implementations of the op and inputs for it, shared by the tests in ``ops``."""

import pytest
import torch

GPU = torch.cuda.is_available()
TRITON = pytest.param("triton", marks=[pytest.mark.gpu] if GPU else [])
"""Runs on the GPU where there is one (-m gpu), else in Triton's interpreter."""
IMPLEMENTATIONS = ("naive", "chunked", TRITON)
DTYPES = {"naive": torch.float64, "chunked": torch.float64, "triton": torch.float32}
"""Most exact inputs: Triton has no matrix products in float64."""
FAST = ("chunked", TRITON)

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
    groups: int = 3,
    dtype: torch.dtype | None = None,
    kv_heads: int = 2,
    implementation: str = "naive",
) -> dict[str, torch.Tensor]:
    """Random tensors in the given or the most exact dtype, on the device where the implementation runs."""
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
    """A leaf that requires gradients, where the implementation runs."""
    device = "cuda" if implementation == "triton" and GPU else "cpu"
    return x.detach().to(device, dtype or DTYPES[implementation]).requires_grad_()
