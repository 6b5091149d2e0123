"""The directory of a run: its files, and the models in it.

RUN/config.json        the full configuration, versions, what was measured before training
RUN/blocks.safetensors the token blocks, train and held-out
RUN/training.jsonl     one line per step; control.jsonl is the same for the dense control
RUN/checkpoints/       checkpoints of the sparse model in training; control-checkpoints/ has those of the control
RUN/model/             the sparse model
RUN/adapter/           for a run with LoRA: its adapters and gates without the dense model, a few megabytes
RUN/dense/             the dense model, if the run itself trained it (gossamer demo)
RUN/control/           the dense control: the dense model fine-tuned on the same text for the same steps
RUN/tensorboard/       logs for TensorBoard, if requested; wandb/ has those for Weights & Biases
RUN/metrics.json       the metrics, written by gossamer.evaluation
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError
from gossamer.files import file_checksum, remove_staging, remove_staging_in
from gossamer.inputs import read_tensors, reading
from gossamer.locks import locked
from gossamer.models.checkpoint import load
from gossamer.models.fingerprint import weights_fingerprint
from gossamer.models.pretrained import load_dense, load_whole
from gossamer.runs.read import AGAIN, read_metrics, read_run_record
from gossamer.runs.settings import RunConfig
from gossamer.training.data_sets import at_commit, check_commit
from gossamer.training.documents import text_fingerprint


@dataclass(frozen=True)
class Run:
    """The directory of a run.

    Raises:
        GossamerError: when a required file is missing or damaged.
    """

    folder: Path

    @property
    def model(self) -> Path:
        """The saved sparse model."""
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        """The saved adapters and gates of a run with LoRA."""
        return self.folder / "adapter"

    @property
    def dense(self) -> str:
        """The name or directory of the dense original, for :func:`gossamer.models.pretrained.load_dense`."""
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
        """The file of metrics."""
        return self.folder / "metrics.json"

    def record(self) -> dict[str, Any]:
        """Read ``config.json``: ``config``, ``constraint``, ``versions``, ``measured``, ``fingerprints``."""
        return read_run_record(self.folder)

    def read_metrics(self) -> dict[str, Any]:
        """Read ``metrics.json``; empty if the run has not been evaluated."""
        return read_metrics(self.metrics) if self.metrics.exists() else {}

    def load_dense(self, device: str | torch.device | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the dense original and its tokenizer, by default on the GPU if there is one.

        Raises:
            GossamerError: if the model no longer exists, or if another one has taken its place.
        """
        model, tokenizer = load_dense(self.dense)
        self.check_dense(model)
        return model.to(device or run_device()), tokenizer

    def check_dense(self, model: PreTrainedModel) -> None:
        """Raise if a model is not the one that the run was started with.

        Raises:
            GossamerError: naming the model.
        """
        known = self._fingerprint("model")
        if known is not None and weights_fingerprint(model) != known:
            raise GossamerError(
                f"{self.dense} has other weights than when {self.folder} was begun; put the model back that it was "
                "begun with, or begin anew with another --out"
            )

    @property
    def text(self) -> str:
        """The text, for reading it again; a Hub data set is pinned to the commit that the run was started with."""
        return at_commit(self.config().text, self._fingerprint("commit"))

    def check_text(self) -> None:
        """Raise if the text is not the one that the run was started with.

        Local files are checked. A Hub data set must still have the recorded commit; it is not checked if no commit was
        recorded when the run was started.

        Raises:
            GossamerError: naming the text.
        """
        text, known = self.config().text, self._fingerprint("text")
        if (commit := self._fingerprint("commit")) is not None:
            check_commit(text, commit)
        if known is not None and text_fingerprint(text) != known:
            raise GossamerError(
                f"{text} holds another text than when {self.folder} was begun; put the text back that it was begun "
                "with, or begin anew with another --out"
            )

    def _fingerprint(self, of: str) -> str | None:
        """Get a recorded fingerprint; None if there is none, as in records of earlier versions."""
        found = self.record().get("fingerprints", {}).get(of)
        return None if found is None else str(found)

    def config(self) -> RunConfig:
        """Read the configuration that the run was started with."""
        return RunConfig.from_dict(self.record()["config"], source=str(self.folder / "config.json"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run against other processes within the block; first remove what a killed process left half-written.

        Raises:
            GossamerError: if another process holds the lock.
        """
        with locked(self.folder):
            remove_staging(self.folder)
            for folder in (self.folder, self.folder / "circuits"):
                remove_staging_in(folder)
            yield

    def blocks(self, part: Literal["train", "validation", "held_out"]) -> Int[Tensor, "blocks tokens"]:
        """Read the token blocks of one part of the run's text."""
        file = self.folder / "blocks.safetensors"
        if not file.exists():
            raise GossamerError(f"{self.folder} is not a run: it has no blocks.safetensors")
        shape = (None, self.config().seq_len)
        blocks = read_tensors(file, dict.fromkeys(("train", "validation", "held_out"), shape), remedy=AGAIN)
        found, known = blocks[part], self._fingerprint("blocks")
        if known is not None and f"{file_checksum(file):08x}" != known:
            raise GossamerError(f"{file} has changed since it was written; {AGAIN}")
        with reading(file, AGAIN):
            if found.is_floating_point() or (found.numel() and found.min() < 0):
                raise ValueError(f"{part} holds numbers that are no tokens")
        return found.long()


def versions() -> dict[str, str]:
    """Get the versions of the packages, of Python and of the platform that a run depends on."""
    packages = {name: version(name) for name in ("gossamer", "torch", "transformers", "accelerate")}
    return {**packages, "python": platform.python_version(), "platform": platform.platform()}


def run_device() -> torch.device:
    """Get the device for a run's models: the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_control(run: Run, device: str | torch.device | None = None) -> PreTrainedModel:
    """Load the dense control of a run that has one, by default on the GPU if there is one."""
    control = load_whole(str(run.control), name=str(run.control))
    return control.to(device or run_device()).eval()


def load_sparse(run: Run) -> PreTrainedModel:
    """Load the sparse model of a finished run."""
    if not run.model.exists():
        raise GossamerError(f"{run.folder} has no sparse model yet; finish it with gossamer sparsify ... --resume")
    return load(run.model, device=run_device())


def load_both(run: Run) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the dense and the sparse model of a finished run on one device, and their tokenizer."""
    sparse = load_sparse(run)
    dense, tokenizer = run.load_dense(sparse.device)
    return dense, sparse, tokenizer
