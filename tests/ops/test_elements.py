"""The compiled elementwise code: identical bits in every process, and the same result without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import torch

CALL = """
import hashlib, torch
from torch._dynamo.utils import counters
from gossamer import gated_attention
torch.manual_seed(0)
q, k, v = (torch.randn(2, 6, 320, 16).requires_grad_() for _ in range(3))
bias = torch.zeros(6, requires_grad=True)
result = gated_attention(q, k, v, bias, sample=True, seed=1)
grads = torch.autograd.grad(result.output.sum() + result.expected_open.sum(), (q, k, v, bias))
wanted = gated_attention(q, k, v, bias, sample=True, seed=1, implementation="naive").output
differ = (result.output - wanted).abs().amax(-1) > 1e-5
print(differ.sum().item() <= 2)  # two roundings of a gate logit at 0 may fall on different sides
print(hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in (result.output, *grads))).hexdigest())
print(counters["aot_autograd"]["autograd_cache_bypass"])
"""


def call(**environment: str) -> tuple[list[str], str]:
    result = subprocess.run(
        [sys.executable, "-c", CALL], capture_output=True, text=True, env={**os.environ, **environment}, check=True
    )
    return result.stdout.split(), result.stderr


def test_without_a_compiler_the_op_runs_and_says_so_once(tmp_path: Path) -> None:
    (right, *_), said = call(CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert right == "True"
    assert said.count("gated attention runs uncompiled and slower") == 1


def test_processes_agree_bit_for_bit() -> None:
    (first, second), said = zip(*(call() for _ in range(2)), strict=True)
    assert first == second
    assert (first[0], first[2]) == ("True", "0")  # torch caches all of the compilation, for quicker starts
    # torch does not quote its own path when it links, so in a folder with a space it cannot compile at all.
    assert (" " in torch.__file__) == any("uncompiled" in text for text in said)
