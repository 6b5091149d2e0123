"""sparsify, and what goes before it and comes after: launch-file, plan, import, merge."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gossamer.cli.common import Precision, app, console, facts_table, names, warn
from gossamer.cli.evaluation import evaluate_and_show, inspect_model
from gossamer.errors import GossamerError


class Constraint(str, Enum):
    """Kinds of constraint."""

    ce = "ce"
    kl = "kl"


class Objective(str, Enum):
    """What is minimised."""

    fraction = "fraction"
    log = "log"


class Part(str, Enum):
    """Which weights are trained."""

    all = "all"
    attention = "attention"
    lora = "lora"


class MLPActivation(str, Enum):
    """Activation functions of GPT-2's MLPs."""

    gelu_new = "gelu_new"
    gelu = "gelu"


def use_preset(context: typer.Context, name: str | None) -> str | None:
    """Let the preset's settings stand where the command line says nothing."""
    if name is not None:
        from gossamer.training.presets import find_preset

        context.default_map = {**(context.default_map or {}), **find_preset(name).settings}
    return name


@app.command()
def sparsify(
    model: Annotated[str, typer.Argument(help="smollm2, a directory with a saved model, or a Hub id.")],
    text: Annotated[
        str,
        typer.Option(
            help="Training text: a .txt, .jsonl or .json file (documents under 'text'; also .gz, .bz2, .xz, .zst), a "
            "directory of such files, a Hub data set (org/name, or hub:NAME:CONFIG:SPLIT), or 'self' to sample text "
            "from the model itself."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the run; must not exist yet.")],
    preset: Annotated[
        str | None,
        typer.Option(
            is_eager=True,
            callback=use_preset,
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
    margin: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="How far inside the bound training aims, and the weights kept are to be, nats; of epsilon at most a "
            "tenth. More where little text steers it.",
        ),
    ] = 0.005,
    objective: Annotated[
        Objective,
        typer.Option(help="What is minimised: the expected open fraction, or its log; then start lambda near 10."),
    ] = Objective.fraction,
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
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a finished run of MODEL: start from its sparse model and gates, not from the dense "
            "model, say at a longer --seq-len. The bound stays the dense model's."
        ),
    ] = None,
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
    multiplier_proportional: Annotated[
        float,
        typer.Option(min=0.0, help="How much log lambda answers at once to each nat of violation; damps its swing."),
    ] = 0.0,
    precision: Annotated[
        Precision, typer.Option(help="Of the matrix products; weights stay float32.")
    ] = Precision.bf16,
    validation_tokens: Annotated[
        int, typer.Option(min=1, help="Unseen text that the bound is held on during training.")
    ] = 8_192,
    validate_every: Annotated[
        int,
        typer.Option(min=1, help="Steps between measurements of the bound, which move lambda; fewer for tight bounds."),
    ] = 20,
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
        bool,
        typer.Option("--stream", help="Read the text while training: many documents, too large to choose blocks from."),
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
        margin=margin,
        gate_bias=gate_bias,
        start_from=None if start_from is None else str(start_from),
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_targets=names(lora_targets),
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
            objective=objective.value,
            multiplier=MultiplierConfig(
                initial=initial_multiplier, rate=multiplier_rate, proportional=multiplier_proportional
            ),
            validate_every=validate_every,
            precision=precision.value,
            checkpoint_every=checkpoint_every,
            seed=seed,
        ),
    )
    watchers = names(report_to)
    run = post_train(config, out, resume=resume, report_to=watchers, console=console, warn=warn)
    leave()
    if here.is_main_process:
        evaluate_and_show(Run(run.folder), Precision.fp32, 8)


@app.command("launch-file")
def launch_file(name: Annotated[str, typer.Argument(help="ddp, fsdp2 or deepspeed.")]) -> None:
    """Print where the configuration NAME for several processes is: accelerate launch --config_file takes it.

    accelerate launch --config_file "$(gossamer launch-file fsdp2)" --num_processes 8 -m gossamer sparsify MODEL ...
    """
    from gossamer.training import launch

    print(launch.launch_file(name))


@app.command()
def plan(
    preset: Annotated[
        str, typer.Argument(callback=use_preset, is_eager=True, help="gpt2, smollm2, llama-3.2-1b or olmo-2-7b.")
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
        lora_targets=names(lora_targets),
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
        "settings tried": "yes, see docs/runs.md" if chosen.tried else "no: carried over from smaller models",
    }
    console.print(facts_table("Estimate", facts))
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
    from gossamer.models.vocabulary import require_vocabulary

    logging.disable_progress_bar()
    if out.exists():
        raise GossamerError(f"{out} exists already; give another --out")
    words = load_tokenizer(tokenizer) if tokenizer is not None else None
    model = import_checkpoint(checkpoint, heads=heads, activation=activation.value, vocab_size=vocab_size)
    if words is not None:
        require_vocabulary(model, words, "what the tokenizer makes")
    save(model, out, words)
    inspect_model(str(out))


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
    inspect_model(str(out))
