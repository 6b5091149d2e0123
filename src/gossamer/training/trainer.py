"""Fine-tuning with transformers' Trainer: settings, atomic checkpoints, and the dense control.

The learning rates rise over the first ``warmup`` of the steps, stay constant, and fall to 0 over the last ``decay``.
Those of the gate biases fall only in the last third of that, so that the gates can respond while the weights settle.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate.utils import AutocastKwargs, gather_object
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from gossamer.errors import GossamerError, why_not_written
from gossamer.files import flush_entry
from gossamer.measures.losses import cross_entropy
from gossamer.models.architectures import attention_modules
from gossamer.models.checkpoint import read_weights, write_model
from gossamer.models.convert import is_gated
from gossamer.training.checkpoints import checkpoints, write_checksums
from gossamer.training.constraints import CrossEntropy
from gossamer.training.distributed import check_processes, collective_error, synchronized
from gossamer.training.pace import GATE_BETAS
from gossamer.training.precision import fast_precision
from gossamer.training.settings import TrainedPart, TrainingConfig
from gossamer.training.stream import BlockStream

GATE_RATE, GATE_RATE_STEPS = 0.15, 60
"""Learning rate of the gate biases in runs of at most this many steps."""


@contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    """Context manager without dropout in ``train()`` mode; the constraint refers to the dense model's eval loss."""
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name in ("p",) if isinstance(module, nn.Dropout) else ("attention_dropout", "dropout"):
            if isinstance(value := getattr(module, name, None), float):
                before.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def freeze_except(model: PreTrainedModel, part: TrainedPart) -> None:
    """Require gradients only for the chosen part: everything, or the attention modules; always for the gates."""
    model.requires_grad_(part == "all")
    for module in attention_modules(model):
        module.requires_grad_(True)


def _arguments(
    config: TrainingConfig, steps: int, folder: Path, blocks: Dataset[dict[str, Tensor]]
) -> TrainingArguments:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = fast_precision(device) if config.precision == "auto" else config.precision
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        bf16=precision == "bf16",
        use_cpu=device.type == "cpu",
        save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or 500,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
        data_seed=config.seed,
        ddp_find_unused_parameters=False,
        ignore_data_skip=isinstance(blocks, BlockStream),
    )


def rate_share(step: int, *, steps: int, warmup: float, decay: float) -> float:
    """The learning rate of a step as a share of the highest one.

    Args:
        step: index of the step, from 0.
        steps: number of steps of the whole run.
        warmup, decay: shares of the steps over which the rate rises from 0 and falls to 0.
    """
    rising, falling = max(1, round(warmup * steps)), max(1, round(decay * steps))
    return max(0.0, min(1.0, (step + 1) / rising, (steps - step) / falling))


