"""The commands evaluate, compare and inspect: the metrics of models, and what a model is."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.common import (
    Precision,
    app,
    console,
    dense_name,
    key_value_table,
    load_dense_and_sparse,
    load_model_and_tokenizer,
    split_names,
)
from gossamer.cli.option_groups import with_option_groups
from gossamer.cli.pictures import show_demo
from gossamer.errors import GossamerError
from gossamer.fields import setting


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-eval-harness, and how to measure them."""

    tasks: str | None = setting(
        "Also run these tasks of lm-eval-harness, comma-separated: arc_easy,lambada_openai.", None
    )
    task_path: Path | None = setting("Directory with your own tasks, as YAML files of lm-eval-harness.", None)
    allow_task_code: bool = setting("Let these tasks run the Python code their YAML names. Read it first.", False)
    num_fewshot: int | None = setting(
        "Examples before each question.", None, least=0, most=1_000, shown_default="the task's own"
    )
    limit: int | None = setting("At most this many examples of each task.", None, least=1, shown_default="all")


@dataclass(frozen=True)
class LengthOptions:
    """Further sequence lengths to measure at."""

    lengths: str | None = setting("Also measure at these sequence lengths, comma-separated: 256,512,1024.", None)
    held_out_tokens: int | None = setting(
        "Unseen tokens to measure at each of --lengths, at most all there are.",
        None,
        least=1,
        most=10**9,
        shown_default="as the run",
    )


@app.command()
@with_option_groups
def evaluate(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    tasks: TaskOptions,
    lengths: LengthOptions,
    precision: Annotated[Precision, typer.Option(help="Precision of the forward passes.")] = Precision.fp32,
    batch_size: Annotated[
        int, typer.Option(min=1, max=2**20, help="Blocks, or requests of a task, per forward pass.")
    ] = 8,
) -> None:
    """Measure the models of RUN on held-out text (loss, KL, open links, top-k baseline) and on tasks."""
    from transformers.utils import logging

    from gossamer.runs.record import Run
    from gossamer.training.malloc import keep_freed_memory

    keep_freed_memory()
    logging.disable_progress_bar()
    _check_options(Run(run), tasks, lengths)
    if lengths.lengths is not None:
        _evaluate_lengths(Run(run), lengths.lengths, lengths.held_out_tokens, precision, batch_size)
    elif tasks.tasks is None:
        evaluate_and_show(Run(run), precision, batch_size)
    if tasks.tasks is not None:
        config = _tasks_config(tasks, precision, batch_size, Run(run).config().training.seed)
        _evaluate_tasks(Run(run), config, precision)


def _check_options(run: "Run", tasks: TaskOptions, lengths: LengthOptions) -> None:  # type: ignore[name-defined]
    """Refuse options that apply only to measurements that were not requested."""
    _check_task_options(tasks)
    if lengths.held_out_tokens is not None and lengths.lengths is None:
        raise GossamerError(
            f"--held-out-tokens {lengths.held_out_tokens} needs --lengths: the run's own metrics stay on the blocks "
            f"chosen at its start; give for example --lengths {run.config().seq_len}"
        )


def _check_task_options(tasks: TaskOptions) -> None:
    from gossamer.evaluation.task_files import FLAG

    alone = {
        "--task-path": tasks.task_path,
        "--num-fewshot": tasks.num_fewshot,
        "--limit": tasks.limit,
        FLAG: tasks.allow_task_code or None,
    }
    for name, value in alone.items():
        if value is not None and tasks.tasks is None:
            raise GossamerError(f"{name} says how to measure tasks; name them by --tasks, or leave it out")


def _tasks_config(
    tasks: TaskOptions,
    precision: Precision,
    batch_size: int = 8,
    seed: int = 0,
) -> "TasksConfig":  # type: ignore[name-defined]
    """Make the configuration of requested tasks, and silence the harness's progress bars and warnings."""
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging

    from gossamer.evaluation.capability import TasksConfig

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    names = split_names(tasks.tasks or "")
    if not names:
        raise GossamerError("--tasks names no task")
    return TasksConfig(
        names, tasks.task_path, tasks.allow_task_code, tasks.num_fewshot, tasks.limit, batch_size, precision.value, seed
    )


