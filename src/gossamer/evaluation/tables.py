"""Terminal tables and a summary sentence of the contents of ``metrics.json``."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape

from gossamer.measures.language import plus_minus
from gossamer.tables import Table


def summary_tables(metrics: dict[str, Any]) -> list[Table]:
    """Build the terminal tables of ``metrics.json``."""
    tasks = [task_table(metrics["tasks"])] if "tasks" in metrics else []
    return [_losses(metrics), _links(metrics), _topk(metrics), *tasks]


def verdict(metrics: dict[str, Any]) -> str:
    """State whether the constraint was met, and whether the amount of text is enough to tell."""
    value, bound = metrics["constraint_value"], metrics["constraint_bound"]
    said = f"held-out {metrics['constraint_label']} {value:.4f} nat, bound {bound:.4f}"
    said = (
        f"Constraint met: {said}."
        if metrics["constraint_met"]
        else (f"Constraint NOT met: {said}, over by {value - bound:.4f}.")
    )
    error = metrics.get("constraint_stderr")
    if error is None or abs(value - bound) >= 2 * error:
        return said
    return (
        f"{said} The two are less than two standard errors apart (one is {error:.4f} over "
        f"{metrics['blocks_evaluated']:,} blocks): this is too little text to tell."
    )


def _losses(metrics: dict[str, Any]) -> Table:
    label, symbol, bound = (metrics[f"constraint_{key}"] for key in ("label", "symbol", "bound"))
    where = f"Held-out loss, T = {metrics['seq_len']}, {metrics['tokens_evaluated']:,} predictions"
    table = Table(title=f"{where}; bound on the {label}: {symbol} = {bound:.4f}")
    for heading in ("model", "loss (nat)", "minus dense", "KL from dense (nat)"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    dense = metrics["loss_dense"]
    table.add_row("dense", f"{dense:.4f}", "", "")
    sparse = metrics["loss_sparse"]
    table.add_row(
        "sparse, hard gates",
        f"{sparse:.4f}",
        f"{sparse - dense:+.4f}{plus_minus(metrics.get('loss_difference_stderr'))}",
        f"{metrics['kl']:.4f}{plus_minus(metrics.get('kl_stderr'))}",
    )
    control = metrics["loss_dense_control"]
    if control is not None:
        table.add_row("dense control", f"{control:.4f}", f"{control - dense:+.4f}", "")
    return table


def _links(metrics: dict[str, Any]) -> Table:
    overall = f"{100 * metrics['open_fraction']:.3f} % open"
    table = Table(title=f"{overall}, {metrics['open_links_per_query']:.3f} open links per query and head")
    table.add_column("layer", justify="right")
    table.add_column("open (%)", justify="right")
    table.add_column("open by head (%)")
    per_head = metrics["open_fraction_per_head"]
    for layer, fraction in enumerate(metrics["open_fraction_per_layer"]):
        heads = " ".join(f"{100 * head:5.2f}" for head in per_head[layer])
        table.add_row(str(layer), f"{100 * fraction:.3f}", heads)
    return table


def _topk(metrics: dict[str, Any]) -> Table:
    table = Table(
        title=f"Baseline: dense model, k strongest links per query, {metrics['topk_tokens_evaluated']:,} predictions"
    )
    for heading in ("k", "open (%)", "loss (nat)", "renormalised (nat)"):
        table.add_column(heading, justify="right")
    plain = {point["k"]: point for point in metrics["topk"] if not point["renormalised"]}
    renormalised = {point["k"]: point for point in metrics["topk"] if point["renormalised"]}
    for k, point in plain.items():
        fraction = f"{100 * point['open_fraction']:.2f}"
        table.add_row(str(k), fraction, f"{point['loss']:.3f}", f"{renormalised[k]['loss']:.3f}")
    return table


def lengths_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Build the table of results of :func:`measure_at_length`."""
    table = Table(title=escape(title))
    headings = ("T", "dense (nat)", "sparse (nat)", "sparse minus dense", "KL (nat)", "open (%)", "links per query")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['seq_len']:,}",
            f"{row['loss_dense']:.4f}",
            f"{row['loss_sparse']:.4f}",
            f"{row['loss_sparse'] - row['loss_dense']:+.4f}{plus_minus(row.get('loss_difference_stderr'))}",
            f"{row['kl']:.4f}{plus_minus(row.get('kl_stderr'))}",
            f"{100 * row['open_fraction']:.3f}",
            f"{row['open_links_per_query']:.3f}",
        )
    return table


def task_table(tasks: dict[str, dict[str, Any]]) -> Table:
    """Build the terminal table of the entry ``tasks`` in ``metrics.json``."""
    names = [name for name in ("dense", "sparse", "control") if _have(tasks, name)]
    table = Table(title="Tasks (value ± standard error)")
    for heading in ("task", "metric", "examples", *names, "sparse minus dense"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task, record in tasks.items():
        models = record["models"]
        for metric, dense in models["dense"].items():
            cells = [_cell(models[name][metric]) if name in models else "" for name in names]
            difference = models["sparse"][metric]["value"] - dense["value"]
            better = "↑" if dense["higher_is_better"] else "↓"
            table.add_row(task, f"{metric} {better}", str(record["examples"]), *cells, f"{difference:+.4f}")
    return table


def _have(tasks: dict[str, dict[str, Any]], name: str) -> bool:
    return any(name in record["models"] for record in tasks.values())


def _cell(metric: dict[str, Any]) -> str:
    if metric["stderr"] is None:
        return f"{metric['value']:.4f}"
    return f"{metric['value']:.4f} ± {metric['stderr']:.4f}"
