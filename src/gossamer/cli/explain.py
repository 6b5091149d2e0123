"""The command explain: which attention links carry one prediction, and why each is open."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from gossamer.cli.common import app, console, load_model_and_tokenizer, split_names, warn
from gossamer.cli.option_groups import with_option_groups
from gossamer.errors import GossamerError
from gossamer.explanations.config import ExplainConfig
from gossamer.fields import setting
from gossamer.tables import Table

_SUFFIXES = (".html", ".json", ".graphml")


@dataclass(frozen=True)
class PredictionOptions:
    """Which prediction to explain, by which metric, and what cut links carry."""

    target: str | None = setting("The token to explain.", None, shown_default="the model's most likely one")
    against: str | None = setting("Explain the logit difference to this token instead of the log-probability.", None)
    corrupted: str | None = setting(
        "A prompt of the same length in tokens: cut links carry its values instead of nothing.", None
    )


@dataclass(frozen=True)
class TextOptions:
    """Options for explaining many predictions of a text."""

    text: str | None = setting(
        "Instead of PROMPT: explain many predictions on the held-out part of this text (as for sparsify), in MODEL and "
        "in --dense. Writes --out FILE.jsonl; a second call continues it.",
        None,
    )
    predictions: int = setting("With --text: predictions per length.", 20, least=1, most=100_000)
    seq_len: str = setting("With --text: numbers of context tokens, comma-separated.", "16,32,64,128,256")


@app.command()
@with_option_groups
def explain(
    model: Annotated[
        str, typer.Argument(help="smollm2-sparse, a run, a saved sparse model, an adapter, or a dense model.")
    ],
    question: PredictionOptions,
    search: ExplainConfig,
    many: TextOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="Text; the prediction of the token after it is explained.")
    ] = None,
    dense: Annotated[str | None, typer.Option(help="Also explain the same prediction in this dense model.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write the picture as PNG and SVG into this directory; needs the report extra.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write: .html (with a .json beside it), .json or .graphml."),
    ] = None,
) -> None:
    """Explain why MODEL predicts what it does after PROMPT: the attention links that carry it.

    A search finds the links; running the model with them alone, and without them, checks them.
    """
    if (prompt is None) == (many.text is None):
        raise GossamerError("give a PROMPT or --text, one of them")
    if prompt is None:
        _explain_text(model, dense, many, search, out)
        return
    if out is not None:
        _check_out(out)
    search = replace(search, links=search.links or ("complete" if dense else "sufficient"))
    _show(_explain_prompt(model, prompt, dense, question, search), figures, out)


def _explain_prompt(
    model: str, prompt: str, dense: str | None, question: PredictionOptions, search: ExplainConfig
) -> dict[str, Any]:
    """Explain one prediction, also in the dense model if one is named, and return the record."""
    from transformers.utils import logging

    from gossamer.explanations.explain import explain as explained
    from gossamer.explanations.explain import explain_prediction
    from gossamer.explanations.record import explanation_record
    from gossamer.training.malloc import keep_freed_memory

    logging.disable_progress_bar()
    keep_freed_memory()
    network, tokenizer = load_model_and_tokenizer(model)
    other = None if dense is None else _dense(dense, tokenizer, prompt)
    beside = None
    with console.status("explaining") as status:

        def progress(name: str, what: str, done: float, size: int) -> None:
            status.update(escape(f"{name}{what}: {100 * done:.0f} %, smallest set {size:,} links"))

        own = partial(progress, "")
        found = explained(network, tokenizer, prompt, config=search, progress=own, **asdict(question))
        if other is not None:
            dense_progress = partial(progress, "dense model, ")
            beside = explain_prediction(
                other, found.prediction, corrupted=found.corrupted, config=search, progress=dense_progress
            )
    if len(found.seeds) < search.seeds:
        warn(f"interrupted: {len(found.seeds)} of {search.seeds} searches were done; this is the smallest set so far")
    return explanation_record(found, tokenizer, model=model, dense=beside)


def _show(record: dict[str, Any], figures: Path | None, out: Path | None) -> None:
    """Print an explanation in words and write the requested files."""
    from gossamer.explanations.record import in_words

    for line in in_words(record):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if figures is not None:
        from gossamer.report.plots import explanation_figure, save_figures

        save_figures([("explanation", explanation_figure(record))], figures)
    if out is not None:
        _write(out, record)
        console.print(str(out), markup=False, highlight=False, soft_wrap=True)


def _check_out(out: Path) -> None:
    if out.suffix not in _SUFFIXES:
        raise GossamerError(f"--out {out}: give a file that ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    if not out.parent.is_dir():
        raise GossamerError(f"--out {out}: there is no directory {out.parent}; make it first")


def _dense(name: str, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> "PreTrainedModel":  # type: ignore[name-defined]
    """Load the dense model, checking that it has the same vocabulary and that the prompt fits its context."""
    from gossamer.explanations.prediction import prompt_tokens
    from gossamer.models.convert import is_gated

    network, own = load_model_and_tokenizer(name)
    if is_gated(network):
        raise GossamerError(f"--dense {name} is a sparse model; give a dense one")
    if own.get_vocab() != tokenizer.get_vocab():
        raise GossamerError(f"--dense {name} has another vocabulary than MODEL; give the model it was made from")
    prompt_tokens(network, tokenizer, prompt, "the prompt")
    return network


def _write(out: Path, record: dict[str, Any]) -> None:
    from gossamer.explanations.record import as_json, graphml
    from gossamer.files import atomic_file, atomic_write_text
    from gossamer.report.html import explanation_page

    if out.suffix == ".graphml":
        atomic_write_text(out, graphml(record))
    elif out.suffix == ".json":
        atomic_write_text(out, as_json(record))
    else:  # write both files or neither
        with atomic_file(out) as page, atomic_file(out.with_suffix(".json")) as numbers:
            page.write_text(explanation_page(record), encoding="utf-8")
            numbers.write_text(as_json(record), encoding="utf-8")


def _lengths(text: str) -> list[int]:
    names = split_names(text)
    if not names or not all(name.isdecimal() and int(name) >= 2 for name in names):
        raise GossamerError(f"--seq-len {text!r}: give numbers of tokens from 2 on, with commas between, as 16,64")
    return sorted({int(name) for name in names})


def _explain_text(model: str, dense: str | None, many: TextOptions, search: ExplainConfig, out: Path | None) -> None:
    """Explain many predictions in two models."""
    lengths = _lengths(many.seq_len)
    if dense is None:
        raise GossamerError("--text compares two models; give --dense, the model that MODEL was made from")
    if out is None or out.suffix != ".jsonl":
        raise GossamerError("--text writes a line for each search; give --out a file that ends in .jsonl")
    assert many.text is not None
    from transformers.utils import logging

    from gossamer.explanations.prediction import MOST_TOKENS_DENSE
    from gossamer.explanations.predictions import PredictionsConfig, explain_predictions, summarise
    from gossamer.training.data import BlockCounts, load_blocks
    from gossamer.training.malloc import keep_freed_memory

    if lengths[-1] > MOST_TOKENS_DENSE:
        raise GossamerError(
            f"--seq-len {lengths[-1]} is more than can be explained in a dense model; give at most {MOST_TOKENS_DENSE}"
        )
    logging.disable_progress_bar()
    keep_freed_memory()
    network, tokenizer = load_model_and_tokenizer(model)
    models = {"dense": _dense(dense, tokenizer, "the"), "sparse": network}
    counts = BlockCounts(seq_len=lengths[-1] + 1, held_out=1024)
    blocks = load_blocks(many.text, tokenizer, counts, seed=search.seed, model=network).held_out
    described = {"model": model, "dense": dense, "text": many.text, "share": search.share, "seed": search.seed}
    config = PredictionsConfig(lengths, many.predictions, search.share, search.seed)
    with console.status("explaining") as status:
        rows = explain_predictions(
            models, blocks, out, config, described=described, progress=lambda what: status.update(escape(what))
        )
    console.print(_summary_table(summarise(rows)))
    console.print(str(out), markup=False, highlight=False, soft_wrap=True)


def _summary_table(lines: list[dict[str, Any]]) -> Table:
    table = Table(title="Links that carry a prediction: median (quartiles)")
    headings = ("T", "kind", "dense", "sparse", "dense : sparse", "left when cut, sparse", "overlap, dense", "sparse")
    for column in headings:
        table.add_column(column, justify="right")
    for line in lines:
        own, other = line["sparse"], line["dense"]
        table.add_row(
            f"{line['length']:,}", line["kind"], *(_middle(each["size"], 0) for each in (other, own)),
            _middle(line["ratio"], 1), _middle(own["left_when_cut"], 2),
            *(_middle(each["overlap"], 2) for each in (other, own)),
        )  # fmt: skip
    return table


def _middle(values: "Quartiles", digits: int) -> str:  # type: ignore[name-defined]
    return f"{values.median:,.{digits}f} ({values.low:,.{digits}f}-{values.high:,.{digits}f})"
