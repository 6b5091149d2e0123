"""A whole post-training run in one directory: text, bound, sparse model, dense control.

    RUN/config.json        the full configuration, versions, what was measured before training
    RUN/blocks.safetensors the token blocks, train and held-out
    RUN/training.jsonl     one line a step; control.jsonl likewise for the dense control
    RUN/checkpoints/       of the run in progress; control-checkpoints/ likewise
    RUN/model/             the sparse model
    RUN/adapter/           of a run with LoRA: its adapters and gates without the dense model, a few megabytes
    RUN/dense/             the dense model, where the run itself trained it (gossamer demo)
    RUN/control/           the dense control: the dense model fine-tuned on the same text for the same steps
    RUN/tensorboard/       what TensorBoard shows, if asked for; wandb/ likewise
    RUN/metrics.json       the figures, written by gossamer.evaluation

Everything that depends on chance is a function of the seed, so a run that is killed and resumed ends
where one never interrupted ends.
"""

import copy
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gossamer.errors import GossamerError
from gossamer.files import remove_staging, same_place, write_text, written_beside
from gossamer.models.architectures import architecture_of
from gossamer.models.checkpoint import load, save
from gossamer.models.convert import sparsify
from gossamer.models.lora import adapter_targets, add_adapters, merge_adapters
from gossamer.models.lora_files import save_adapter
from gossamer.models.pretrained import SMOLLM2, load_dense
from gossamer.training.checkpoints import checkpoints, last_sound
from gossamer.training.constraint import MultiplierConfig
from gossamer.training.data import SELF, BlockDataset, Blocks, load_blocks
from gossamer.training.documents import passed_over
from gossamer.training.losses import cross_entropy
from gossamer.training.processes import by_first, check_processes, processes, together
from gossamer.training.progress import StepLog, sampling_shown
from gossamer.training.stream import BlockStream, unseen_blocks
from gossamer.training.trainer import (
    PostTrainer,
    SparsityTrainer,
    TrainingConfig,
    choose_trained,
    without_dropout,
)
from gossamer.training.watching import check_watchers, watch

WOUND_UP = 100
"""So many times its first value lambda says that the gates no longer answer it (docs/LOG.md)."""

_CHECKPOINTS = ("checkpoints", "control-checkpoints")


