"""Send a run's metrics to TensorBoard, Weights & Biases or trackio, through transformers' callbacks.

Each step sends its measurements and learning rate, the violation, and the open fraction of each layer. TensorBoard's
files are in RUN/tensorboard, those of Weights & Biases in RUN/wandb unless ``WANDB_DIR`` is set.
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
    """Raise if a tracker is unknown or not installed, before the run starts.

    Raises:
        GossamerError: naming the tracker.
    """
    for name in names:
        if name not in WATCHERS:
            raise GossamerError(f"--report-to {name} is unknown; there are {', '.join(WATCHERS)}")
        if find_spec(name) is None:
            raise GossamerError(f"--report-to {name} needs the package {name}: pip install {name}")


def add_trackers(trainer: SparsityTrainer, names: Sequence[str], folder: Path, first_step: int) -> None:
    """Send the measurements of each step of ``trainer`` to some trackers.

    Args:
        trainer: the trainer, before its training.
        names: names from :data:`WATCHERS`.
        folder: directory of the run.
        first_step: TensorBoard discards what its files contain from this step on, since a resumed run repeats it.
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

            # The default directory is beside the checkpoints and would be removed with them.
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
        # Not trainer.log(), which would store every metric of every step in each checkpoint.
        trainer.callback_handler.on_log(args, state, control, metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Finish the wandb run, which transformers leaves open."""
        if self.finish_wandb and state.is_world_process_zero:
            import wandb

            wandb.finish()
