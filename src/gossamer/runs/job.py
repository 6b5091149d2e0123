"""A complete post-training run in one directory: prepare it, train the sparse model, then the dense control.

All randomness is a function of the seed, so a run that is killed and resumed ends with the same result as an
uninterrupted one.
"""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gossamer.files import atomic_directory, atomic_write_text
from gossamer.models.checkpoint import load, save
from gossamer.models.convert import add_gates
from gossamer.models.lora import add_adapters, merge_adapters
from gossamer.models.lora_files import save_adapter
from gossamer.models.pretrained import load_dense
from gossamer.runs.beginning import begin
from gossamer.runs.record import Run, load_control, run_device
from gossamer.runs.settings import RunConfig
from gossamer.training.checkpoints import checkpoints, last_valid_checkpoint
from gossamer.training.data import BlockDataset
from gossamer.training.distributed import check_processes, on_main_process, processes, synchronized
from gossamer.training.precision import fast_precision
from gossamer.training.progress import StepLog, sampling_shown
from gossamer.training.settings import Precision
from gossamer.training.sparsity import SparsityTrainer, Validation
from gossamer.training.stream import BlockStream
from gossamer.training.trackers import add_trackers, check_trackers
from gossamer.training.trainer import PostTrainer, freeze_except, no_dropout


