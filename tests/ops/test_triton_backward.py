"""Features of the GPU kernels only: a backward pass in one kernel, and gates far above their threshold."""

import pytest
import torch

from attention_cases import PADDING, TRITON, TRITON_FUSED, assert_same, inputs, run
from gossamer import gated_attention


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("tokens,d,groups", [(1, 16, 3), (64, 16, 1), (65, 80, 2)])
@pytest.mark.parametrize("implementation", [TRITON_FUSED])
def test_one_kernel_has_the_gradients_of_the_definition(
    implementation: str, tokens: int, d: int, groups: int, sample: bool
) -> None:
    assert_same(inputs(tokens, d, groups, implementation=implementation), 1e-5, implementation, sample=sample, seed=9)


@pytest.mark.parametrize("case", ["lengths", "window and left", "softcap", "not causal", "full mask"])
@pytest.mark.parametrize("implementation", [TRITON_FUSED])
def test_one_kernel_with_masks_and_settings(implementation: str, case: str) -> None:
    tensors = inputs(97, implementation=implementation)
    assert_same(tensors, 1e-5, implementation, sample=True, seed=9, **PADDING[case])


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("implementation", [TRITON_FUSED])
def test_one_kernel_with_fewer_queries_than_keys(implementation: str, window: int | None) -> None:
    tensors = inputs(65, implementation=implementation)
    tensors["q"] = tensors["q"][:, :, -7:].detach().requires_grad_()
    assert_same(tensors, 1e-5, implementation, window=window, sample=True, seed=3)


@pytest.mark.parametrize("implementation", [TRITON_FUSED])
def test_one_kernel_in_half_precision_and_with_closed_rows(implementation: str) -> None:
    low = inputs(65, dtype=torch.float16, implementation=implementation)
    assert_same(low, 2e-3, implementation, sample=True, seed=9)
    tensors = inputs(70, implementation=implementation)
    tensors["gate_bias"] = torch.full_like(tensors["gate_bias"], -1e4).requires_grad_()
    lengths = torch.tensor([70, 3], device=tensors["q"].device)
    result, gradients = run(tensors, implementation=implementation, sample=True, lengths=lengths)
    assert not result.output.any()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("case,sample", [("plain", True), ("window and left", False), ("softcap", True)])
@pytest.mark.parametrize("implementation", [TRITON, TRITON_FUSED])
def test_gates_far_above_their_threshold_are_exact(implementation: str, case: str, sample: bool) -> None:
    """If the largest logit is 300 and the threshold 0, weights of open gates underflow."""
    tensors = inputs(97, groups=1, implementation=implementation)
    options = {**PADDING.get(case, {}), **({"softcap": 200.0} if case == "softcap" else {})}
    big = {name: (x * 10 if name in "qk" else x).detach().requires_grad_() for name, x in tensors.items()}
    result = gated_attention(**big, **options, implementation=implementation)
    assert result.log_sum_exp.max() > 150
    assert_same(big, 5e-5, implementation, sample=sample, seed=9, **options)


@pytest.mark.parametrize("implementation", [TRITON, TRITON_FUSED])
def test_one_head_far_above_its_threshold_changes_no_other(implementation: str) -> None:
    tensors = inputs(65, groups=1, implementation=implementation)
    _, wanted = run(tensors, implementation=implementation, sample=True)
    bias = tensors["gate_bias"].detach().clone()
    bias[1] = 1e4
    _, found = run({**tensors, "gate_bias": bias.requires_grad_()}, implementation=implementation, sample=True)
    assert torch.equal(found[0][:, 0], wanted[0][:, 0])
    assert not torch.equal(found[0][:, 1], wanted[0][:, 1])