@dataclass(frozen=True)
class RunConfig:
    """What to sparsify, on which text, under which bound.

    Attributes:
        model: ``smollm2``, a local directory or a Hub id. Local paths, here and below, become absolute.
        text: a local file or directory, a Hub data set, or ``self``.
        seq_len: tokens in a block. The open fraction depends on it, and the loss holds up to about twice it.
        validation_tokens: how much unseen text steers the multiplier; tau is measured on it.
        held_out_tokens: how much other unseen text the figures are measured on.
        tau: bound on the cross-entropy in nats; the dense model's held-out loss plus ``slack`` if None.
        slack: nats above the dense model's loss.
        epsilon: bound on KL(dense || sparse) in nats, for the constraint ``kl``.
        margin: how far inside the bound training aims, and the weights kept are to be, nats; of epsilon at most a
            tenth.
        gate_bias: initial bias of every gate.
        start_from: directory of a finished run of the same model; this run starts from its sparse model (gates and all,
            so that ``gate_bias`` does not matter), the control from its control. None starts both from the dense model.
        lora_rank, lora_alpha: of the adapters, when those are trained.
        lora_targets: the linear maps that they go on; all of the attention if there are none.
        control: train the dense control as well.
        stream: read the text while training, rather than choose blocks of it before.
        stream_workers: processes that read and tokenise it beside each process that trains; 0 for none.
        training: how to train.
    """

    model: str
    text: str
    seq_len: int = 256
    validation_tokens: int = 8_192
    held_out_tokens: int = 32_768
    tau: float | None = None
    slack: float = 0.01
    epsilon: float = 0.05
    margin: float = 0.005
    gate_bias: float = -2.0
    start_from: str | None = None
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ()
    control: bool = True
    stream: bool = False
    stream_workers: int = 1
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        # So that it is found from any folder. smollm2 and self are names, whatever lies beside.
        local = {"model": os.path.isdir, "text": os.path.exists, "start_from": os.path.exists}
        for name, is_there in local.items():
            value = getattr(self, name)
            if value not in (None, SMOLLM2, SELF) and is_there(value):
                object.__setattr__(self, name, os.path.abspath(value))

    @property
    def tokens_per_step(self) -> int:
        """Training tokens in one optimiser step."""
        return self.training.blocks_per_step * self.seq_len

    @property
    def start(self) -> "Run | None":
        """The run that this one starts from."""
        return None if self.start_from is None else Run(Path(self.start_from))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The configuration that ``dataclasses.asdict`` turned into ``values``."""
        training = dict(values["training"])
        training["multiplier"] = MultiplierConfig(**training["multiplier"])
        targets = tuple(values.get("lora_targets", ()))
        return cls(**{**values, "lora_targets": targets, "training": TrainingConfig(**training)})


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
    def metrics(self) -> Path:
        """The figures."""
        return self.folder / "metrics.json"

    def record(self) -> dict[str, Any]:
        """The contents of ``config.json``: ``config``, ``versions``, ``measured``."""
        try:
            return dict(json.loads((self.folder / "config.json").read_text()))
        except OSError as error:
            raise GossamerError(f"{self.folder} is not a run: it has no readable config.json") from error
        except ValueError as error:
            raise GossamerError(f"{self.folder / 'config.json'} is not valid JSON: {error}") from error

    def config(self) -> RunConfig:
        """The configuration the run was started with."""
        record = self.record()
        if "config" not in record:
            raise GossamerError(f"{self.folder} is not a run: its config.json is of another kind")
        return RunConfig.from_dict(record["config"])

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


def held_out_loss(
    model: PreTrainedModel,
    blocks: Int[Tensor, "blocks tokens"],
    *,
    precision: str,
    batch_size: int = 8,
    prompt_tokens: int = 0,
) -> float:
    """Mean next-token cross-entropy of a model on the blocks, nats; in ``eval()`` mode."""
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        for batch in blocks.split(batch_size):
            logits = model(input_ids=batch.to(device), use_cache=False).logits
            total += cross_entropy(logits, batch.to(device), prompt_tokens).item() * len(batch)
    return total / len(blocks)


def post_train(
    config: RunConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    report_to: Sequence[str] = (),
    console: Console | None = None,
    warn: Callable[[str], None] | None = None,
) -> Run:
    """Make a sparse model of a dense one, and its dense control, in ``folder``.

    Started in several processes (torchrun, ``accelerate launch``), they train together: the first one prepares, draws
    and writes, and all of them have to see the folder.

    Args:
        config: what to do.
        folder: the run's directory; must not exist yet, or with ``resume`` must hold the same run begun.
        resume: go on from the last checkpoint without a fault; begin if there is nothing yet.
        report_to: what shows the training of the sparse model: names of :mod:`gossamer.training.watching`.
        console: where progress is drawn; none if None.
        warn: is given one line for each thing the user should know at once.

    Returns:
        The run, with ``model/`` and, unless ``config.control`` is False, ``control/`` in it.

    Raises:
        GossamerError: on bad input, before anything is written; on a loss that is not finite; if the
            directory cannot be written. On all processes, if one finds it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = console or Console(quiet=True)
    warn = warn or (lambda line: None)
    run = Run(Path(folder))
    here = processes()
    with together():
        check_processes(config.training.processes)
        if here.is_main_process:
            dense, tokenizer = _begin(run, config, resume, report_to, console, warn)
        else:
            console, warn = Console(quiet=True), lambda line: None
    with together():
        if not here.is_main_process:
            dense, tokenizer = load_dense(config.model)
    train_begun(run, config, dense, tokenizer, console, warn, report_to)
    return run


