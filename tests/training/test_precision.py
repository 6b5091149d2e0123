"""The precision that a run chooses automatically."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gossamer.errors import GossamerError
from gossamer.runs import job
from gossamer.runs.job import post_train
from gossamer.runs.settings import RunConfig
from gossamer.training.precision import fast_precision
from gossamer.training.settings import TrainingConfig


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="reads x86 flags")
def test_a_processor_has_what_the_kernel_says_it_has() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert (fast_precision(torch.device("cpu")) == "bf16") == bool(flags & {"avx512_bf16", "amx_bf16"})


@pytest.mark.parametrize("fast", ["bf16", "fp32"])
def test_a_run_is_resumed_in_the_precision_that_it_was_begun_in(
    fast: str, saved_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "fast_precision", lambda device: fast)
    training = TrainingConfig(batch_size=2, checkpoint_every=0)
    config = RunConfig(
        str(saved_llama), str(text), tokens=32, seq_len=16, validation_tokens=32, held_out_tokens=32, control=False,
        training=training,
    )  # fmt: skip
    assert config.training.precision == "auto"
    run = post_train(config, tmp_path / "run")
    assert run.config().training.precision == fast
    slow = "fp32" if fast == "bf16" else "bf16"
    monkeypatch.setattr(job, "fast_precision", lambda device: slow)
    post_train(config, tmp_path / "run", resume=True)
    with pytest.raises(GossamerError, match=f"begun with precision='{fast}'"):
        post_train(replace(config, training=replace(training, precision=slow)), tmp_path / "run", resume=True)
