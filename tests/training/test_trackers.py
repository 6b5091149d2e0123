"""Values sent to TensorBoard and Weights & Biases, read back from the files that these wrote."""

import importlib.util
import json
from pathlib import Path

import pytest

from gossamer import GossamerError
from gossamer.runs.job import post_train
from gossamer.runs.settings import RunConfig
from gossamer.training.settings import TrainingConfig
from gossamer.training.trackers import check_trackers

STEPS = 6


def short_run(model: Path, text: Path) -> RunConfig:
    training = TrainingConfig(precision="fp32", batch_size=2, validations=2, checkpoint_every=0)
    return RunConfig(str(model), str(text), tokens=STEPS * 32, seq_len=16, validation_tokens=32, held_out_tokens=32,
                     control=False, training=training)  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_every_step_and_layer(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = post_train(short_run(saved_llama, text), tmp_path / "run", report_to=["tensorboard"])
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (run.folder / "training.jsonl").read_text().splitlines()]

    def shown(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(f"train/{tag}")}

    for key in ("constrained", "open_fraction", "expected_open_fraction", "multiplier", "learning_rate"):
        assert shown(key) == pytest.approx({line["step"]: line[key] for line in lines}, rel=1e-6)
    layers = [shown(f"open_fraction/layer_{layer:02d}") for layer in range(3)]
    for line in lines:
        mean = sum(layer[line["step"]] for layer in layers) / 3  # each layer has as many allowed links
        assert mean == pytest.approx(line["open_fraction"], rel=1e-5)
    bound = run.record()["constraint"]["bound"]
    wanted = {line["step"]: line["constrained_held_out"] - bound for line in lines if "constrained_held_out" in line}
    assert len(wanted) == STEPS - 2  # from the first measurement on, which is after step 3
    assert shown("violation") == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_writes_offline(saved_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "run"))
    run = post_train(short_run(saved_llama, text), tmp_path / "run", report_to=["wandb"])
    (record,) = (run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for name in (b"train/violation", b"train/multiplier", b"train/open_fraction/layer_02"):
        assert name in content


def test_watchers_that_are_not_there_are_named() -> None:
    with pytest.raises(GossamerError, match="--report-to tensorbord is unknown; there are tensorboard, wandb, trackio"):
        check_trackers(["tensorbord"])
