"""The commands demo, report and view, which write pages to look at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from gossamer.cli.common import app, console, warn
from gossamer.errors import GossamerError
from gossamer.fields import LARGEST_SEED


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run; must not exist yet.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything random.")] = 0,
) -> None:
    """Train a small model to add two-digit numbers, make it sparse, and say in words how it adds. Takes minutes.

    Writes a run like that of sparsify to --out, with the dense model in dense/ and the sentences in findings.json.
    """
    from gossamer.demo.demonstrate import demo_config, demonstrate
    from gossamer.training.malloc import keep_freed_memory

    keep_freed_memory()
    with console.status("measuring") as status:
        status.stop()

        def show(what: str) -> None:
            status.start()
            status.update(escape(what))

        try:
            run = demonstrate(out, demo_config(seed), console=console, warn=warn, progress=show)
        except KeyboardInterrupt as error:
            raise GossamerError(f"interrupted; {out} was not written, begin again") from error
    show_demo(run)


def show_demo(run: "Run") -> None:  # type: ignore[name-defined]
    """Print the circuits, sentences and accuracies recorded by a demo."""
    from gossamer.circuits.tables import comparison_tables
    from gossamer.demo.demonstrate import addition_table
    from gossamer.inputs import reading
    from gossamer.runs.read import EVALUATE, SEARCH, read_circuits, read_findings

    circuits = run.folder / "circuits" / "addition"
    if (circuits / "circuits.json").exists():
        record = read_circuits(circuits)
        with reading(circuits / "circuits.json", SEARCH):
            tables = comparison_tables(record)
        for table in tables:
            console.print(table)
    findings = read_findings(run.folder / "findings.json") or {"sentences": []}
    for sentence in findings["sentences"]:
        console.print(f"- {sentence['text']}", markup=False, highlight=False)
    metrics = run.read_metrics()
    with reading(run.metrics, EVALUATE):
        table = addition_table(metrics)
        seconds = metrics["addition"]["seconds"]
        stages = ", ".join(f"{stage.replace('_', ' ')} {value:.0f} s" for stage, value in seconds.items())
    console.print(table)
    console.print(f"{run.folder}: {stages}", markup=False)
    console.print(f"to look at: {run.folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write.", show_default="report.html in RUN")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write every figure as PNG and SVG into this directory.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Record attention again, on this many tokens of each held-out text.", show_default="32"
        ),
    ] = None,
) -> None:
    """Write the page of RUN: attention of some prompts, dense beside sparse, circuits, and every figure.

    The page is one file that opens offline. Attention is recorded in RUN/attention.json, once unless --tokens is
    given.
    """
    from gossamer.inputs import reading
    from gossamer.report.html import write_report
    from gossamer.report.plots import all_figures, save_figures
    from gossamer.report.records import load_records

    records = load_records(run)
    circuits = [task.links for task in records.tasks.values() if task.links]
    if records.metrics is not None and (records.attention is None or tokens is not None):
        _record_attention(run, circuits, tokens or 32)
    elif records.attention is not None:
        recorded = [prompt["tokens"] for prompt in records.attention["prompts"]]
        if any(links["tokens"] not in recorded for links in circuits):
            warn(f"{run / 'attention.json'} lacks prompts of circuits found since; --tokens 32 records attention anew")
    if figures is not None:
        records = load_records(run)
        with reading(f"a record in {run}", "its files are documented in docs/metrics.md"):
            drawn = list(all_figures(records))
        save_figures(drawn, figures)
    console.print(str(write_report(run, out)), markup=False, highlight=False, soft_wrap=True)


def _record_attention(run: Path, circuits: Sequence[Mapping[str, Any]], tokens: int) -> None:
    from gossamer.circuits.attention_record import AttentionPrompt, write_attention
    from gossamer.runs.record import Run

    models, tokenizer = _both(Run(run))
    # Records of older versions have only the prompt's text, which includes the start token.
    prompts = (
        tuple(links.get("ids") or tokenizer(links["prompt"], add_special_tokens=False)["input_ids"])
        for links in circuits
    )
    shown = [AttentionPrompt(ids, "task") for ids in dict.fromkeys(prompts)]
    blocks = Run(run).blocks("held_out")[:4, :tokens].tolist()
    shown += [AttentionPrompt(tuple(block), "held-out text") for block in blocks]
    with console.status("recording attention"):
        write_attention(run, models, tokenizer, shown)


def _both(run: "Run") -> "tuple[dict[str, PreTrainedModel], PreTrainedTokenizerBase]":  # type: ignore[name-defined]
    """Load the dense and the sparse model of a run, and their tokenizer."""
    from transformers.utils import logging

    from gossamer.runs.record import load_both

    logging.disable_progress_bar()
    dense, sparse, tokenizer = load_both(run)
    return {"dense": dense, "sparse": sparse}, tokenizer


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    prompt: Annotated[str, typer.Argument(help="Any text.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write.", show_default="view.html in RUN")] = None,
) -> None:
    """Show how the dense and the sparse model of RUN attend on a new PROMPT, as a page of its own."""
    from dataclasses import replace

    from gossamer.circuits.attention_record import AttentionPrompt, record_attention
    from gossamer.files import atomic_write_text
    from gossamer.models.tokenizers import prompt_ids
    from gossamer.report.html import page
    from gossamer.report.records import load_records
    from gossamer.runs.record import Run

    records = load_records(run)
    models, tokenizer = _both(Run(run))
    ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise GossamerError("the prompt is empty; give some text")
    longest = getattr(models["dense"].config, "max_position_embeddings", None)
    if longest is not None and len(ids) > longest:
        raise GossamerError(f"the prompt has {len(ids)} tokens, the model takes {longest}; give a shorter one")
    attention = record_attention(models, tokenizer, [AttentionPrompt(tuple(ids), "your prompt")])
    shown = replace(records, attention=attention, tasks={}, findings=None, training=())
    file = run / "view.html" if out is None else out
    atomic_write_text(file, page(shown))
    console.print(str(file), markup=False, highlight=False, soft_wrap=True)
