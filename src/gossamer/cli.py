"""The command line: one verb a job. Faults of the user end in one line and exit code 2."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gossamer.errors import GossamerError, StoppedTogether, one_line

app = typer.Typer(
    name="gossamer",
    help="Makes a trained transformer's attention sparse enough to read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


class Constraint(str, Enum):
    """Kinds of constraint."""

    ce = "ce"
    kl = "kl"


class Part(str, Enum):
    """Which weights are trained."""

    all = "all"
    attention = "attention"
    lora = "lora"


class MLPActivation(str, Enum):
    """Activation functions of GPT-2's MLPs."""

    gelu_new = "gelu_new"
    gelu = "gelu"


class Precision(str, Enum):
    """Precision of the matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"


def _use_preset(context: typer.Context, name: str | None) -> str | None:
    """Let the preset's settings stand where the command line says nothing."""
    if name is not None:
        from gossamer.training.presets import find_preset

        context.default_map = {**(context.default_map or {}), **find_preset(name).settings}
    return name


def _warn(line: str) -> None:
    Console(stderr=True).print(f"warning: {line}", style="yellow", soft_wrap=True, markup=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run; must not exist yet.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
) -> None:
    """Train a small model to add two-digit numbers, make it sparse, and say in words how it adds. Takes minutes.

    Leaves in --out a run like that of sparsify, with the dense model in dense/ and the sentences in findings.json.
    """
    from gossamer.demo.demonstrate import demo_config, demonstrate
    from gossamer.training.memory import keep_freed_memory

    keep_freed_memory()
    with console.status("measuring") as status:
        status.stop()

        def show(what: str) -> None:
            status.start()
            status.update(escape(what))

        try:
            run = demonstrate(out, demo_config(seed), console=console, warn=_warn, progress=show)
        except KeyboardInterrupt as error:
            raise GossamerError(f"interrupted; {out} was not written, begin again") from error
    _show_demo(run)


