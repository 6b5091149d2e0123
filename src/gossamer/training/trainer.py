"""Post-training under the constraint, on transformers' Trainer.

Each step minimises the Lagrangian of :mod:`gossamer.training.multiplier` on a batch, with sampled gates at first
and, in the last part of a run (``hard_fraction``), with the hard gates of evaluation.

The multiplier does not follow the training batches: what it has to hold is the loss on unseen text with hard gates,
and a batch's loss says more about the batch than about the model. So every ``validate_every`` steps the constrained
quantity is measured with hard gates on a fixed set of validation blocks, the same on which the dense model was; the
violation found there moves lambda until the next measurement. Figures are reported on yet other blocks.

The last step need not hold the bound. A run therefore ends with the sparsest of its last weights and its checkpoints
that held the bound on the validation blocks; such a checkpoint is kept until there is a sparser one.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import torch
from accelerate.utils import AutocastKwargs, gather_object
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
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

from gossamer.errors import GossamerError
from gossamer.fields import documented, setting
from gossamer.measures.language import forward_passes
from gossamer.measures.losses import cross_entropy
from gossamer.models.architectures import attention_modules
from gossamer.models.attention import counted_links, sampled_gates
from gossamer.models.checkpoint import read_weights, write_model
from gossamer.models.convert import is_gated
from gossamer.models.lora import as_dense
from gossamer.ops import fold_seed
from gossamer.training.checkpoints import checkpoints, fault, seal
from gossamer.training.constraints import Constraint, CrossEntropy
from gossamer.training.multiplier import Multiplier, MultiplierConfig, ObjectiveKind, lagrangian
from gossamer.training.processes import by_first, check_processes, stopped_together, together
from gossamer.training.stream import BlockStream

TrainedPart = Literal["all", "attention", "lora"]
Precision = Literal["fp32", "bf16"]


@documented
@dataclass(frozen=True)
class TrainingConfig:
    """How to post-train; the defaults were found by the trials in ``docs/LOG.md``."""

    train: TrainedPart = setting(
        "Weights to train besides the gate biases: all, the attention's, or adapters (lora).", "all"
    )
    batch_size: int = setting("Blocks in one forward pass of one process.", 4, least=1)
    gradient_accumulation: int = setting("Forward passes of each process in one step.", 1, least=1)
    processes: int = setting(
        "How many train together, each on its own part of a step's batch; what started them says it.",
        1,
        least=1,
        recorded=True,
    )
    gradient_checkpointing: bool = setting(
        "Keep only what goes into each layer for the backward pass and compute the rest again: less memory for a "
        "quarter to a third more time.",
        False,
    )
    learning_rate: float = setting("Of the weights, after warm-up; falls along a cosine.", 3e-4, least=0.0, most=1e30)
    gate_learning_rate: float = setting("Of the gate biases, on the same schedule.", 0.2, least=0.0, most=1e30)
    warmup: float = setting("Share of the steps over which the rates rise from 0.", 0.03, least=0.0, most=1.0)
    final_rate: float = setting("Last learning rate as a share of the first.", 0.05, least=0.0, most=1.0)
    hard_fraction: float = setting(
        "Share of the steps, at the end, trained with hard gates instead of sampled ones.", 0.8, least=0.0, most=1.0
    )
    max_grad_norm: float = setting("The gradient's norm is clipped to it.", 1.0, least=0.0)
    fused_optimizer: bool = setting(
        "AdamW in one pass over memory: a sixth of the time on a CPU. It rounds otherwise than in many.", True
    )
    constraint: Constraint = setting("What is bounded.", default_factory=CrossEntropy)
    objective: ObjectiveKind = setting(
        "What is minimised: the expected open fraction, or its log; then start lambda near 10.", "fraction"
    )
    multiplier: MultiplierConfig = setting("How lambda moves.", default_factory=MultiplierConfig, prefix="multiplier_")
    validate_every: int = setting(
        "Steps between measurements of the violation, which move lambda; fewer for tight bounds.", 20, least=1
    )
    prompt_tokens: int = setting(
        "Tokens at the start of every block that are given: the loss does not ask for them.", 0, least=0
    )
    precision: Precision = setting("Of the matrix products; weights and optimiser state stay float32.", "bf16")
    checkpoint_every: int = setting("Steps between checkpoints; 0: none.", 100, least=0)
    seed: int = setting("Of data order, noise and everything else random.", 0)

    @property
    def blocks_per_step(self) -> int:
        """Blocks in one optimiser step, over its forward passes and all processes."""
        return self.batch_size * self.gradient_accumulation * self.processes


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within it, no dropout acts in ``train()`` mode: the constraint compares with the dense model's eval loss."""
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


