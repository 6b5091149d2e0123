"""``gossamer demo``: a model that learns to add, made sparse until its algorithm can be read.

1. Train a small decoder from scratch on two-digit sums until it adds pairs that it has never seen.
2. Make it sparse with :mod:`gossamer.training`, with its own loss on unseen sums as the bound.
3. Measure losses, open links and exact match of both models on held-out sums, and compare their circuits.
4. Measure what each open link does and describe it in words (:mod:`gossamer.demo.findings`).

The result is an ordinary run, with the dense model in ``dense/`` and the sentences in ``findings.json``.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gossamer.circuits.attention_record import AttentionPrompt, write_attention
from gossamer.circuits.compare import compare_circuits
from gossamer.circuits.config import SearchConfig
from gossamer.circuits.tasks import TASKS
from gossamer.demo.addition import (
    CHARACTERS,
    PROMPT_TOKENS,
    TOKENS,
    Split,
    addition_tokenizer,
    illustrative_sums,
    split_pairs,
)
from gossamer.demo.findings import describe, model_accuracy
from gossamer.errors import GossamerError
from gossamer.evaluation.evaluate import evaluate_run
from gossamer.files import atomic_directory, atomic_write_text
from gossamer.report.html import write_report
from gossamer.runs.beginning import write_beginning
from gossamer.runs.job import Job
from gossamer.runs.record import Run, load_sparse
from gossamer.runs.settings import RunConfig
from gossamer.tables import Table
from gossamer.training.constraints import CrossEntropy
from gossamer.training.data import BlockDataset, Blocks
from gossamer.training.multiplier import MultiplierConfig
from gossamer.training.settings import TrainingConfig
from gossamer.training.trainer import PostTrainer

_BATCH = 256
_SEQUENCES_AT_ONCE = 500


@dataclass(frozen=True)
class DemoConfig:
    """All settings of the demo; the trials in ``docs/LOG.md`` found the defaults.

    Attributes:
        width, layers, heads: of the decoder.
        dense: settings of the dense training.
        dense_steps: its number of steps.
        sparse: settings of the sparse training.
        sparse_steps: its number of steps.
        gate_bias: initial bias of every gate.
        validation, held_out: how many of the 10,000 pairs steer the multiplier, and how many the metrics are based on.
        circuit_prompts: number of prompts for the comparison of circuits; 0 skips it.
        seed: of the split, the weights, the order of the data and the noise.
    """

    width: int = 64
    layers: int = 4
    heads: int = 4
    dense: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            batch_size=_BATCH,
            learning_rate=3e-3,
            fused_optimizer=False,  # as in the runs of docs/addition.md
            prompt_tokens=PROMPT_TOKENS,
            precision="fp32",
            checkpoint_every=0,
        )
    )
    dense_steps: int = 800
    sparse: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            batch_size=_BATCH,
            learning_rate=1e-3,
            gate_learning_rate=0.05,
            decay=0.9,
            hard_fraction=0.4,
            fused_optimizer=False,
            prompt_tokens=PROMPT_TOKENS,
            precision="fp32",
            constraint=CrossEntropy(slack=0.0),
            # Starting from fewer links than it needs, the model finds circuits that it does not find from more. So
            # lambda starts lower than elsewhere and rises faster. Starting at 0.03, all gates close and stay closed.
            multiplier=MultiplierConfig(initial=0.07, integral=8.0),
            validations=75,
            checkpoint_every=20,
        )
    )
    sparse_steps: int = 1_500
    gate_bias: float = 0.0
    validation: int = 1_000
    held_out: int = 2_000
    circuit_prompts: int = 100
    seed: int = 0


def demonstrate(
    folder: Path,
    config: DemoConfig,
    *,
    console: Console | None = None,
    warn: Callable[[str], None] = lambda line: None,
    progress: Callable[[str], None] = lambda line: None,
) -> Run:
    """Run the whole demo; ``folder`` is written atomically at the end.

    Args:
        folder: the run's directory; must not exist yet.
        config: the settings.
        console: where to show the progress of training; nowhere if None.
        warn: called with one line for each warning.
        progress: called with a short description of the current measurement.

    Raises:
        GossamerError: if the directory exists or cannot be written; if a loss is not finite.
    """
    if folder.exists():
        raise GossamerError(f"{folder} exists already; give another --out, or remove it")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with _one_thread(), atomic_directory(folder) as staging:
        _demonstrate(Run(staging), config, console or Console(quiet=True), warn, progress)
        write_report(staging, name=folder.resolve().name)
    return Run(folder)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run the block with one thread, so that the result does not depend on the number of threads.

    A model this small gains little from a second thread. On a busy machine, threads that wait for each other made
    training eight times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _demonstrate(
    run: Run,
    config: DemoConfig,
    console: Console,
    warn: Callable[[str], None],
    progress: Callable[[str], None],
) -> None:
    seconds: dict[str, float] = {}
    split = split_pairs(validation=config.validation, held_out=config.held_out, seed=config.seed)
    blocks = Blocks(split.train.blocks(), split.validation.blocks(), split.held_out.blocks())
    tokenizer = addition_tokenizer()
    settings = run_config(config)
    with _timed(seconds, "training_dense"):
        dense = train_dense(run, config, settings, split, console, warn)
        dense.save_pretrained(run.folder / "dense")
        tokenizer.save_pretrained(run.folder / "dense")
    with _timed(seconds, "training_sparse"):
        write_beginning(run.folder, settings, dense, blocks)
        Job(run, settings, console, warn).train(dense, tokenizer)
    with _timed(seconds, "measuring"):
        evaluate_run(run, batch_size=_SEQUENCES_AT_ONCE, progress=progress)
        sparse = load_sparse(run)
        progress("findings")
        findings = describe(sparse, split.held_out)
        atomic_write_text(run.folder / "findings.json", json.dumps(findings, indent=2) + "\n")
        shown = [
            AttentionPrompt(tuple(tokenizer(instructive.text)["input_ids"]), instructive.note)
            for instructive in illustrative_sums(split.held_out)
        ]
        write_attention(run.folder, {"dense": dense.eval(), "sparse": sparse.eval()}, tokenizer, shown)
    if config.circuit_prompts:
        with _timed(seconds, "circuits"):
            try:
                search = SearchConfig(examples=config.circuit_prompts, seed=config.seed, batch_size=64)
                compare_circuits(run, TASKS["addition"], search, progress=progress)
            except GossamerError as error:
                warn(f"no circuits: {error}")
    _add_metrics(run, config, split, dense, findings, seconds)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def demo_config(seed: int) -> DemoConfig:
    """The settings with which the command line runs the demo."""
    config = DemoConfig()
    return replace(config, seed=seed, dense=replace(config.dense, seed=seed), sparse=replace(config.sparse, seed=seed))


def run_config(config: DemoConfig) -> RunConfig:
    """The demo's settings as the configuration of a run."""
    return RunConfig(
        model="a decoder trained from scratch on two-digit sums",
        text="two-digit sums, every pair of operands once",
        tokens=config.sparse_steps * config.sparse.blocks_per_step * TOKENS,
        seq_len=TOKENS,
        validation_tokens=config.validation * TOKENS,
        held_out_tokens=config.held_out * TOKENS,
        margin=0.0,
        gate_bias=config.gate_bias,
        control=False,
        training=config.sparse,
    )


