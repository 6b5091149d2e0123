"""The directory of a run: its files, and the models in it.

RUN/config.json        the full configuration, versions, what was measured before training
RUN/blocks.safetensors the token blocks, train and held-out
RUN/training.jsonl     one line a step; control.jsonl likewise for the dense control
RUN/checkpoints/       of the run in progress; control-checkpoints/ likewise
RUN/model/             the sparse model
RUN/adapter/           of a run with LoRA: its adapters and gates without the dense model, a few megabytes
RUN/dense/             the dense model, where the run itself trained it (gossamer demo)
RUN/control/           the dense control: the dense model fine-tuned on the same text for the same steps
RUN/tensorboard/       what TensorBoard shows, if asked for; wandb/ likewise
RUN/metrics.json       the metrics, written by gossamer.evaluation
"""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError
from gossamer.files import remove_staging
from gossamer.models.checkpoint import load
from gossamer.models.pretrained import load_dense
from gossamer.runs.settings import RunConfig
from gossamer.runs.upgrade import upgraded_record


@dataclass(frozen=True)
class Run:
    """The directory of a run.

    Raises:
        GossamerError: when something is asked of it that is not there.
    """

    folder: Path

    @property
    def model(self) -> Path:
        """The saved sparse model."""
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        """Adapters and gates of a run with LoRA."""
        return self.folder / "adapter"

    @property
    def dense(self) -> str:
        """What :func:`gossamer.models.pretrained.load_dense` takes for the dense original."""
        own = self.folder / "dense"
        return str(own) if own.exists() else self.config().model

    @property
    def control(self) -> Path:
        """The saved dense control."""
        return self.folder / "control"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the sparse model in training."""
        return self.folder / "checkpoints"

    @property
    def control_checkpoints(self) -> Path:
        """Checkpoints of the dense control in training."""
        return self.folder / "control-checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics."""
        return self.folder / "metrics.json"

    def record(self) -> dict[str, Any]:
        """The contents of ``config.json``: ``config``, ``constraint``, ``versions``, ``measured``."""
        try:
            return upgraded_record(json.loads((self.folder / "config.json").read_text()))
        except OSError as error:
            raise GossamerError(f"{self.folder} is not a run: it has no readable config.json") from error
        except ValueError as error:
            raise GossamerError(f"{self.folder / 'config.json'} is not valid JSON: {error}") from error

    def config(self) -> RunConfig:
        """The configuration the run was started with."""
        record = self.record()
        if "config" not in record:
            raise GossamerError(f"{self.folder} is not a run: its config.json is of another kind")
        return RunConfig.from_dict(record["config"], source=str(self.folder / "config.json"))

    def remove_staging(self) -> None:
        """Remove what a killed process left while it wrote the directory or a model in it."""
        for target in (self.folder, self.model, self.adapter, self.control, self.checkpoints, self.control_checkpoints):
            remove_staging(target)

    def blocks(self, part: Literal["train", "validation", "held_out"]) -> Int[Tensor, "blocks tokens"]:
        """The token blocks of one part of the run's text."""
        file = self.folder / "blocks.safetensors"
        if not file.exists():
            raise GossamerError(f"{self.folder} is not a run: it has no blocks.safetensors")
        return load_file(file)[part].long()


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    packages = {name: version(name) for name in ("gossamer", "torch", "transformers", "accelerate")}
    return {**packages, "python": platform.python_version(), "platform": platform.platform()}


def run_device() -> torch.device:
    """Where models of a run are put: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_control(run: Run, device: str | torch.device | None = None) -> PreTrainedModel:
    """The dense control of a run that has one; on the GPU, if there is one and nothing else is said."""
    control: PreTrainedModel = AutoModelForCausalLM.from_pretrained(run.control)
    return control.to(device or run_device()).eval()


def load_sparse(run: Run) -> PreTrainedModel:
    """The sparse model of a finished run."""
    if not run.model.exists():
        raise GossamerError(f"{run.folder} has no sparse model yet; finish it with gossamer sparsify ... --resume")
    return load(run.model, device=run_device())


def load_both(run: Run) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense and the sparse model of a finished run, on one device, and their tokenizer."""
    original = run.dense
    sparse = load_sparse(run)
    dense, tokenizer = load_dense(original, device=sparse.device)
    return dense, sparse, tokenizer