def choose_trained(model: PreTrainedModel, part: TrainedPart) -> None:
    """Let gradients flow to the chosen part only: everything, or the attention modules, and always the gates."""
    model.requires_grad_(part == "all")
    for module in attention_modules(model):
        module.requires_grad_(True)


def _arguments(
    config: TrainingConfig, steps: int, folder: Path, blocks: Dataset[dict[str, Tensor]]
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.final_rate},
        warmup_steps=max(1, round(config.warmup * steps)),
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
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


class PostTrainer(Trainer):
    """transformers' Trainer with checkpoints that appear whole or not at all, and separate rates for the gates.

    As it stands it fine-tunes on the cross-entropy: the dense control. :class:`SparsityTrainer` adds gates
    and constraint.

    Args:
        model: what to train.
        config: how.
        blocks: what to train on.
        folder: of the checkpoints.
        steps: optimiser steps.
        tokenizer: saved with each checkpoint.
        callbacks: transformers' own.
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
        # Without a launcher Trainer would spread a batch over threads, one a GPU, which share the state of the gates.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        if config.gradient_checkpointing:
            # The reentrant kind has no gradient for what leaves a layer beside its output: the expected links.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        super().__init__(model=model, args=arguments, train_dataset=blocks, callbacks=callbacks)
        if self.is_fsdp_enabled:
            # FSDP's own would round the gate biases to bfloat16 too; see autocast_smart_context_manager.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # so that Trainer divides the loss by the accumulation steps
        self.measured: list[dict[str, float]] = []
        self.last: dict[str, float] = {}
        # Ahead of the other callbacks, so that they see the measurements of the step.
        self.callback_handler.callbacks.insert(0, _StepEnd(self))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW without weight decay; the gate biases in a group of their own."""
        if getattr(self, "optimizer", None) is None:
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            gates = [p for n, p in named if n.endswith("gate_bias")]
            weights = [p for n, p in named if not n.endswith("gate_bias")]
            groups = [{"params": weights, "lr": self.config.learning_rate}]
            if gates:
                groups.append({"params": gates, "lr": self.config.gate_learning_rate})
            fused = True if self.config.fused_optimizer else None
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
        return cast(torch.optim.Optimizer, self.optimizer)

    @property
    def label(self) -> str:
        """What ``constrained`` is, in a word or two."""
        return CrossEntropy.label

    def batch_objective(
        self, model: nn.Module, input_ids: Int[Tensor, "batch tokens"]
    ) -> tuple[Tensor, dict[str, float]]:
        """What to minimise on a batch, and what was measured on the way."""
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
        """The objective of a batch; stops the run when it is not finite, before the weights are touched."""
        loss, measured = self.batch_objective(model, self.tokens(inputs))
        value, *figures = self.mean_over_processes([loss.item(), *measured.values()])
        if not math.isfinite(value):
            self._stop_diverged(value)
        self.measured.append(dict(zip(measured, figures, strict=True)))
        return loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches; a stream deals its own out to processes and workers."""
        if self.stream is None:
            return cast(DataLoader[Any], super().get_train_dataloader())
        return self.stream.loader(self.config.batch_size)

    def tokens(self, inputs: dict[str, Any]) -> Int[Tensor, "batch tokens"]:
        """The tokens of a batch; of a stream, the batch is noted as trained on.

        Raises:
            GossamerError: on all processes, where the text cannot be read any further on one of them.
        """
        if self.stream is not None:
            with together():
                if "fault" in inputs:
                    raise GossamerError(inputs["fault"])
            self.stream.passed(inputs["place"])
        return cast(Tensor, inputs["input_ids"])

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[None]:
        """Autocast where accelerate does not wrap the model in it itself; casts of whole weights are not kept."""
        if self.is_fsdp_enabled:
            return cast(AbstractContextManager[None], self.accelerator.autocast(AutocastKwargs(cache_enabled=False)))
        return cast(AbstractContextManager[None], super().autocast_smart_context_manager(cache_enabled))

    def mean_over_processes(self, figures: Sequence[float]) -> list[float]:
        """The mean of each figure over the processes, the same bits on all of them."""
        here = torch.tensor(figures, dtype=torch.float64, device=self.args.device)
        return cast(list[float], self.accelerator.reduce(here, "mean").tolist())

    def _stop_diverged(self, loss: float) -> NoReturn:
        # A checkpoint of this very step holds the weights that gave this loss.
        if self.args.should_save:
            shutil.rmtree(self.folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
        good = checkpoints(self.folder)
        raise stopped_together(
            f"the loss became {loss} in step {self.state.global_step + 1} and the run stopped there; last good "
            f"checkpoint: {good[-1] if good else 'none'}. Begin anew with a lower learning_rate"
        )

    def finish_step(self) -> None:
        """Leave the means over the forward passes of the last optimiser step in ``last``."""
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
        """Write the checkpoint beside its place, with the checksums of its files, and rename it there."""
        name = f"checkpoint-{self.state.global_step}"
        self.staging = self.folder / f".{name}.partial"
        writes = self.args.should_save
        try:
            with together(), self._faults_named(name):
                if writes:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(self.staging, ignore_errors=True)
            with together(), self._faults_named(name):
                super()._save_checkpoint(model, trial)
            places = None if self.stream is None else gather_object([self.stream.state_dict()])
            with together(), self._faults_named(name):
                if writes:
                    written = self.staging / name
                    self.write_extra_state(written)
                    if places is not None:
                        (written / _STREAM).write_text(json.dumps(places))
                    seal(written)
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                    os.rename(written, self.folder / name)
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
                f"cannot write {self.folder / checkpoint}: {_first_line(error)}; "
                "the checkpoints before it are untouched"
            ) from error

    def whole_weights(self) -> dict[str, Tensor] | None:
        """All weights in full, on the first process; None where each process has them all. All have to call it."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        return cast(dict[str, Tensor], self.accelerator.get_state_dict(self.model_wrapped))

    def superfluous_checkpoints(self) -> list[Path]:
        """Checkpoints that need not be kept: all but the last two."""
        return checkpoints(self.folder)[:-2]

    def write_extra_state(self, folder: Path) -> None:
        """Write what a subclass keeps besides weights, optimiser and schedule."""

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
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _StepEnd(TrainerCallback):
    def __init__(self, trainer: PostTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.finish_step()


@dataclass(frozen=True)
class Validation:
    """What was measured on the validation blocks with hard gates.

    Attributes:
        step: after which step.
        constrained: what the constraint measures, nats.
        open_fraction: open links / allowed links.
    """

    step: int
    constrained: float
    open_fraction: float


class SparsityTrainer(PostTrainer):
    """Minimises the expected open links of a gated model under the constraint.

    Args:
        model: the gated model.
        reference: the dense model it was made from, frozen, for a constraint that needs it; None where only gates and
            adapters are trained: the model holds the dense one itself.
        bound: what the constrained quantity may be at most, nats.
        validation: blocks on which it is measured.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel | None,
        bound: float,
        config: TrainingConfig,
        blocks: Dataset[dict[str, Tensor]],
        validation: Int[Tensor, "blocks tokens"],
        folder: Path,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, config, blocks, folder, **kwargs)
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        self.bound = bound
        self.validation = validation
        self.multiplier = Multiplier(config.multiplier)
        self.validation_result: Validation | None = None
        self.open_by_layer: Float[Tensor, " layers"] | None = None

    @property
    def label(self) -> str:
        """What the constraint measures, in a word or two."""
        return self.config.constraint.label

    @property
    def hard(self) -> bool:
        """Whether the step at hand trains with hard gates."""
        return self.state.global_step >= round((1 - self.config.hard_fraction) * self.steps)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward under the gates of the step: activations that are recomputed meet the same gates."""
        # The 0 has no meaning; without it, the runs of docs/runs.md could not be repeated.
        seed = fold_seed(self.config.seed, self.state.global_step, 0)
        parts_before = len(self.measured) * self.config.processes + self.args.process_index
        first_row = parts_before * self.config.batch_size
        with nullcontext() if self.hard else sampled_gates(self.model, seed, first_row):
            return cast(Tensor, super().training_step(*args, **kwargs))

    def batch_objective(
        self, model: nn.Module, input_ids: Int[Tensor, "batch tokens"]
    ) -> tuple[Tensor, dict[str, float]]:
        """The Lagrangian on a batch."""
        with counted_links(self.model) as counts:
            logits = model(input_ids=input_ids, use_cache=False).logits
        allowed = torch.stack([count.allowed_links.sum() for count in counts.values()]).sum()
        expected = torch.stack([count.expected_open.sum() for count in counts.values()]).sum() / allowed
        opened_by_layer = torch.stack([count.open_links.sum() for count in counts.values()])
        self.open_by_layer = opened_by_layer / torch.stack([count.allowed_links.sum() for count in counts.values()])
        opened = opened_by_layer.sum() / allowed
        constrained = self.constrained_quantity(logits, input_ids)
        measured = {
            "constrained": constrained.item(),
            "expected_open_fraction": expected.item(),
            "open_fraction": opened.item(),
            "sampled": float(not self.hard),
        }
        violation = self.config.constraint.violation(constrained, self.bound)
        return lagrangian(expected, violation, self.multiplier.value, self.config.objective), measured

    def constrained_quantity(
        self, logits: Float[Tensor, "batch tokens vocab"], input_ids: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, ""]:
        """What the constraint measures on a batch: what may not exceed the bound."""
        constraint = self.config.constraint
        dense_logits = self._dense_logits(input_ids) if constraint.needs_dense else None
        return constraint.measure(logits, dense_logits, input_ids, self.config.prompt_tokens)

    @torch.no_grad()
    def _dense_logits(self, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocab"]:
        with as_dense(self.model) if self.reference is None else nullcontext(self.reference) as dense:
            return cast(Tensor, dense(input_ids=input_ids, use_cache=False).logits)

    def validate(self) -> Validation:
        """Measure the constrained quantity and the open fraction on the validation blocks, with hard gates."""
        batches = self.validation.split(2 * self.config.batch_size)
        # Each process takes as many turns: where weights are sharded, all take part in each other's forward passes.
        turns = range(self.args.process_index, self.config.processes * -(-len(batches) // self.config.processes),
                      self.config.processes)  # fmt: skip

        def measure(logits: Tensor, ids: Tensor) -> float:
            return self.constrained_quantity(logits, ids).item() * len(ids)

        with self.compute_loss_context_manager():
            found = forward_passes(self.model, [batches[turn % len(batches)] for turn in turns], measure)
        sums = torch.zeros(3, dtype=torch.float64)
        for turn, (constrained, links) in zip(turns, found, strict=True):
            if turn < len(batches):
                counted = constrained, int(links.open_links.sum()), int(links.allowed_links.sum())
                sums += torch.tensor(counted, dtype=torch.float64)
        constrained, opened, allowed = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        return Validation(self.state.global_step, constrained / len(self.validation), opened / allowed)

    def finish_step(self) -> None:
        """Take the dual step, with a new measurement of the violation if it is time for one."""
        super().finish_step()
        if self.open_by_layer is not None:
            self.open_by_layer = self.accelerator.reduce(self.open_by_layer, "mean")
        self.last["multiplier"] = self.multiplier.value
        step = self.state.global_step
        if step % self.config.validate_every == 0 or step == self.steps:
            self.validation_result = self.validate()
        if self.validation_result is not None:
            self.last["constrained_held_out"] = self.validation_result.constrained
            self.multiplier.dual_step(self.violation(self.validation_result))

    def violation(self, result: Validation) -> float:
        """How far weights that were measured so are over the bound, nats."""
        return self.config.constraint.violation(result.constrained, self.bound)

    def holds_bound(self, result: Validation | None) -> bool:
        """Whether weights that were measured so hold the bound."""
        return result is not None and self.violation(result) <= 0

    def best_checkpoint(self) -> tuple[Path, Validation] | None:
        """The sparsest whole checkpoint that was measured at its own step and held the bound."""
        held = []
        for path in checkpoints(self.folder):
            result = None if fault(path) else _read_state(path)[1]
            if result is not None and self.holds_bound(result) and path.name == f"checkpoint-{result.step}":
                held.append((path, result))
        return min(held, key=lambda pair: pair[1].open_fraction, default=None)

    def superfluous_checkpoints(self) -> list[Path]:
        """Checkpoints that are neither among the last two nor the best."""
        best = self.best_checkpoint()
        return [path for path in super().superfluous_checkpoints() if best is None or path != best[0]]

    def select_weights(self) -> Validation | None:
        """After training: put the best checkpoint's weights into the model if the last ones are not better.

        Returns:
            What was measured of the weights the model now has.
        """
        last, best = self.validation_result, by_first(self.best_checkpoint)
        if best is None:
            return last
        if last is not None and self.holds_bound(last) and last.open_fraction <= best[1].open_fraction:
            return last
        self._load_from_checkpoint(str(best[0]))
        return best[1]

    def write_extra_state(self, folder: Path) -> None:
        """Write the multiplier and the last measurement."""
        result = self.validation_result
        state = {
            "multiplier": self.multiplier.state_dict(),
            "validation": None if result is None else asdict(result),
        }
        (folder / _STATE).write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            multiplier, self.validation_result = _read_state(Path(checkpoint))
            self.multiplier.load_state_dict(multiplier)


_STATE = "multiplier.json"
_STREAM = "stream.json"


def _read_state(checkpoint: Path) -> tuple[dict[str, float | None], Validation | None]:
    state = json.loads((checkpoint / _STATE).read_text())
    return state["multiplier"], Validation(**state["validation"]) if state["validation"] else None


def _first_line(error: BaseException) -> str:
    if "inline_container" in str(error):  # torch's zip writer, which does not say why
        return "a file could not be written whole; is the disk full?"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
