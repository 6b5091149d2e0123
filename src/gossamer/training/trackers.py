"""A run as TensorBoard, Weights & Biases or trackio show it, through transformers' own callbacks.

What is sent after each step: all that stands in ``training.jsonl``, the violation, and the open fraction of each layer.
TensorBoard's files are in RUN/tensorboard; Weights & Biases' in RUN/wandb unless ``WANDB_DIR`` says otherwise.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from gossamer.errors import GossamerError
from gossamer.training.sparsity import SparsityTrainer

WATCHERS = ("tensorboard", "wandb", "trackio")


def check_trackers(names: Sequence[str]) -> None:
    """Stop before a run begins at a watcher that is unknown or not installed.

    Raises:
        GossamerError: naming it.
    """
    for name in names:
        if name not in WATCHERS:
            raise GossamerError(f"--report-to {name} is unknown; there are {', '.join(WATCHERS)}")
        if find_spec(name) is None:
            raise GossamerError(f"--report-to {name} needs the package {name}: pip install {name}")


def add_trackers(trainer: SparsityTrainer, names: Sequence[str], folder: Path, first_step: int) -> None:
    """Send what each step of ``trainer`` measures to the watchers named.

    Args:
        trainer: before its training.
        names: of :data:`WATCHERS`.
        folder: of the run.
        first_step: what TensorBoard's files say of it and later steps is void: a resumed run repeats them.
    """
    if not names:
        return
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("WANDB_PROJECT", "gossamer")
    for name in names:
        if name != "tensorboard":
            for kind in get_reporting_integration_callbacks([name]):
                trainer.add_callback(kind)
        elif trainer.is_world_process_zero():
            from torch.utils.tensorboard import SummaryWriter

            # Its own choice is a folder beside the checkpoints, which goes with them.
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
            trainer.add_callback(TensorBoardCallback(writer))
    trainer.add_callback(_Send(trainer, finish_wandb="wandb" in names))


class _Send(TrainerCallback):
    def __init__(self, trainer: SparsityTrainer, *, finish_wandb: bool) -> None:
        self.trainer, self.finish_wandb = trainer, finish_wandb

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self.trainer
        metrics = dict(trainer.last)
        if trainer.lr_scheduler is not None:
            metrics["learning_rate"] = float(trainer.lr_scheduler.get_last_lr()[0])
        if trainer.validation_result is not None:
            metrics["violation"] = trainer.validation_result.constrained - trainer.bound
        if trainer.open_by_layer is not None:
            for layer, fraction in enumerate(trainer.open_by_layer.tolist()):
                metrics[f"open_fraction/layer_{layer:02d}"] = fraction
        # Not trainer.log(): that keeps every metric of every step in each checkpoint too.
        trainer.callback_handler.on_log(args, state, control, metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the run that transformers leaves open for whatever the process trains next."""
        if self.finish_wandb and state.is_world_process_zero:
            import wandb

            wandb.finish()