def _begin(
    run: Run,
    config: RunConfig,
    resume: bool,
    report_to: Sequence[str],
    console: Console,
    warn: Callable[[str], None],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Write what a run starts from, or check that it is there; gives the dense model and its tokenizer."""
    check_watchers(report_to)
    _check_numbers(asdict(config))
    if resume:
        for target in (run.folder, run.model, run.adapter, run.control, *(run.folder / name for name in _CHECKPOINTS)):
            remove_staging(target)
        if run.folder.exists():
            _check_same(run.config(), config, run.folder)
    elif run.folder.exists():
        raise GossamerError(f"{run.folder} exists already; go on with it by --resume, or give another --out")
    dense, tokenizer = load_dense(config.model)
    architecture_of(dense)
    if config.training.train == "lora":
        adapter_targets(dense, config.lora_targets)
    if config.start is not None:
        _check_start(config, config.start)
    if config.training.constraint == "kl" and config.epsilon <= 0:
        raise GossamerError(f"--epsilon {config.epsilon:g} cannot be held: no KL is below 0; give for example 0.05")
    _check_length(dense, config)
    if not (run.folder / "config.json").exists():
        if config.text != SELF and (line := passed_over(config.text)):
            warn(line)
        with sampling_shown(console) as progress:
            blocks = blocks_of(config, dense, tokenizer, progress)
        with written_beside(run.folder) as staging:
            write_beginning(staging, config, dense, blocks)
    return dense, tokenizer


def train_begun(
    run: Run,
    config: RunConfig,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    warn: Callable[[str], None],
    report_to: Sequence[str] = (),
) -> None:
    """Train what a run that was begun does not have yet: the sparse model and, if wanted, the dense control.

    ``dense`` itself becomes the sparse model where adapters are trained, so that there is one copy of its weights.
    """
    record = run.record()
    tau_dense, tau = record["measured"]["loss_dense"], record["measured"]["tau"]
    if config.training.constraint == "ce" and tau < tau_dense:
        warn(
            f"tau {tau:.3f} is below the dense model's held-out loss {tau_dense:.3f}: "
            "the constraint may be out of reach"
        )
    if not run.model.exists():
        _train_sparse(run, config, dense, tokenizer, tau, report_to, console, warn)
        if config.training.train == "lora" and config.control:
            dense = load_dense(run.dense)[0]
    if config.control and not run.control.exists():
        _train_control(run, config, dense, tokenizer, console, warn)


def _check_numbers(settings: dict[str, Any], before: str = "--") -> None:
    for key, value in settings.items():
        name = before + key.replace("_", "-")
        if isinstance(value, dict):
            _check_numbers(value, before if key == "training" else f"{name}-")
        elif isinstance(value, float) and not math.isfinite(value):
            raise GossamerError(f"{name} {value} is not a number to train with; give a finite one")


def _check_same(begun: RunConfig, asked: RunConfig, folder: Path) -> None:
    before, now = asdict(begun), asdict(asked)
    if begun.training.processes != asked.training.processes:
        raise GossamerError(
            f"{folder} was begun with {begun.training.processes} processes, not {asked.training.processes}; "
            "resume with as many, or give another --out"
        )
    for key in before:
        if before[key] != now[key] and not same_place(before[key], now[key]):
            raise GossamerError(
                f"{folder} was begun with {key}={before[key]!r}, not {now[key]!r}; "
                "resume with the same settings, or give another --out"
            )


def _check_start(config: RunConfig, start: Run) -> None:
    folder = start.folder
    model = start.config().model
    if model != config.model and not same_place(model, config.model):
        raise GossamerError(f"--start-from {folder} is a run of {model}, not of {config.model}; give one of this model")
    if not start.model.exists():
        raise GossamerError(
            f"--start-from {folder} has no sparse model yet; finish it with gossamer sparsify ... --resume"
        )
    if config.control and not start.control.exists():
        raise GossamerError(f"--start-from {folder} has no dense control to train on; give --no-control")
    if config.training.train == "lora":
        raise GossamerError(
            f"--start-from {folder} does not go with --train lora: adapters are saved beside the dense model, "
            "not beside another run's; give --train all or attention"
        )
    for earlier in _starts(config):
        before = earlier.config()
        if before.text != config.text and not same_place(before.text, config.text):
            continue
        if before.stream != config.stream:
            asked = "as well" if before.stream else "not"
            raise GossamerError(
                f"--start-from {folder} held out other parts of {config.text}, since it was run "
                f"{'with' if before.stream else 'without'} --stream; {'give it' if before.stream else 'do'} {asked}"
            )
        if config.text == SELF and before.training.seed == config.training.seed:
            raise GossamerError(
                f"--start-from {folder} was trained on the text that --text self samples from --seed "
                f"{config.training.seed}; give another --seed"
            )


def _starts(config: RunConfig) -> Iterator[Run]:
    """The run that this one starts from, the one that that one started from, and so on."""
    start = config.start
    while start is not None:
        yield start
        start = start.config().start


def _tokens_before(config: RunConfig) -> int:
    """Training tokens of the runs that this one starts from."""
    return sum(before.training.steps * before.tokens_per_step for before in (run.config() for run in _starts(config)))


def _check_length(dense: PreTrainedModel, config: RunConfig) -> None:
    context = getattr(dense.config, "max_position_embeddings", None)
    if context is not None and config.seq_len > context:
        raise GossamerError(
            f"--seq-len {config.seq_len} is over the model's context of {context} tokens; give at most {context}"
        )
    if config.seq_len < 2:
        raise GossamerError(f"--seq-len {config.seq_len} leaves nothing to predict; give at least 2")


def blocks_of(
    config: RunConfig,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int, int], None] | None = None,
) -> Blocks:
    """The blocks that a configuration asks for; of a stream the unseen ones only.

    ``progress`` is called with the number of blocks sampled so far, and of all, where the model samples them itself.

    Raises:
        GossamerError: naming the text and what is wrong with it.
    """
    training = config.training
    sizes = {
        "seq_len": config.seq_len,
        "validation_blocks": max(1, config.validation_tokens // config.seq_len),
        "held_out_blocks": max(1, config.held_out_tokens // config.seq_len),
    }
    if config.stream:
        return unseen_blocks(config.text, tokenizer, **sizes, model=dense)
    count = training.steps * training.blocks_per_step
    return load_blocks(
        config.text, tokenizer, **sizes, train_blocks=count, seed=training.seed, model=dense, progress=progress
    )


def _training_blocks(run: Run, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> BlockDataset | BlockStream:
    if not config.stream:
        return BlockDataset(run.blocks("train"))
    here = processes()
    return BlockStream(
        config.text,
        tokenizer,
        config.seq_len,
        process=here.process_index,
        processes=here.num_processes,
        workers=config.stream_workers,
        most=config.training.steps * config.training.gradient_accumulation,
    )


def write_beginning(folder: Path, config: RunConfig, dense: PreTrainedModel, blocks: Blocks) -> None:
    """Write what a run starts from into its folder: the blocks, the configuration, the dense model's loss."""
    training = config.training
    tau_dense = held_out_loss(
        dense, blocks.validation, precision=training.precision, prompt_tokens=training.prompt_tokens
    )
    tau = config.tau if config.tau is not None else tau_dense + config.slack
    record = {
        "config": asdict(config),
        "versions": versions(),
        "measured": {"loss_dense": tau_dense, "tau": tau, "tokens_before": _tokens_before(config)},
    }
    parts = {name: part.int().contiguous() for name, part in vars(blocks).items()}
    save_file(parts, folder / "blocks.safetensors")
    write_text(folder / "config.json", json.dumps(record, indent=2) + "\n")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _train_sparse(
    run: Run,
    config: RunConfig,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tau: float,
    report_to: Sequence[str],
    console: Console,
    warn: Callable[[str], None],
) -> None:
    training = config.training
    lora = training.train == "lora"
    if config.start is not None:
        model = load(config.start.model)
    else:
        model = sparsify(dense, gate_bias=config.gate_bias, inplace=lora)
    _prepare(model, config)
    reference = None
    if training.constraint == "kl" and not lora:
        reference = copy.deepcopy(dense).to(_device())
        if training.precision == "bf16":
            reference = reference.to(torch.bfloat16)
    bound, margin = tau, config.margin
    if training.constraint == "kl":
        bound, margin = config.epsilon, min(config.margin, config.epsilon / 10)
    trainer = SparsityTrainer(
        model,
        reference,
        bound - margin,
        training,
        _training_blocks(run, config, tokenizer),
        run.blocks("validation"),
        run.folder / _CHECKPOINTS[0],
        tokenizer=tokenizer,
    )
    if processes().is_main_process:
        begun = last_sound(trainer.folder)[0]
        watch(trainer, report_to, run.folder, first_step=int(begun.name.split("-")[1]) + 1 if begun else 1)
    train_logged(trainer, run, config, "sparse", "training.jsonl", bound, console, warn)
    selected = trainer.select_weights()
    whole = trainer.whole_weights()
    first, last = training.multiplier.initial, trainer.multiplier.value
    with together():
        if not processes().is_main_process:
            return
        if last >= WOUND_UP * first and not trainer.holds_bound(selected):
            warn(
                f"lambda went from {first:g} to {last:.3g} and the bound less its margin is missed on the validation "
                "text: gates that are shut hardly open again. Begin with more links open (--gate-bias) or a larger "
                "--initial-multiplier, or shut them more slowly (--gate-learning-rate)"
            )
        if selected is not None:
            _record_selection(run, asdict(selected))
            if selected.step != training.steps:
                warn(
                    "the last step missed the bound less its margin, or was less sparse; the model kept is that of "
                    f"step {selected.step}"
                )
        if whole is not None:
            model = sparsify(load_dense(run.dense)[0], gate_bias=config.gate_bias, inplace=True)
            _put_together(model, whole, config)
        if lora:
            save_adapter(model, run.adapter)
            merge_adapters(model)
        save(model, run.model, tokenizer)
        shutil.rmtree(run.folder / _CHECKPOINTS[0], ignore_errors=True)


def _record_selection(run: Run, selected: dict[str, Any]) -> None:
    record = run.record()
    record["measured"]["selected"] = selected
    write_text(run.folder / "config.json", json.dumps(record, indent=2) + "\n")


def _train_control(
    run: Run,
    config: RunConfig,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    warn: Callable[[str], None],
) -> None:
    control = copy.deepcopy(dense) if config.start is None else load_control(config.start, "cpu")
    _prepare(control, config)
    blocks = _training_blocks(run, config, tokenizer)
    trainer = PostTrainer(control, config.training, blocks, run.folder / _CHECKPOINTS[1])
    train_logged(trainer, run, config, "control", "control.jsonl", None, console, warn)
    whole = trainer.whole_weights()
    with together():
        if not processes().is_main_process:
            return
        if whole is not None:
            control = load_dense(run.dense)[0]
            _put_together(control, whole, config)
        if config.training.train == "lora":
            merge_adapters(control)
        with written_beside(run.control) as staging:
            control.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        shutil.rmtree(run.folder / _CHECKPOINTS[1], ignore_errors=True)


def _put_together(model: PreTrainedModel, weights: dict[str, Tensor], config: RunConfig) -> None:
    """Give a fresh model, on the first process, the weights of one that was trained in shards."""
    _prepare(model, config)
    model.load_state_dict(weights)


def _prepare(model: PreTrainedModel, config: RunConfig) -> None:
    if config.training.train == "lora":
        add_adapters(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=config.lora_targets,
            seed=config.training.seed,
        )
    else:
        choose_trained(model, config.training.train)


def train_logged(
    trainer: PostTrainer,
    run: Run,
    config: RunConfig,
    label: str,
    log: str,
    bound: float | None,
    console: Console,
    warn: Callable[[str], None],
) -> None:
    """Train from the last checkpoint without a fault, with progress on the console and every step in the run's log."""
    checkpoint = by_first(lambda: _resume_point(trainer.folder, warn))
    steps = StepLog(
        trainer,
        label,
        run.folder / log,
        bound=bound,
        tokens_per_step=config.tokens_per_step,
        console=console,
    )
    if processes().is_main_process:
        trainer.add_callback(steps)
    with without_dropout(cast(PreTrainedModel, trainer.model)):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            steps.progress.stop()
    if trainer.stream is not None and (rounds := trainer.stream.rounds):
        warn(f"{config.text} ended before the training did and began again; parts of it were read {rounds + 1} times")


def _resume_point(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The last checkpoint without a fault; what is newer, or was not finished, is removed."""
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial)
    checkpoint, faults = last_sound(folder)
    for line in faults:
        warn(f"{line}; resuming from {checkpoint or 'the start'}")
    for damaged in checkpoints(folder):
        if checkpoint is None or int(damaged.name.split("-")[1]) > int(checkpoint.name.split("-")[1]):
            shutil.rmtree(damaged)
    return checkpoint


def load_control(run: Run, device: str | torch.device | None = None) -> PreTrainedModel:
    """The dense control of a run that has one; on the GPU, if there is one and nothing else is said."""
    control: PreTrainedModel = AutoModelForCausalLM.from_pretrained(run.control)
    return control.to(device or _device()).eval()


def load_sparse(run: Run) -> PreTrainedModel:
    """The sparse model of a finished run."""
    if not run.model.exists():
        raise GossamerError(f"{run.folder} has no sparse model yet; finish it with gossamer sparsify ... --resume")
    return load(run.model, device=_device())


def load_both(run: Run) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense and the sparse model of a finished run, on one device, and their tokenizer."""
    original = run.dense
    sparse = load_sparse(run)
    dense, tokenizer = load_dense(original, device=sparse.device)
    return dense, sparse, tokenizer
