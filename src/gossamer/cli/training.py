"""The command sparsify, and the commands before and after it: settings, launch-file, plan, import, merge."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from gossamer.cli.common import Precision, app, console, key_value_table, split_names, warn
from gossamer.cli.evaluation import evaluate_and_show, inspect_model
from gossamer.cli.options import ConfigOption, PresetOption, merge_settings, with_settings
from gossamer.errors import GossamerError
from gossamer.tables import Table

_GIB = 2**30


class MLPActivation(str, Enum):
    """Activation functions of GPT-2's MLPs."""

    gelu_new = "gelu_new"
    gelu = "gelu"


@app.command()
@with_settings(
    "model",
    "text",
    "tokens",
    "seq_len",
    "constraint*",
    "train",
    "seed",
    "control",
    "batch_size",
    "start_from",
    "stream",
)
def sparsify(
    out: Annotated[Path, typer.Option(help="Directory of the run; must not exist yet.")],
    given: Mapping[str, Any],
    preset: PresetOption = None,
    config: ConfigOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --out.")] = False,
    report_to: Annotated[str, typer.Option(help="Also log to tensorboard, wandb or trackio.")] = "",
) -> None:
    """Post-train MODEL until as few attention links are open as the bound allows, and measure it.

    Writes to --out: model/ (the sparse model), control/ (the dense model
    fine-tuned on the same text), metrics.json, training.jsonl and config.json.
    Options override --config, which overrides --preset; gossamer settings
    prints every setting. For several GPUs see gossamer launch-file.
    """
    from gossamer.runs.job import post_train
    from gossamer.training.distributed import exit_on_sigterm, leave_process_group, processes
    from gossamer.training.malloc import keep_freed_memory

    settings = merge_settings(preset, config, given)
    keep_freed_memory()
    exit_on_sigterm()
    here = processes()
    settings = settings.in_processes(here.num_processes)
    run = post_train(settings, out, resume=resume, report_to=split_names(report_to), console=console, warn=warn)
    leave_process_group()
    if here.is_main_process:
        evaluate_and_show(run, Precision(run.config().training.precision), 8)


@app.command("settings")
def print_settings(preset: PresetOption = None) -> None:
    """Print a settings file for sparsify --config: every setting with its meaning, at its default or as in --preset."""
    from gossamer.runs.presets import find_preset
    from gossamer.runs.settings_file import all_settings

    print(all_settings(None if preset is None else find_preset(preset).settings), end="")


@app.command("launch-file")
def launch_file(name: Annotated[str, typer.Argument(help="ddp, fsdp2 or deepspeed.")]) -> None:
    """Print the path of a configuration for accelerate launch --config_file: ddp, fsdp2 or deepspeed.

    accelerate launch --config_file "$(gossamer launch-file fsdp2)" --num_processes 8 -m gossamer sparsify MODEL ...
    """
    from gossamer.training import launch

    print(launch.launch_file(name))


@app.command()
@with_settings(
    "tokens", "seq_len", "batch_size", "gradient_accumulation", "gradient_checkpointing", "train", "lora_rank",
    "lora_targets", "constraint", "precision", "control",
)  # fmt: skip
def plan(
    preset: Annotated[str, typer.Argument(help="gpt2, smollm2, llama-3.2-1b or olmo-2-7b.")],
    given: Mapping[str, Any],
    config: ConfigOption = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of devices, each with a copy of the model.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="Memory of each device in GiB.")] = 80.0,
    gpu_tflops: Annotated[
        float, typer.Option(min=0.01, help="Peak TFLOP/s of each device, from its data sheet.")
    ] = 312.0,
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the peak that a step reaches.")
    ] = 0.3,
) -> None:
    """Estimate the memory and time of a run with the settings of PRESET, and whether it fits. Works offline."""
    from transformers.utils import logging

    from gossamer.runs.plan import RESERVE, plan_run
    from gossamer.runs.presets import find_preset

    logging.set_verbosity_error()
    chosen = find_preset(preset)
    settings = merge_settings(preset, config, given).in_processes(gpus)
    if settings.training.precision == "auto":
        settings = settings.in_precision("bf16")  # plans are for devices that support it in hardware
    estimate = plan_run(chosen.config, settings)
    console.print(_memory_table(chosen.summary, estimate))
    speed = estimate.tokens_per_second(gpus, gpu_tflops, utilisation)
    seconds = settings.tokens / speed
    if settings.control:
        seconds *= 1 + estimate.control_flops_per_token / estimate.flops_per_token
    training = settings.training
    facts: dict[str, object] = {
        "parameters, trained": f"{estimate.parameters:,}, {estimate.trained:,}",
        "step": f"{gpus} × {training.gradient_accumulation} × {training.batch_size} blocks of {settings.seq_len} "
        f"tokens; train {training.train}, constraint {training.constraint.name}, {training.precision}"
        + (", checkpointing" if training.gradient_checkpointing else ""),
        "peak, estimated": f"{estimate.peak / _GIB:.1f} GiB of {gpu_memory:.1f}; {RESERVE / _GIB:.1f} of these are "
        "reserved for CUDA",
        "speed, estimated": f"{speed:,.0f} tokens/s at {100 * utilisation:.0f} % of {gpu_tflops:g} TFLOP/s",
        f"{settings.tokens:,} tokens{', and the control' if settings.control else ''}": _duration(seconds),
        "settings tested": "yes, see docs/runs.md" if chosen.tried else "no: carried over from smaller models",
    }
    console.print(key_value_table("Estimate", facts))
    _say_whether_it_fits(chosen.config, settings, estimate, gpu_memory * _GIB - RESERVE)


