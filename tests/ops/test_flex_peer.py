"""The FlexAttention version in ``benchmarks/attention.py`` computes the same as the op."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from attention_cases import GPU, inputs
from gossamer import gated_attention


@pytest.mark.skipif(GPU, reason="the benchmark compiles it there")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_evaluation_by_flex_attention_is_that_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    flex = import_module("attention").flex
    tensors = {name: x.detach() for name, x in inputs(97, dtype=torch.float32).items()}
    tensors["gate_bias"][1] = -60.0  # every gate closed
    output, _ = flex(*tensors.values(), True)
    assert not output[:, 1].any()
    torch.testing.assert_close(output, gated_attention(**tensors).output, rtol=1e-5, atol=1e-5)