def train_dense(
    run: Run,
    config: DemoConfig,
    settings: RunConfig,
    split: Split,
    console: Console,
    warn: Callable[[str], None],
) -> PreTrainedModel:
    """Train the dense model from scratch and return it in ``eval()`` mode."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(CHARACTERS) + 1,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=TOKENS,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    trainer = PostTrainer(
        model,
        config.dense,
        BlockDataset(split.train.blocks()),
        run.folder / "dense-checkpoints",
        steps=config.dense_steps,
    )
    Job(run, settings, console, warn).fit(trainer, "dense", "dense.jsonl")
    shutil.rmtree(run.folder / "dense-checkpoints", ignore_errors=True)
    return model.eval()


def _add_metrics(
    run: Run,
    config: DemoConfig,
    split: Split,
    dense: PreTrainedModel,
    findings: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """Add the metrics that are specific to addition to ``metrics.json``, under ``addition``."""
    metrics = run.read_metrics()
    metrics["addition"] = {
        "sums_trained": len(split.train),
        "sums_held_out": len(split.held_out),
        "accuracy_dense": asdict(model_accuracy(dense, split.held_out)),
        "accuracy_sparse": findings["accuracy"],
        "open_links_mean": findings["open_links_mean"],
        "open_links_most": findings["open_links_most"],
        "open_links_union": findings["open_links_union"],
        "links_allowed": config.layers * config.heads * TOKENS * (TOKENS + 1) // 2,
        "steps_dense": config.dense_steps,
        "steps_sparse": config.sparse_steps,
        "seconds": seconds,
    }
    atomic_write_text(run.metrics, json.dumps(metrics, indent=2) + "\n")


def addition_table(metrics: dict[str, Any]) -> Table:
    """The metrics under ``addition`` in ``metrics.json`` as a table for the terminal."""
    addition = metrics["addition"]
    table = Table(title=f"{addition['sums_held_out']:,} sums never seen in training")
    table.add_column("")
    for heading in ("dense", "sparse"):
        table.add_column(heading, justify="right")
    dense, sparse = addition["accuracy_dense"], addition["accuracy_sparse"]
    table.add_row("right", _percent(dense["exact"]), _percent(sparse["exact"]))
    for group, share in dense["groups"].items():
        table.add_row(f"right {group}", _percent(share), _percent(sparse["groups"][group]))
    table.add_row("open links of a sum", f"{addition['links_allowed']}", f"{addition['open_links_mean']:.2f}")
    table.add_row("loss (nat)", f"{metrics['loss_dense']:.5f}", f"{metrics['loss_sparse']:.5f}")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