def _memory_table(summary: str, estimate: "Plan") -> Table:  # type: ignore[name-defined]
    moments = estimate.moments
    table = Table(title=escape(f"{summary}: estimated memory of one device, GiB, at four moments of a step"))
    table.add_column("")
    for name in moments:
        table.add_column(name, justify="right")
    for term in dict.fromkeys(term for terms in moments.values() for term in terms):
        if any(terms.get(term) for terms in moments.values()):
            table.add_row(term, *(f"{terms.get(term, 0) / _GIB:.2f}" for terms in moments.values()))
    table.add_section()
    table.add_row("sum", *(f"{sum(terms.values()) / _GIB:.2f}" for terms in moments.values()))
    return table


def _say_whether_it_fits(
    model: Mapping[str, Any],
    settings: "RunConfig",  # type: ignore[name-defined]
    estimate: "Plan",  # type: ignore[name-defined]
    room: float,
) -> None:
    """Print whether the run fits into ``room`` bytes, and if not, which settings would."""
    from gossamer.runs.plan import MARGIN, alternatives

    low = f"{100 * (MARGIN - 1):.0f} % for fragmentation"
    needed = MARGIN * estimate.peak
    if needed <= room:
        console.print(f"It should fit, with {(room - needed) / _GIB:.1f} GiB to spare after {low}.", style="bold")
        return
    verdict = f"It may just fit, but without {low}" if estimate.peak <= room else "It does not fit"
    console.print(f"{verdict}. These settings would help:", style="bold")
    fits = False
    for changes, _, peak in alternatives(dict(model), settings, room):
        fits = MARGIN * peak <= room
        written = ", ".join(f"{name}: {str(value).lower()}" for name, value in changes.items())
        console.print(f"  {written}: {peak / _GIB:.1f} GiB{', fits' if fits else ''}", soft_wrap=True)
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
        Path, typer.Argument(help="A file written by torch.save, in nanoGPT's or TransformerLens' layout.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the sparse model; must not exist yet.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="A directory or Hub id; its tokenizer is saved with the model (for GPT-2: gpt2).")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads.", show_default="from the file, or GPT-2's for its width")
    ] = None,
    activation: Annotated[
        MLPActivation,
        typer.Option(help="Activation of the MLPs: GPT-2's gelu_new, or the exact gelu of newer nanoGPT."),
    ] = MLPActivation.gelu_new,
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="Number of vocabulary rows to keep; 50257 drops the padding.", show_default="all"),
    ] = None,
) -> None:
    """Convert a GPT-2 CHECKPOINT that was trained with gates elsewhere into a gossamer sparse model."""
    from transformers.utils import logging

    from gossamer.models.checkpoint import save
    from gossamer.models.imported import import_checkpoint
    from gossamer.models.pretrained import dense_tokenizer
    from gossamer.models.vocabulary import require_vocabulary

    logging.disable_progress_bar()
    if out.exists():
        raise GossamerError(f"{out} exists already; give another --out")
    words = dense_tokenizer(tokenizer) if tokenizer is not None else None
    model = import_checkpoint(checkpoint, heads=heads, activation=activation.value, vocab_size=vocab_size)
    if words is not None:
        require_vocabulary(model, words, "what the tokenizer makes")
    save(model, out, words, replace=False)
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
    """Merge ADAPTER into its dense model; the result is a sparse model like RUN/model."""
    from transformers.utils import logging

    from gossamer.models.checkpoint import save
    from gossamer.models.lora_files import load_adapter
    from gossamer.models.pretrained import load_dense

    logging.disable_progress_bar()
    if out.exists():
        raise GossamerError(f"{out} exists already; give another --out")
    dense, tokenizer = load_dense(model)
    save(load_adapter(adapter, dense, inplace=True), out, tokenizer, replace=False)
    inspect_model(str(out))
