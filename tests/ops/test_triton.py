"""The kernels' noise bit for bit, and the compiled kernels; neither needs a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import triton
import triton.language as tl

from attention_cases import GPU, TRITON
from gossamer.ops import _triton_runs
from gossamer.ops.gates import noise_keys, noise_of, pair_uniforms
from gossamer.ops.triton import Kernel
from gossamer.ops.triton_kernels import _key_words, _noise, _noise_keys, _query_words

REPOSITORY = Path(__file__).parents[2]


@triton.jit
def _write_noise(NOISE, OUT, first_query, first_key, N: tl.constexpr):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    OUT += (batch * tl.num_programs(1) + head) * N * N
    k0, k1 = _noise_keys(NOISE, batch, head)
    i = tl.arange(0, N)
    words = _query_words(first_query + i, k0)
    noise = _noise(words[:, None], _key_words(first_key + i)[None, :], k1)
    tl.store(OUT + i[:, None] * N + i[None, :], 2 * noise - (1 - 2.0**-24))


@pytest.mark.parametrize("implementation", [TRITON])
@pytest.mark.parametrize("first_query,first_key", [(0, 0), (500, 3), (65_472, 65_472)])
@pytest.mark.parametrize("seed,first_row", [(2**63 + 5, 0), (7, 3)])
def test_noise_is_the_documented_one_bit_for_bit(
    implementation: str, first_query: int, first_key: int, seed: int, first_row: int
) -> None:
    device = torch.device("cuda" if GPU else "cpu")
    noise = noise_of(seed, first_row, device)
    places = torch.arange(64, device=device).expand(2, -1)
    wanted = pair_uniforms(noise_keys(noise, 2, 3), places + first_query, places + first_key)
    found = torch.empty(2, 3, 64, 64, device=device)
    _write_noise[(1, 3, 2)](noise, found, first_query, first_key, N=64)
    assert torch.equal(found, wanted)


def reports(tmp_path: Path, *arguments: str) -> list[dict]:
    """Get the rows of ``benchmarks/compiled_kernels.py``, which compiles the kernels in a separate process."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/compiled_kernels.py", "--json", str(tmp_path / "rows.json"), *arguments]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows
    return rows


def test_kernels_compile_without_spills_and_within_budget(tmp_path: Path) -> None:
    rows = reports(tmp_path, "--features", "64")
    assert {row["kernel"] for row in rows} == set(get_args(Kernel))
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    assert not [row for row in rows if row["spilled_bytes"]]
    training = {
        row["kernel"]: row["instructions_per_pair"]
        for row in rows
        if (row["gates"], row["target"]) == ("sampled", "sm_90")
    }
    assert training["forward"] <= 28
    two_kernels = training["query_gradients"] + training["key_value_gradients"]
    assert two_kernels <= 80
    assert training["fused_gradients"] <= 0.75 * two_kernels


@pytest.mark.slow
def test_all_head_sizes_compile_without_spills(tmp_path: Path) -> None:
    assert not [row for row in reports(tmp_path, "--features", "32", "80", "128", "256") if row["spilled_bytes"]]


def test_gpus_too_old_for_the_kernels_get_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such GPU is needed: the test sets the capability that torch reports."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for capability, wanted in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        _triton_runs.cache_clear()
        assert _triton_runs(torch.device("cuda", 0)) is wanted
    _triton_runs.cache_clear()