def _show_demo(run: "Run") -> None:  # type: ignore[name-defined]
    from gossamer.circuits.compare import comparison_tables
    from gossamer.demo.demonstrate import addition_table

    circuits = run.folder / "circuits" / "addition" / "circuits.json"
    if circuits.exists():
        for table in comparison_tables(json.loads(circuits.read_text())):
            console.print(table)
    for sentence in json.loads((run.folder / "findings.json").read_text())["sentences"]:
        console.print(f"- {sentence['text']}", markup=False, highlight=False)
    metrics = json.loads(run.metrics.read_text())
    console.print(addition_table(metrics))
    seconds = metrics["addition"]["seconds"]
    stages = ", ".join(f"{stage.replace('_', ' ')} {value:.0f} s" for stage, value in seconds.items())
    console.print(f"{run.folder}: {stages}", markup=False)
    console.print(f"to look at: {run.folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def sparsify(
    model: Annotated[str, typer.Argument(help="smollm2, a directory with a saved model, or a Hub id.")],
    text: Annotated[
        str,
        typer.Option(
            help="Training text: a .txt, .jsonl, .txt.gz or .jsonl.gz file (documents under 'text'), a directory of "
            "such files, a Hub data set (org/name, or hub:NAME:CONFIG:SPLIT), or 'self' to sample text from the "
            "model itself."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the run; must not exist yet.")],
    preset: Annotated[
        str | None,
        typer.Option(
            is_eager=True,
            callback=_use_preset,
            help="Settings by name, MODEL and --text among them: gpt2, smollm2, llama-3.2-1b, olmo-2-7b. "
            "What stands on the command line goes before them.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens.")] = 1_000_000,
    seq_len: Annotated[int, typer.Option(help="Tokens in a training block. Train at the length you need.")] = 256,
    constraint: Annotated[
        Constraint,
        typer.Option(help="ce: cross-entropy at most tau. kl: KL(dense || sparse) at most epsilon."),
    ] = Constraint.ce,
    tau: Annotated[
        float | None, typer.Option(help="Bound on the cross-entropy, nats. [default: dense loss + slack]")
    ] = None,
    slack: Annotated[float, typer.Option(min=0.0, help="Nats that the loss may be above the dense model's.")] = 0.01,
    epsilon: Annotated[float, typer.Option(min=0.0, help="Bound on KL(dense || sparse), nats.")] = 0.05,
    train: Annotated[
        Part,
        typer.Option(help="Weights to train besides the gate biases: all, the attention's, or adapters on it."),
    ] = Part.all,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last checkpoint.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks in one forward pass of one process.")] = 4,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Forward passes in one step.")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for a quarter to a third more time.")
    ] = False,
    learning_rate: Annotated[float, typer.Option(min=0.0, max=1e30, help="Of the weights.")] = 3e-4,
    gate_learning_rate: Annotated[float, typer.Option(min=0.0, max=1e30, help="Of the gate biases.")] = 0.2,
    gate_bias: Annotated[
        float, typer.Option(help="Initial bias of every gate; higher starts with more links open.")
    ] = -2.0,
    hard_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the steps, at the end, with hard gates, not sampled.")
    ] = 0.8,
    initial_multiplier: Annotated[
        float,
        typer.Option(min=1e-4, max=1e4, help="lambda at first; low ones close the gates before the bound counts."),
    ] = 0.02,
    multiplier_rate: Annotated[
        float, typer.Option(help="How fast lambda follows: change of log lambda per step and nat of violation.")
    ] = 0.5,
    precision: Annotated[
        Precision, typer.Option(help="Of the matrix products; weights stay float32.")
    ] = Precision.bf16,
    validation_tokens: Annotated[
        int, typer.Option(min=1, help="Unseen text that the bound is held on during training.")
    ] = 8_192,
    held_out_tokens: Annotated[int, typer.Option(min=1, help="Other unseen text, to measure the figures on.")] = 32_768,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")] = 100,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    lora_alpha: Annotated[float, typer.Option(min=1e-3, help="Adapters count lora-alpha / lora-rank times.")] = 32.0,
    lora_targets: Annotated[
        str,
        typer.Option(
            help="Linear maps that adapters go on, with commas between: q_proj,v_proj,mlp.up_proj. "
            "[default: all of the attention]"
        ),
    ] = "",
    control: Annotated[
        bool, typer.Option(help="Also fine-tune the dense model on the same text, for comparison.")
    ] = True,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the text while training, for texts too large to choose blocks from.")
    ] = False,
    stream_workers: Annotated[
        int, typer.Option(min=0, help="Processes that read and tokenise a stream, beside each one that trains.")
    ] = 1,
    report_to: Annotated[
        str, typer.Option(help="Show the training elsewhere too: tensorboard, wandb, trackio, with commas between.")
    ] = "",
) -> None:
    """Post-train MODEL until as few attention links are open as its loss allows, and measure it.

    Leaves in --out: model/ (the sparse model), control/ (the dense model fine-tuned alike), metrics.json
    (the figures), training.jsonl (every step), config.json (all settings); with lora also adapter/ (adapters and
    gates alone). In several processes: torchrun --nproc_per_node 2 -m gossamer sparsify MODEL ... (see launch-file).
    """
    from gossamer.training.constraint import MultiplierConfig
    from gossamer.training.memory import keep_freed_memory
    from gossamer.training.processes import leave, processes, speak_when_terminated
    from gossamer.training.run import Run, RunConfig, post_train
    from gossamer.training.trainer import TrainingConfig

    keep_freed_memory()
    speak_when_terminated()
    here = processes()
    blocks_per_step = batch_size * gradient_accumulation * here.num_processes
    steps = max(1, tokens // (blocks_per_step * seq_len)) if seq_len > 0 else 1
    config = RunConfig(
        model=model,
        text=text,
        seq_len=seq_len,
        validation_tokens=validation_tokens,
        held_out_tokens=held_out_tokens,
        tau=tau,
        slack=slack,
        epsilon=epsilon,
        gate_bias=gate_bias,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_targets=_names(lora_targets),
        control=control,
        stream=stream,
        stream_workers=stream_workers,
        training=TrainingConfig(
            train=train.value,
            steps=steps,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            processes=here.num_processes,
            gradient_checkpointing=gradient_checkpointing,
            learning_rate=learning_rate,
            gate_learning_rate=gate_learning_rate,
            hard_fraction=hard_fraction,
            constraint=constraint.value,
            multiplier=MultiplierConfig(initial=initial_multiplier, rate=multiplier_rate),
            precision=precision.value,
            checkpoint_every=checkpoint_every,
            seed=seed,
        ),
    )
    watchers = [name.strip() for name in report_to.split(",") if name.strip()]
    run = post_train(config, out, resume=resume, report_to=watchers, console=console, warn=_warn)
    leave()
    if here.is_main_process:
        _evaluate(Run(run.folder), Precision.fp32, 8)


@app.command("launch-file")
def launch_file(name: Annotated[str, typer.Argument(help="ddp, fsdp2 or deepspeed.")]) -> None:
    """Print where the configuration NAME for several processes is: accelerate launch --config_file takes it.

    accelerate launch --config_file "$(gossamer launch-file fsdp2)" --num_processes 8 -m gossamer sparsify MODEL ...
    """
    from gossamer.training import launch

    print(launch.launch_file(name))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    precision: Annotated[Precision, typer.Option(help="Of the forward passes.")] = Precision.fp32,
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks, or requests of a task, in one forward pass.")] = 8,
    tasks: Annotated[
        str | None,
        typer.Option(help="Also these tasks of lm-eval-harness, with commas between: arc_easy,lambada_openai."),
    ] = None,
    task_path: Annotated[
        Path | None,
        typer.Option(help="Directory with tasks of one's own, in YAML files as lm-eval-harness reads them."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. [default: the task's own]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many examples of each task. [default: all]")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Also at these sequence lengths, with commas between: 256,512,1024.")
    ] = None,
) -> None:
    """Measure the models of RUN on held-out text: loss, KL, open links, the top-k baseline; and on tasks."""
    from gossamer.training.memory import keep_freed_memory
    from gossamer.training.run import Run

    keep_freed_memory()
    if lengths is not None:
        _evaluate_lengths(Run(run), lengths, precision, batch_size)
    elif tasks is None:
        _evaluate(Run(run), precision, batch_size)
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        _evaluate_tasks(Run(run), names, task_path, precision, batch_size, num_fewshot, limit)


def _evaluate_lengths(run: "Run", lengths: str, precision: Precision, batch_size: int) -> None:  # type: ignore[name-defined]
    from gossamer.evaluation.lengths import add_lengths, lengths_table

    try:
        asked = [int(length) for length in lengths.split(",")]
    except ValueError as error:
        raise GossamerError(f"--lengths {lengths!r} is not a list of numbers; give for example 256,512") from error
    run.record()
    if not run.metrics.exists():
        _evaluate(run, precision, batch_size)
    with console.status("evaluating") as status:
        metrics = add_lengths(
            run, asked, precision=precision.value, progress=lambda what: status.update(f"evaluating: {what}")
        )
    console.print(lengths_table(metrics))


def _evaluate_tasks(
    run: "Run",  # type: ignore[name-defined]
    names: list[str],
    task_path: Path | None,
    precision: Precision,
    batch_size: int,
    num_fewshot: int | None,
    limit: int | None,
) -> None:
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging

    from gossamer.evaluation.capability import add_tasks, check_tasks, task_table

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    if not names:
        raise GossamerError("--tasks names no task")
    run.record()
    check_tasks(names, task_path)
    _evaluate(run, precision, batch_size)
    metrics = add_tasks(
        run,
        names,
        task_path=task_path,
        shots=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        precision=precision.value,
        seed=run.config().training.seed,
        progress=lambda what: console.print(what),
    )
    console.print(task_table(metrics))


def _evaluate(run: "Run", precision: Precision, batch_size: int) -> None:  # type: ignore[name-defined]
    from gossamer.evaluation.evaluate import evaluate_run, summary_tables, verdict

    with console.status("evaluating") as status:
        metrics = evaluate_run(
            run,
            precision=precision.value,
            batch_size=batch_size,
            progress=lambda what: status.update(f"evaluating: {what}"),
        )
    for table in summary_tables(metrics):
        console.print(table)
    console.print(verdict(metrics), style="bold")


@app.command()
def task(
    name: Annotated[str, typer.Argument(help="A task's name, or a .jsonl file with examples of one's own.")],
    model: Annotated[str, typer.Option(help="A run, a saved sparse model, or a dense model as for sparsify.")],
    examples: Annotated[int, typer.Option(min=1, help="How many examples the model is asked.")] = 100,
    show: Annotated[int, typer.Option(min=0, help="How many of them are printed.")] = 3,
    corruption: Annotated[
        str | None, typer.Option(help="Kind of corrupted prompts. [default: the task's first]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
) -> None:
    """Show examples of a task, and how well MODEL does it."""
    from collections import Counter

    from gossamer.circuits.ability import measure_ability
    from gossamer.circuits.tasks import find_task

    chosen = find_task(name)
    network, tokenizer = _load(model)
    prompts = chosen.prompts(tokenizer, examples, seed=seed, corruption=corruption)
    table = Table(title=escape(f"{chosen.name}: {chosen.summary}"))
    for column in ("clean", "corrupted", "right", "wrong"):
        table.add_column(column)
    for tokens in prompts.kept[:show]:
        example = tokens.example
        table.add_row(*map(escape, (example.clean, example.corrupted, _some(example.answers), _some(example.wrong))))
    console.print(table)
    for reason, times in Counter(dropped.reason for dropped in prompts.dropped).most_common():
        console.print(f"{times} dropped: {reason}", markup=False)
    ability = measure_ability(network, prompts)
    facts: dict[str, object] = {
        "prompts": ability.prompts,
        "right": f"{100 * ability.accuracy:.1f} %",
        f"{prompts.metric.replace('_', ' ')}, clean": f"{ability.clean:.3f}",
        f"{prompts.metric.replace('_', ' ')}, corrupted": f"{ability.corrupted:.3f}",
    }
    console.print(_facts(model, facts))


class Ablation(str, Enum):
    """What units outside a circuit carry."""

    patch = "patch"
    zero = "zero"
    mean = "mean"


@app.command()
def circuits(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    task: Annotated[str, typer.Option(help="A task's name, or a .jsonl file with examples of one's own.")],
    examples: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 100,
    corruption: Annotated[
        str | None, typer.Option(help="Kind of corrupted prompts. [default: the task's first]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="Repeat with so many seeds, from --seed on, and show the spread.")
    ] = 1,
    rephrased: Annotated[
        bool, typer.Option("--rephrased", help="Repeat with each of the task's other sets of templates.")
    ] = False,
    ig_steps: Annotated[int, typer.Option(min=0, help="Steps of integrated gradients; 0: none (EAP).")] = 5,
    ablation: Annotated[
        Ablation, typer.Option(help="What units outside a circuit carry: the corrupted run's values, zero or a mean.")
    ] = Ablation.patch,
    signed: Annotated[
        bool, typer.Option("--signed", help="Choose units by highest score, not by largest absolute score.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in one forward pass.")] = 16,
    force: Annotated[bool, typer.Option("--force", help="Go on even if a model cannot do the task.")] = False,
) -> None:
    """Find circuits of RUN's sparse model and of its dense original, prove them by intervention, compare them.

    Leaves in RUN/circuits/TASK: circuits.json (the figures), scores.safetensors (of all edges), links.json.
    """
    from transformers.utils import logging

    from gossamer.circuits.compare import SearchConfig, compare_circuits, comparison_tables
    from gossamer.circuits.tasks import find_task
    from gossamer.training.memory import keep_freed_memory
    from gossamer.training.run import Run

    logging.disable_progress_bar()
    keep_freed_memory()
    config = SearchConfig(
        examples=examples,
        corruption=corruption,
        seed=seed,
        seeds=seeds,
        rephrased=rephrased,
        steps=ig_steps,
        ablation=ablation.value,
        absolute=not signed,
        batch_size=batch_size,
        forced=force,
    )
    with console.status("circuits") as status:
        record = compare_circuits(Run(run), find_task(task), config, progress=lambda what: status.update(escape(what)))
    for table in comparison_tables(record):
        console.print(table)


class Which(str, Enum):
    """The models of a run."""

    dense = "dense"
    sparse = "sparse"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Directory of a run whose circuits have been found.")],
    task: Annotated[str, typer.Option(help="The task, as gossamer circuits was given it.")],
    out: Annotated[
        Path, typer.Option(help="File to write: .json or .pt (as EAP-IG and the MIB leaderboard), .graphml.")
    ],
    model: Annotated[Which, typer.Option(help="Whose circuit.")] = Which.sparse,
    edges: Annotated[
        int | None, typer.Option(min=1, help="Edges kept, before pruning. [default: those that explain 90 %]")
    ] = None,
) -> None:
    """Write a circuit that gossamer circuits has found for other tools."""
    from gossamer.circuits.compare import load_circuit
    from gossamer.circuits.interchange import write_circuit
    from gossamer.training.run import Run

    circuit = load_circuit(Run(run), task, model.value, edges)
    write_circuit(out, circuit)
    console.print(f"{out}: {int(circuit.kept.sum()):,} of {int(circuit.graph.possible().sum()):,} edges", markup=False)


@app.command()
def prove(
    circuit: Annotated[Path, typer.Argument(help="A circuit: .json or .pt of EAP-IG, or .graphml.")],
    model: Annotated[str, typer.Option(help="A run, a saved sparse model, or a dense model as for sparsify.")],
    task: Annotated[str, typer.Option(help="A task's name, or a .jsonl file with examples of one's own.")],
    examples: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 100,
    corruption: Annotated[
        str | None, typer.Option(help="Kind of corrupted prompts. [default: the task's first]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    ablation: Annotated[Ablation, typer.Option(help="What edges outside the circuit carry.")] = Ablation.patch,
    force: Annotated[bool, typer.Option("--force", help="Go on even if the model cannot do the task.")] = False,
) -> None:
    """Measure how much of a task the CIRCUIT in a file explains: keep its edges, patch all others, run MODEL."""
    from gossamer.circuits.ability import measure_ability, require_ability
    from gossamer.circuits.interchange import read_circuit, require_graph_of
    from gossamer.circuits.search import faithfulness_of
    from gossamer.circuits.tasks import find_task

    found, chosen = read_circuit(circuit), find_task(task)
    network, tokenizer = _load(model)
    require_graph_of(network, found, circuit)
    prompts = chosen.prompts(tokenizer, examples, seed=seed, corruption=corruption)
    require_ability(measure_ability(network, prompts), chosen.name, forced=force)
    point = faithfulness_of(network, prompts, found.kept, ablation=ablation.value)
    facts: dict[str, object] = {
        "edges": f"{point.size:,} of {int(found.graph.possible().sum()):,}",
        f"mean {prompts.metric.replace('_', ' ')}": f"{point.metric:.3f}",
        "faithfulness": f"{point.faithfulness:.3f}",
    }
    console.print(_facts(f"{circuit} on {chosen.name}", facts))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    out: Annotated[Path | None, typer.Option(help="File of the page. [default: report.html in RUN]")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write every figure as PNG and SVG into this directory.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens shown of each held-out text.")] = 32,
) -> None:
    """Write the page of RUN: attention of some prompts, dense beside sparse, circuits, and every figure.

    The page is one file that opens offline. Attention is recorded once, in RUN/attention.json.
    """
    from gossamer.report.html import write_report
    from gossamer.report.plots import save_figures
    from gossamer.report.records import load_records

    records = load_records(run)
    if records.attention is None and records.metrics is not None:
        _record_attention(run, [task.links["prompt"] for task in records.tasks.values() if task.links], tokens)
    if figures is not None:
        save_figures(load_records(run), figures)
    console.print(str(write_report(run, out)), markup=False, highlight=False, soft_wrap=True)


def _record_attention(run: Path, prompts: list[str], tokens: int) -> None:
    from gossamer.circuits.attention_record import AttentionPrompt, write_attention
    from gossamer.training.run import Run

    models, tokenizer = _both(Run(run))
    shown = [AttentionPrompt(tuple(tokenizer(prompt)["input_ids"]), "task") for prompt in dict.fromkeys(prompts)]
    blocks = Run(run).blocks("held_out")[:4, :tokens].tolist()
    shown += [AttentionPrompt(tuple(block), "held-out text") for block in blocks]
    with console.status("recording attention"):
        write_attention(run, models, tokenizer, shown)


def _both(run: "Run") -> "tuple[dict[str, PreTrainedModel], PreTrainedTokenizerBase]":  # type: ignore[name-defined]
    """The dense and the sparse model of a run, and their tokenizer."""
    from transformers.utils import logging

    from gossamer.models.pretrained import load_dense
    from gossamer.training.run import load_sparse

    logging.disable_progress_bar()
    dense, tokenizer = load_dense(run.dense)
    return {"dense": dense.eval(), "sparse": load_sparse(run).eval()}, tokenizer


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    prompt: Annotated[str, typer.Argument(help="Any text.")],
    out: Annotated[Path | None, typer.Option(help="File of the page. [default: view.html in RUN]")] = None,
) -> None:
    """Show how the dense and the sparse model of RUN attend on a new PROMPT, as a page of its own."""
    from dataclasses import replace

    from gossamer.circuits.attention_record import AttentionPrompt, record_attention
    from gossamer.files import write_text
    from gossamer.report.html import page
    from gossamer.report.records import load_records
    from gossamer.training.run import Run

    records = load_records(run)
    models, tokenizer = _both(Run(run))
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise GossamerError("the prompt is empty; give some text")
    longest = getattr(models["dense"].config, "max_position_embeddings", None)
    if longest is not None and len(ids) > longest:
        raise GossamerError(f"the prompt has {len(ids)} tokens, the model takes {longest}; give a shorter one")
    attention = record_attention(models, tokenizer, [AttentionPrompt(tuple(ids), "your prompt")])
    shown = replace(records, attention=attention, tasks={}, findings=None, training=())
    file = run / "view.html" if out is None else out
    write_text(file, page(shown))
    console.print(str(file), markup=False, highlight=False, soft_wrap=True)


def _some(texts: tuple[str, ...]) -> str:
    shown = " ".join(repr(text) for text in texts[:4])
    return shown if len(texts) <= 4 else f"{shown} and {len(texts) - 4} more"


def _load(target: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":  # type: ignore[name-defined]
    """The model and tokenizer of a run, a saved sparse model, or a dense model by name."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    from gossamer.models.checkpoint import is_saved_model, load
    from gossamer.models.pretrained import load_dense
    from gossamer.training.run import Run, load_sparse

    logging.disable_progress_bar()
    run = Run(Path(target))
    if (run.folder / "blocks.safetensors").exists():
        return load_sparse(run), PreTrainedTokenizerFast.from_pretrained(run.model)
    if is_saved_model(Path(target)):
        return load(target), PreTrainedTokenizerFast.from_pretrained(target)
    return load_dense(target)


@app.command()
def plan(
    preset: Annotated[
        str, typer.Argument(callback=_use_preset, is_eager=True, help="gpt2, smollm2, llama-3.2-1b or olmo-2-7b.")
    ],
    gpus: Annotated[int, typer.Option(min=1, help="Devices, each with a copy of the model.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GiB of each.")] = 80.0,
    gpu_tflops: Annotated[
        float, typer.Option(min=0.01, help="Peak arithmetic of each by its data sheet, 10^12 operations a second.")
    ] = 312.0,
    utilisation: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of that which a step uses.")] = 0.3,
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens.")] = 1_000_000,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a training block.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks in one forward pass of one device.")] = 4,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Forward passes in one step.")] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations a second time.")] = False,
    train: Annotated[Part, typer.Option(help="Weights to train.")] = Part.all,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    lora_targets: Annotated[
        str, typer.Option(help="Linear maps that adapters go on. [default: all of the attention]")
    ] = "",
    constraint: Annotated[
        Constraint, typer.Option(help="kl runs the dense model too: a copy of it, but with lora.")
    ] = Constraint.ce,
    precision: Annotated[Precision, typer.Option(help="Of the matrix products.")] = Precision.bf16,
    control: Annotated[bool, typer.Option(help="Train the dense control as well.")] = True,
) -> None:
    """Estimate memory and time of a run with the settings of PRESET, and say whether it fits. Needs no network."""
    from transformers.utils import logging

    from gossamer.training.plan import MARGIN, RESERVE, StepShape, alternatives, plan_run
    from gossamer.training.presets import find_preset

    logging.set_verbosity_error()
    chosen = find_preset(preset)
    shape = StepShape(
        seq_len=seq_len,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        train=train.value,
        lora_rank=lora_rank,
        lora_targets=_names(lora_targets),
        constraint=constraint.value,
        precision=precision.value,
        gradient_checkpointing=gradient_checkpointing,
        gpus=gpus,
    )
    estimate = plan_run(chosen.config, shape)
    gib = 2**30
    moments = estimate.moments
    table = Table(title=escape(f"{chosen.summary}: estimated memory of one device, GiB, at four moments of a step"))
    table.add_column("")
    for name in moments:
        table.add_column(name, justify="right")
    for term in dict.fromkeys(term for terms in moments.values() for term in terms):
        if any(terms.get(term) for terms in moments.values()):
            table.add_row(term, *(f"{terms.get(term, 0) / gib:.2f}" for terms in moments.values()))
    table.add_section()
    table.add_row("sum", *(f"{sum(terms.values()) / gib:.2f}" for terms in moments.values()))
    console.print(table)

    room = gpu_memory * gib - RESERVE
    speed = estimate.tokens_per_second(gpus, gpu_tflops, utilisation)
    seconds = tokens / speed
    if control:
        seconds *= 1 + estimate.control_flops_per_token / estimate.flops_per_token
    facts: dict[str, object] = {
        "parameters, trained": f"{estimate.parameters:,}, {estimate.trained:,}",
        "step": f"{gpus} × {gradient_accumulation} × {batch_size} blocks of {seq_len} tokens; train {train.value}, "
        f"constraint {constraint.value}, {precision.value}" + (", checkpointing" if gradient_checkpointing else ""),
        "peak, estimated": f"{estimate.peak / gib:.1f} GiB of {gpu_memory:.1f}, of which {RESERVE / gib:.1f} are left "
        "to CUDA and its allocator",
        "speed, estimated": f"{speed:,.0f} tokens/s, if {100 * utilisation:.0f} % of {gpu_tflops:g} TFLOP/s are used",
        f"{tokens:,} tokens{', and the control' if control else ''}": _duration(seconds),
        "settings tried": "yes, see docs/results.md" if chosen.tried else "no: carried over from smaller models",
    }
    console.print(_facts("Estimate", facts))
    low = f"the {100 * (MARGIN - 1):.0f} % that an allocator may take besides"
    needed = MARGIN * estimate.peak
    if needed <= room:
        console.print(f"It should fit, with {(room - needed) / gib:.1f} GiB to spare beyond {low}.", style="bold")
        return
    verdict = f"It may just fit, without {low}" if estimate.peak <= room else "It does not fit"
    console.print(f"{verdict}. What would help:", style="bold")
    for flags, _, peak in alternatives(chosen.config, shape, room):
        fits = MARGIN * peak <= room
        console.print(f"  {flags}: {peak / gib:.1f} GiB{', fits' if fits else ''}", soft_wrap=True)
    if not fits:
        console.print("None of these is enough: take a device with more memory.")


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


@app.command("import")
def import_(
    checkpoint: Annotated[
        Path, typer.Argument(help="A file that torch.save wrote, in nanoGPT's or TransformerLens' layout.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the sparse model; must not exist yet.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="A directory or Hub id whose tokenizer is saved along (GPT-2's: gpt2).")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads. [default: from the file, or GPT-2's for its width]")
    ] = None,
    activation: Annotated[
        MLPActivation, typer.Option(help="Of the MLPs: GPT-2's own gelu_new, or the exact gelu of newer nanoGPT.")
    ] = MLPActivation.gelu_new,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Keep so many vocabulary rows: 50257 drops the padding. [default: all]")
    ] = None,
) -> None:
    """Turn a GPT-2 CHECKPOINT trained under gates elsewhere into a sparse model of gossamer's."""
    from transformers.utils import logging

    from gossamer.models.checkpoint import save
    from gossamer.models.imported import import_checkpoint
    from gossamer.models.pretrained import load_tokenizer

    logging.disable_progress_bar()
    if out.exists():
        raise GossamerError(f"{out} exists already; give another --out")
    words = load_tokenizer(tokenizer) if tokenizer is not None else None
    save(import_checkpoint(checkpoint, heads=heads, activation=activation.value, vocab_size=vocab_size), out, words)
    _inspect_model(str(out))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory with adapters and gates: RUN/adapter of a run with lora.")],
    model: Annotated[
        str,
        typer.Option(help="The dense model it was trained on: smollm2, a directory with a saved model, or a Hub id."),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the sparse model; must not exist yet.")],
) -> None:
    """Put ADAPTER on its dense model: a sparse model as sparsify leaves it in model/."""
    from transformers.utils import logging

    from gossamer.models.checkpoint import save
    from gossamer.models.lora_files import load_adapter
    from gossamer.models.pretrained import load_dense

    logging.disable_progress_bar()
    if out.exists():
        raise GossamerError(f"{out} exists already; give another --out")
    dense, tokenizer = load_dense(model)
    save(load_adapter(adapter, dense, inplace=True), out, tokenizer)
    _inspect_model(str(out))


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="A run, a saved sparse model, or a dense model as for sparsify.")],
) -> None:
    """Show what TARGET is: its settings and figures, or whether gossamer can gate it."""
    from gossamer.training.run import Run

    folder = Path(target)
    if (folder / "blocks.safetensors").exists():
        _inspect_run(Run(folder))
    else:
        _inspect_model(target)


def _inspect_run(run: "Run") -> None:  # type: ignore[name-defined]
    from gossamer.evaluation.evaluate import summary_tables, verdict

    config = dataclasses.asdict(run.config())
    rows = {**config.pop("training"), **config}
    console.print(_facts(f"Run {run.folder}", {key: value for key, value in rows.items() if key != "multiplier"}))
    if not run.metrics.exists():
        console.print("Not evaluated yet: finish it with --resume, then gossamer evaluate.")
        return
    metrics = json.loads(run.metrics.read_text())
    for table in summary_tables(metrics):
        console.print(table)
    console.print(verdict(metrics), style="bold")
    if "addition" in metrics:
        _show_demo(run)


def _inspect_model(target: str) -> None:
    from gossamer.models.architectures import architecture_of
    from gossamer.models.checkpoint import gate_biases, is_saved_model, load
    from gossamer.models.pretrained import load_dense

    gated = is_saved_model(Path(target))
    model = load(target) if gated else load_dense(target)[0]
    config = model.config
    facts: dict[str, object] = {
        "family": config.model_type,
        "parameters": f"{model.num_parameters():,}",
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key/value heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "context (tokens)": getattr(config, "max_position_embeddings", "unknown"),
    }
    if gated:
        biases = gate_biases(model)
        facts["gate bias"] = f"{biases.min():.2f} to {biases.max():.2f}, mean {biases.mean():.2f}"
    else:
        architecture_of(model)
        facts["can be gated"] = "yes"
    console.print(_facts(f"{'Sparse' if gated else 'Dense'} model {target}", facts))


def _facts(title: str, facts: dict[str, object]) -> Table:
    table = Table(title=escape(title), show_header=False)
    for key, value in facts.items():
        table.add_row(key, escape(str(value)))
    return table


def main() -> None:
    """Run the command line; one line to stderr and exit code 2 for what the user can mend.

    Of several processes the first one speaks; faults that are not the user's have their traceback from any.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        with nullcontext() if first else _silence():
            app()
    except StoppedTogether as error:
        from gossamer.training.processes import leave

        if first:
            _say(one_line(error))
        leave()
    except (GossamerError, OSError) as error:
        if first:
            _say(one_line(error))
    except KeyboardInterrupt:
        if first:
            _say("interrupted; go on with --resume")
    except RuntimeError as error:
        from gossamer.training.processes import HOW_TO_GO_ON, lost_process

        if not lost_process(error):
            raise
        _say(f"another process of the run ended; {HOW_TO_GO_ON}")
        os._exit(2)
    else:
        return
    raise SystemExit(2)


@contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def _say(line: str) -> None:
    print(f"gossamer: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
