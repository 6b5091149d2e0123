"""Code shared by the commands: the app, the console, choices, and loading models by the names that users give."""

from enum import Enum
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from gossamer.errors import GossamerError
from gossamer.tables import Table

app = typer.Typer(
    name="gossamer",
    help="Makes a trained transformer's attention sparse enough to read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


class Precision(str, Enum):
    """Precision of the matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"


def warn(line: str) -> None:
    """Print a warning to stderr."""
    Console(stderr=True).print(f"warning: {line}", style="yellow", soft_wrap=True, markup=False)


def split_names(text: str) -> tuple[str, ...]:
    """Split comma-separated names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def key_value_table(title: str, facts: dict[str, object]) -> Table:
    """A table of facts by name, one per line."""
    table = Table(title=escape(title), show_header=False)
    for key, value in facts.items():
        table.add_row(key, escape(str(value)))
    return table


def load_model_and_tokenizer(target: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":  # type: ignore[name-defined]
    """Load model and tokenizer of a run, a saved sparse model or adapter (local or on the Hub), or a dense model."""
    from transformers.utils import logging

    from gossamer.models.checkpoint import is_saved_model, load
    from gossamer.models.lora_files import adapter_base, is_adapter, load_adapter
    from gossamer.models.pretrained import load_dense
    from gossamer.models.repositories import gossamer_folder
    from gossamer.models.shipped import SHIPPED, load_shipped
    from gossamer.models.tokenizers import load_own_tokenizer
    from gossamer.runs.record import Run, load_sparse

    logging.disable_progress_bar()
    if target in SHIPPED and not Path(target).exists():
        return load_shipped(target)
    run = Run(Path(target))
    if (run.folder / "blocks.safetensors").exists():
        return load_sparse(run), load_own_tokenizer(run.model)
    folder = gossamer_folder(target) or Path(target)
    if is_saved_model(folder):
        return load(folder), load_own_tokenizer(folder)
    if is_adapter(folder):
        dense, tokenizer = load_dense(adapter_base(folder))
        return load_adapter(folder, dense, inplace=True), tokenizer
    return load_dense(target)


def load_dense_and_sparse(
    model: str, dense: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]":  # type: ignore[name-defined]
    """Load the named or recorded dense model of a sparse model, the sparse model, and their tokenizer."""
    from gossamer.models.checkpoint import is_run
    from gossamer.models.convert import is_gated
    from gossamer.models.vocabulary import embeddings
    from gossamer.runs.record import Run, load_both

    if dense is None and is_run(Path(model)):
        return load_both(Run(Path(model)))
    sparse, tokenizer = load_model_and_tokenizer(model)
    if not is_gated(sparse):
        raise GossamerError(f"{model} is a dense model; give a sparse one")
    original = _dense_of(model) if dense is None else load_model_and_tokenizer(dense)[0]
    if embeddings(original) != embeddings(sparse):
        raise GossamerError(
            f"the dense model knows {embeddings(original):,} tokens and {model} {embeddings(sparse):,}; give the dense "
            "model that it was made from"
        )
    return original, sparse, tokenizer


def dense_name(model: str) -> str:
    """The name of the dense model that a sparse model records as its origin; ``unknown`` if it records none."""
    from gossamer.models.checkpoint import is_run, saved_base
    from gossamer.models.lora_files import adapter_base, is_adapter
    from gossamer.models.repositories import gossamer_folder
    from gossamer.models.shipped import SHIPPED, shipped_adapter
    from gossamer.runs.record import Run

    if is_run(Path(model)):
        return Run(Path(model)).config().model
    folder = gossamer_folder(model) or Path(model)
    if model in SHIPPED and not folder.exists():
        return adapter_base(shipped_adapter(model))
    return adapter_base(folder) if is_adapter(folder) else saved_base(folder)


def _dense_of(model: str) -> "PreTrainedModel":  # type: ignore[name-defined]
    base = dense_name(model)
    if base == "unknown":
        raise GossamerError(f"{model} does not say which dense model it was made from; give it as --dense")
    return load_model_and_tokenizer(base)[0]