class PostTrainer(Trainer):
    """transformers' Trainer with atomic checkpoints and separate learning rates for the gates.

    This class fine-tunes on the cross-entropy, as the dense control needs it.
    :class:`gossamer.training.sparsity.SparsityTrainer` adds the gates and the constraint.

    Args:
        model: the model to train.
        config: training settings.
        blocks: training blocks.
        folder: directory of the checkpoints.
        steps: number of optimiser steps.
        tokenizer: saved with each checkpoint of a gated model.
        callbacks: callbacks for transformers' Trainer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainingConfig,
        blocks: Dataset[dict[str, Tensor]],
        folder: Path,
        *,
        steps: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_processes(config.processes)
        self.config, self.steps = config, steps
        self.folder = folder
        self.tokenizer = tokenizer
        self.staging: Path | None = None
        self.stream = blocks if isinstance(blocks, BlockStream) else None
        arguments = _arguments(config, steps, folder, blocks)
        # Without a launcher, Trainer would split a batch over threads, one per GPU, that share the gate state.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        if config.gradient_checkpointing:
            # Reentrant checkpointing has no gradient for the expected links, which leave a layer beside its output.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        super().__init__(model=model, args=arguments, train_dataset=blocks, callbacks=callbacks)
        if self.is_fsdp_enabled:
            # FSDP's mixed precision would round the gate biases to bfloat16 too; see autocast_smart_context_manager.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # makes Trainer divide the loss by the accumulation steps
        self.measured: list[dict[str, float]] = []
        self.last: dict[str, float] = {}
        # Before the other callbacks, so that they see the step's measurements.
        self.callback_handler.callbacks.insert(0, _StepEnd(self))

    @property
    def gate_learning_rate(self) -> float:
        """Learning rate of the gate biases between warm-up and decay."""
        own = self.config.gate_learning_rate
        return own if own is not None else GATE_RATE * math.sqrt(GATE_RATE_STEPS / max(self.steps, GATE_RATE_STEPS))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW without weight decay, with the gate biases in a separate group."""
        if getattr(self, "optimizer", None) is None:
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            gates = [p for n, p in named if n.endswith("gate_bias")]
            weights = [p for n, p in named if not n.endswith("gate_bias")]
            groups = [{"params": weights, "lr": self.config.learning_rate}]
            if gates:
                groups.append({"params": gates, "lr": self.gate_learning_rate})
                if self.config.closing_rate is not None:
                    groups[-1]["betas"] = GATE_BETAS
            fused = True if self.config.fused_optimizer else None
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
        return cast(torch.optim.Optimizer, self.optimizer)

    @property
    def label(self) -> str:
        """Short name of the quantity ``constrained``."""
        return CrossEntropy.label

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """Create the learning rate schedules of weights and gate biases."""
        if getattr(self, "lr_scheduler", None) is None:
            optimizer = optimizer or self.optimizer
            decays = [self.config.decay, self.config.decay / 3][: len(optimizer.param_groups)]
            shares: list[Callable[[int], float]] = [
                partial(rate_share, steps=self.steps, warmup=self.config.warmup, decay=own) for own in decays
            ]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def batch_objective(
        self, model: nn.Module, input_ids: Int[Tensor, "batch tokens"]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the objective on a batch; also return what was measured."""
        logits = model(input_ids=input_ids, use_cache=False).logits
        loss = cross_entropy(logits, input_ids, self.config.prompt_tokens)
        return loss, {"constrained": loss.item()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute the objective of a batch; stop the run if it is not finite, before the weights change."""
        loss, measured = self.batch_objective(model, self.tokens(inputs))
        value, *values = self.mean_over_processes([loss.item(), *measured.values()])
        if not math.isfinite(value):
            self._stop_diverged(value)
        self.measured.append(dict(zip(measured, values, strict=True)))
        return loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches; a stream distributes its blocks to processes and workers itself."""
        if self.stream is None:
            return cast(DataLoader[Any], super().get_train_dataloader())
        return self.stream.loader(self.config.batch_size)

    def tokens(self, inputs: dict[str, Any]) -> Int[Tensor, "batch tokens"]:
        """The tokens of a batch; if it comes from a stream, the batch is recorded as trained on.

        Raises:
            GossamerError: in all processes, if one of them cannot read the text any further.
        """
        if self.stream is not None:
            with synchronized():
                if "fault" in inputs:
                    raise GossamerError(inputs["fault"])
            self.stream.passed(inputs["place"])
        return cast(Tensor, inputs["input_ids"])

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[None]:
        """Autocast under FSDP too, where accelerate does not wrap the model; there, casts of weights are not cached."""
        if self.is_fsdp_enabled:
            return cast(AbstractContextManager[None], self.accelerator.autocast(AutocastKwargs(cache_enabled=False)))
        return cast(AbstractContextManager[None], super().autocast_smart_context_manager(cache_enabled))

    def mean_over_processes(self, values: Sequence[float]) -> list[float]:
        """Compute the mean of each value over the processes, bit-identical in all of them."""
        here = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return cast(list[float], self.accelerator.reduce(here, "mean").tolist())

    def _stop_diverged(self, loss: float) -> NoReturn:
        # A checkpoint of this step contains the weights that produced this loss.
        if self.args.should_save:
            shutil.rmtree(self.folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
        good = checkpoints(self.folder)
        raise collective_error(
            f"the loss became {loss} in step {self.state.global_step + 1} and the run stopped there; last good "
            f"checkpoint: {good[-1] if good else 'none'}. Begin anew with a lower learning_rate"
        )

    def finish_step(self) -> None:
        """Store the means over the forward passes of the last optimiser step in ``last``."""
        rows, self.measured = self.measured, []
        self.last = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.staging) if self.staging is not None else str(self.folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        if is_gated(self.model):
            write_model(self.model, folder, self.tokenizer, state_dict)
        else:
            self.model.save_pretrained(folder, state_dict=state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write the checkpoint with checksums to a temporary directory, then rename it."""
        name = f"checkpoint-{self.state.global_step}"
        self.staging = self.folder / f".{name}.partial"
        writes = self.args.should_save
        try:
            with synchronized(), self._faults_named(name):
                if writes:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(self.staging, ignore_errors=True)
            with synchronized(), self._faults_named(name):
                super()._save_checkpoint(model, trial)
            places = None if self.stream is None else gather_object([self.stream.state_dict()])
            with synchronized(), self._faults_named(name):
                if writes:
                    written = self.staging / name
                    self.write_extra_state(written)
                    if places is not None:
                        (written / _STREAM).write_text(json.dumps(places))
                    write_checksums(written)
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                    os.rename(written, self.folder / name)
                    flush_entry(self.folder / name)
        finally:
            if writes:
                shutil.rmtree(self.staging, ignore_errors=True)
            self.staging = None
        if writes:
            for old in self.superfluous_checkpoints():
                shutil.rmtree(old)

    @contextmanager
    def _faults_named(self, checkpoint: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            raise GossamerError(
                f"cannot write {self.folder / checkpoint}: {why_not_written(error)}; "
                "the checkpoints before it are untouched"
            ) from error

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Gather all weights in the first process; None if they are not sharded. All processes must call it."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        return cast(dict[str, Tensor], self.accelerator.get_state_dict(self.model_wrapped))

    def reshard(self) -> None:
        """Shard all weights again; FSDP2 leaves the root unsharded after a forward pass, and changes to it are lost."""
        for module in self.model_wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def superfluous_checkpoints(self) -> list[Path]:
        """List the checkpoints that need not be kept: all but the last two."""
        return checkpoints(self.folder)[:-2]

    def write_extra_state(self, folder: Path) -> None:
        """Write the state that a subclass has besides weights, optimiser and schedule."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.stream is not None:
            places = json.loads((Path(checkpoint) / _STREAM).read_text())
            self.stream.load_state_dict(places[self.args.process_index])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint)
        elif is_gated(self.model) and not self.is_fsdp_enabled:
            self.model.load_state_dict(read_weights(Path(resume_from_checkpoint)), strict=False)
        else:
            self.reshard()
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _StepEnd(TrainerCallback):
    def __init__(self, trainer: PostTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.finish_step()


_STREAM = "stream.json"