def _evaluate_lengths(
    run: "Run",  # type: ignore[name-defined]
    lengths: str,
    held_out_tokens: int | None,
    precision: Precision,
    batch_size: int,
) -> None:
    from gossamer.evaluation.lengths import add_lengths
    from gossamer.evaluation.tables import lengths_table

    try:
        asked = [int(length) for length in lengths.split(",")]
    except ValueError as error:
        raise GossamerError(f"--lengths {lengths!r} is not a list of numbers; give for example 256,512") from error
    run.record()
    if not run.metrics.exists():
        evaluate_and_show(run, precision, batch_size)
    with console.status("evaluating") as status:
        metrics = add_lengths(
            run,
            asked,
            held_out_tokens=held_out_tokens,
            precision=precision.value,
            progress=lambda what: status.update(f"evaluating: {what}"),
        )
    console.print(lengths_table(metrics["lengths"], f"By length; trained at T = {metrics['seq_len']}"))


def _evaluate_tasks(run: "Run", config: "TasksConfig", precision: Precision) -> None:  # type: ignore[name-defined]
    from gossamer.evaluation.capability import add_tasks, check_tasks
    from gossamer.evaluation.tables import task_table
    from gossamer.models.tokenizers import load_own_tokenizer

    run.record()
    check_tasks(load_own_tokenizer(run.model), config)
    evaluate_and_show(run, precision, config.batch_size)
    metrics = add_tasks(run, config, progress=lambda what: console.print(what))
    console.print(task_table(metrics["tasks"]))


def evaluate_and_show(run: "Run", precision: Precision, batch_size: int) -> None:  # type: ignore[name-defined]
    """Measure a run on held-out text, and print all tables and whether the constraint was met."""
    from gossamer.evaluation.evaluate import evaluate_run
    from gossamer.evaluation.tables import summary_tables, verdict

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
@with_option_groups
def compare(
    model: Annotated[str, typer.Argument(help="smollm2-sparse, a run, a saved sparse model or an adapter.")],
    tasks: TaskOptions,
    text: Annotated[str | None, typer.Option(help="A file or directory of text, as for sparsify.")] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model.", show_default="the one MODEL was made from")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a block of --text.")] = 128,
    tokens: Annotated[
        int, typer.Option(min=2, max=10**9, help="Measure at most this many tokens of --text, from its start.")
    ] = 32_768,
    precision: Annotated[Precision, typer.Option(help="Precision of the forward passes.")] = Precision.fp32,
    out: Annotated[
        Path | None, typer.Option(help="Also write the metrics to this file, as JSON.", show_default="none")
    ] = None,
) -> None:
    """Compare a sparse MODEL with its dense model: loss, KL and open links on a text, capabilities on tasks."""
    from gossamer.evaluation.capability import check_tasks
    from gossamer.files import atomic_write_text
    from gossamer.runs.record import versions
    from gossamer.training.malloc import keep_freed_memory

    _check_task_options(tasks)
    if text is None and tasks.tasks is None:
        raise GossamerError("nothing to compare the models on: give --text, --tasks, or both")
    if out is not None and not out.parent.is_dir():
        raise GossamerError(f"--out {out}: there is no directory {out.parent}; make it first")
    config = None if tasks.tasks is None else _tasks_config(tasks, precision)
    keep_freed_memory()
    models = load_dense_and_sparse(model, dense)
    if config is not None:
        check_tasks(models[2], config)
    record: dict[str, object] = {"model": model, "dense": dense or dense_name(model), "versions": versions()}
    if text is not None:
        record |= {"text": text, "lengths": [_compare_on_text(models, model, text, (seq_len, tokens), precision)]}
    if config is not None:
        record["tasks"] = _compare_on_tasks(models, config)
    if out is not None:
        atomic_write_text(out, json.dumps(record, indent=2) + "\n")


def _compare_on_tasks(models: "Models", config: "TasksConfig") -> dict[str, Any]:  # type: ignore[name-defined]
    from gossamer.evaluation.capability import compare_on_tasks
    from gossamer.evaluation.tables import task_table

    dense, sparse, tokenizer = models
    found = compare_on_tasks(
        {"dense": lambda: dense, "sparse": lambda: sparse}, tokenizer, config, progress=console.print
    )
    console.print(task_table(found))
    return found