def post_train(
    config: RunConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    report_to: Sequence[str] = (),
    console: Console | None = None,
    warn: Callable[[str], None] | None = None,
) -> Run:
    """Train a sparse model from a dense one, and its dense control, in ``folder``.

    In several processes (torchrun, ``accelerate launch``), all of them train together. The first one prepares the run,
    shows progress and writes files; all of them must have access to the folder.

    Args:
        config: the settings of the run.
        folder: the run's directory; must not exist, or with ``resume`` may hold a run with the same settings.
        resume: continue from the last intact checkpoint; start the run if the directory does not exist.
        report_to: trackers that show the training of the sparse model: names from :mod:`gossamer.training.trackers`.
        console: where progress is drawn; None draws nothing.
        warn: called with one line for each warning.

    Returns:
        The run, with ``model/`` and, unless ``config.control`` is False, ``control/`` in it.

    Raises:
        GossamerError: on bad input, before anything is written; on a loss that is not finite; if the
            directory cannot be written. An error in one process is raised in all of them.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    job = Job(Run(Path(folder)), config, console or Console(quiet=True), warn or (lambda line: None), tuple(report_to))
    first = processes().is_main_process
    with ExitStack() as stack:
        with synchronized():
            if first:
                stack.enter_context(job.run.locked())
        if config.training.precision == "auto":
            job = replace(job, config=config.in_precision(on_main_process(lambda: _precision(job.run, resume))))
        _post_train(job, resume=resume)
    return job.run


def _precision(run: Run, resume: bool) -> Precision:
    """Get the precision that a resumed run was started in; otherwise the one that is fast on this device."""
    begun = resume and run.folder.exists()
    return run.config().training.precision if begun else fast_precision(run_device())


def _post_train(job: "Job", *, resume: bool) -> None:
    config, first = job.config, processes().is_main_process
    with synchronized():
        check_processes(config.training.processes)
        if first:
            check_trackers(job.report_to)
            with sampling_shown(job.console) as progress:
                dense, tokenizer = begin(job.run, config, progress, resume=resume, warn=job.warn)
    if not first:
        job = replace(job, console=Console(quiet=True), warn=lambda line: None)
    with synchronized():
        if not first:
            dense, tokenizer = load_dense(config.model)
    job.train(dense, tokenizer)


@dataclass(frozen=True)
class Job:
    """The training of a run whose starting files are written.

    Attributes:
        run: the run.
        config: its settings.
        console: where progress is drawn.
        warn: called with one line for each warning.
        report_to: trackers that show the training of the sparse model.
    """

    run: Run
    config: RunConfig
    console: Console = field(default_factory=lambda: Console(quiet=True))
    warn: Callable[[str], None] = lambda line: None
    report_to: tuple[str, ...] = ()

    @property
    def start(self) -> Run | None:
        """The run that this one starts from."""
        folder = self.config.start_from
        return None if folder is None else Run(Path(folder))

    @property
    def adapters(self) -> bool:
        """Whether the run trains adapters. If so, ``dense`` is converted in place instead of copied."""
        return self.config.training.train == "lora"

    def train(self, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Train the models that the run does not have yet: the sparse model and, if requested, the dense control."""
        run, config = self.run, self.config
        dense_loss = run.record()["measured"]["loss_dense"]
        for line in config.training.constraint.warnings(dense_loss):
            self.warn(line)
        if processes().is_main_process:
            self._remove_superfluous_checkpoints()
        if not run.model.exists():
            self.train_sparse(dense, tokenizer, dense_loss)
            if self.adapters and config.control:
                dense = run.load_dense("cpu")[0]
        if config.control and not run.control.exists():
            self.train_control(dense, tokenizer)

    def _remove_superfluous_checkpoints(self) -> None:
        """Remove checkpoints whose model is already saved; a process killed before its cleanup leaves them."""
        for model, folder in ((self.run.model, self.run.checkpoints), (self.run.control, self.run.control_checkpoints)):
            if model.exists():
                shutil.rmtree(folder, ignore_errors=True)

    def train_sparse(self, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dense_loss: float) -> None:
        """Train and save the sparse model; ``dense_loss`` is the dense model's on the validation blocks, in nats."""
        run, config, training = self.run, self.config, self.config.training
        trainer = SparsityTrainer(
            self._gated(dense),
            self._reference(dense),
            dense_loss,
            training,
            self._blocks(tokenizer),
            run.blocks("validation"),
            run.checkpoints,
            margin=config.margin,
            dense_weights=None if self.adapters else lambda: run.load_dense("cpu")[0].state_dict(),
            steps=config.steps,
            tokenizer=tokenizer,
        )
        if processes().is_main_process:
            begun = last_valid_checkpoint(trainer.folder)[0]
            add_trackers(
                trainer, self.report_to, run.folder, first_step=int(begun.name.split("-")[1]) + 1 if begun else 1
            )
        self.fit(trainer, "sparse", "training.jsonl", trainer.bound)
        final = trainer.select_weights()
        whole = trainer.whole_weights()
        with synchronized():
            if processes().is_main_process:
                self._tell(trainer, final)
                self._save_sparse(cast(PreTrainedModel, trainer.model), whole, tokenizer)

    def train_control(self, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Train and save the dense control: the dense model fine-tuned on the same text for the same steps."""
        run, config = self.run, self.config
        control = copy.deepcopy(dense) if self.start is None else load_control(self.start, "cpu")
        self._prepare(control)
        trainer = PostTrainer(
            control,
            config.training,
            self._blocks(tokenizer),
            run.control_checkpoints,
            steps=config.steps,
        )
        self.fit(trainer, "control", "control.jsonl")
        whole = trainer.whole_weights()
        with synchronized():
            if not processes().is_main_process:
                return
            if whole is not None:
                control = self._put_together(run.load_dense("cpu")[0], whole)
            if self.adapters:
                merge_adapters(control)
            with atomic_directory(run.control) as staging:
                control.save_pretrained(staging)
                tokenizer.save_pretrained(staging)
            shutil.rmtree(run.control_checkpoints, ignore_errors=True)

    def fit(self, trainer: PostTrainer, label: str, log: str, bound: float | None = None) -> None:
        """Train from the last intact checkpoint; show progress on the console and log every step.

        Args:
            trainer: the trainer to run.
            label: text in front of the progress bar.
            log: name of the log file in the run's directory.
            bound: the constraint's bound, shown with the progress; None without a constraint.
        """
        config = self.config
        checkpoint = on_main_process(lambda: self._resume_point(trainer.folder))
        steps = StepLog(
            trainer,
            label,
            self.run.folder / log,
            bound=bound,
            tokens_per_step=config.tokens_per_step,
            console=self.console,
        )
        if processes().is_main_process:
            trainer.add_callback(steps)
        with no_dropout(cast(PreTrainedModel, trainer.model)):
            if checkpoint is None and isinstance(trainer, SparsityTrainer):
                trainer.prepare(open_gates=config.gate_bias is None and config.start_from is None)
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                steps.progress.stop()
        if trainer.stream is not None and (rounds := trainer.stream.rounds):
            self.warn(
                f"{config.text} ended before the training did and began again; parts of it were read {rounds + 1} times"
            )

    def _resume_point(self, folder: Path) -> Path | None:
        """Find the last intact checkpoint; remove newer and unfinished ones."""
        for partial in folder.glob(".*.partial"):
            shutil.rmtree(partial)
        checkpoint, faults = last_valid_checkpoint(folder)
        for line in faults:
            self.warn(f"{line}; resuming from {checkpoint or 'the start'}")
        for damaged in checkpoints(folder):
            if checkpoint is None or int(damaged.name.split("-")[1]) > int(checkpoint.name.split("-")[1]):
                shutil.rmtree(damaged)
        return checkpoint

    def _gated(self, dense: PreTrainedModel) -> PreTrainedModel:
        """Create the sparse model as it is before training."""
        if self.start is not None:
            model = load(self.start.model)
        else:
            model = add_gates(dense, gate_bias=self.config.gate_bias or 0.0, inplace=self.adapters)
        self._prepare(model)
        return model

    def _reference(self, dense: PreTrainedModel) -> PreTrainedModel | None:
        """Copy the dense model if the constraint needs it and the sparse model does not contain it."""
        training = self.config.training
        if not training.constraint.needs_dense or self.adapters:
            return None
        reference = copy.deepcopy(dense).to(run_device())
        return reference.to(torch.bfloat16) if training.precision == "bf16" else reference

    def _blocks(self, tokenizer: PreTrainedTokenizerBase) -> BlockDataset | BlockStream:
        config = self.config
        if not config.stream:
            return BlockDataset(self.run.blocks("train"))
        here = processes()
        return BlockStream(
            self.run.text,
            tokenizer,
            config.seq_len,
            process=here.process_index,
            processes=here.num_processes,
            workers=config.stream_workers,
            most=config.steps * config.training.gradient_accumulation,
        )

    def _prepare(self, model: PreTrainedModel) -> None:
        """Add adapters if the run trains them; otherwise freeze the parameters that are not trained."""
        config = self.config
        if self.adapters:
            add_adapters(
                model,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                targets=config.lora_targets,
                seed=config.training.seed,
            )
        else:
            freeze_except(model, config.training.train)

    def _put_together(self, model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
        """Load the gathered weights of a sharded training into a fresh model, on the first process."""
        self._prepare(model)
        model.load_state_dict(weights)
        return model

    def _tell(self, trainer: SparsityTrainer, final: Validation) -> None:
        """Record the validation of the selected weights; warn if shifting the gates alone does not meet the bound."""
        if final.calibration is None:
            measured = f"{trainer.label} {final.constrained:.4f} ± {final.stderr:.4f}"
            over = trainer.violation(final) * trainer.tolerance
            self.warn(
                f"{measured} on the validation text is {over:.4f} nat over {trainer.constraint.symbol} "
                f"{trainer.bound:.4f} less its margin; neither a common shift of the gate biases brings it inside nor "
                "weights drawn towards the dense ones; give the run more --tokens, or a looser bound"
            )
        elif final.interpolation < 1:
            kept = f"{100 * final.interpolation:.0f} % of what training changed in the weights was kept"
            self.warn(f"no shift of the gates alone held the bound: {kept}")
        record = self.run.record()
        record["measured"]["selected"] = asdict(final)
        atomic_write_text(self.run.folder / "config.json", json.dumps(record, indent=2) + "\n")

    def _save_sparse(
        self, model: PreTrainedModel, whole: dict[str, Tensor] | None, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        run = self.run
        if whole is not None:
            fresh = add_gates(run.load_dense("cpu")[0], inplace=True)
            model = self._put_together(fresh, whole)
        if self.adapters:
            save_adapter(model, run.adapter)
            merge_adapters(model)
        save(model, run.model, tokenizer)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