def _compare_on_text(
    models: "Models",  # type: ignore[name-defined]
    name: str,
    text: str,
    size: tuple[int, int],
    precision: Precision,
) -> dict[str, Any]:
    """Measure on blocks of ``size[0]`` tokens, at most ``size[1]`` tokens in all, and print the result."""
    from itertools import chain

    from gossamer.evaluation.lengths import measure_at_length
    from gossamer.evaluation.tables import lengths_table
    from gossamer.models.vocabulary import require_embeddings
    from gossamer.training.data import pack
    from gossamer.training.documents import read_documents, text_files

    dense, sparse, tokenizer = models
    seq_len, most = size
    documents = chain.from_iterable(read_documents(file) for file in text_files(Path(text)))
    blocks = pack(documents, tokenizer, seq_len, name=text, most=max(1, most // seq_len))
    for each in (sparse, dense):
        require_embeddings(each, tokenizer, blocks, text)
    with console.status("comparing"):
        row = measure_at_length(sparse, dense, blocks, precision.value)
    console.print(lengths_table([row], f"{name} beside its dense model on {text}, {row['tokens_evaluated']:,} tokens"))
    return row


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(help="A run, smollm2-sparse, a saved sparse model, an adapter, or a dense model.")
    ],
) -> None:
    """Show what TARGET is: its settings and metrics, or whether gossamer can gate it."""
    from gossamer.runs.record import Run

    folder = Path(target)
    if (folder / "blocks.safetensors").exists():
        _inspect_run(Run(folder))
    else:
        inspect_model(target)


def _inspect_run(run: "Run") -> None:  # type: ignore[name-defined]
    from gossamer.evaluation.tables import summary_tables, verdict
    from gossamer.inputs import reading
    from gossamer.runs.read import EVALUATE

    console.print(key_value_table(f"Run {run.folder}", run.config().to_dict()))
    if not run.metrics.exists():
        console.print("Not evaluated yet. Finish the run with sparsify --resume, or run gossamer evaluate.")
        return
    metrics = run.read_metrics()
    with reading(run.metrics, EVALUATE):
        tables = summary_tables(metrics)
    for table in tables:
        console.print(table)
    console.print(verdict(metrics), style="bold")
    if "addition" in metrics:
        show_demo(run)


def inspect_model(target: str) -> None:
    """Print the properties of a saved sparse model or a dense model."""
    from gossamer.models.architectures import architecture_of
    from gossamer.models.checkpoint import gate_biases, is_saved_model, load
    from gossamer.models.convert import is_gated

    # A saved model need not have a tokenizer.
    model = load(target) if is_saved_model(Path(target)) else load_model_and_tokenizer(target)[0]
    gated = is_gated(model)
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
        facts["made from"] = dense_name(target)
        facts["gate bias"] = f"{biases.min():.2f} to {biases.max():.2f}, mean {biases.mean():.2f}"
    else:
        architecture_of(model)
        facts["can be gated"] = "yes"
    console.print(key_value_table(f"{'Sparse' if gated else 'Dense'} model {target}", facts | _shipped_facts(target)))


def _shipped_facts(target: str) -> dict[str, object]:
    """Measurements of a model that comes with gossamer; empty for other models."""
    from gossamer.models.shipped import SHIPPED, shipped_adapter

    if target not in SHIPPED or Path(target).exists():
        return {}
    metrics = json.loads((shipped_adapter(target) / "metrics.json").read_text(encoding="utf-8"))
    measured, label = metrics["held_out"], metrics["run"]["constraint"].upper()
    return {
        "trained on": f"{metrics['tokens_trained']:,} tokens at T = {metrics['run']['seq_len']}, "
        f"{label} at most {metrics['bound']:g}",
        "held-out text": f"{100 * measured['open_fraction']:.2f} % open, {measured['open_links_per_query']:.1f} links "
        f"per query and head, KL {measured['kl']:.3f}",
    }
