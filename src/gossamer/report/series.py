"""The data of the charts as named series of points: pure functions of result records.

The HTML page draws them with its own script, :mod:`gossamer.report.plots` with matplotlib.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.report.records import Records

AT_MOST = 400
"""Draw about this many points of a training curve at most; longer curves are thinned evenly."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Named points; those of a ``bare`` series are not joined by a line."""

    name: str
    points: tuple[Point, ...]
    bare: bool = False


@dataclass(frozen=True)
class Chart:
    """Series on common axes, with the names and units of the axes."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False


def training_charts(records: Records) -> list[Chart]:
    """Charts of the constraint and its bound, open fraction and multiplier by step; none without ``training.jsonl``."""
    rows = records.training
    if not rows:
        return []
    metrics = records.metrics or {}
    constraint = records.config["constraint"]
    bound = metrics.get("constraint_bound", constraint["bound"])
    name = constraint["label"]
    ends = (rows[0]["step"], rows[-1]["step"])
    losses = [
        Series("training batch", _column(rows, "constrained")),
        Series("validation, hard gates", _column(rows, "constrained_held_out")),
        Series(f"bound {constraint['symbol']}", ((ends[0], bound), (ends[1], bound))),
    ]
    return [
        Chart(f"The constraint: {name}", "step", f"{name} (nats)", tuple(losses)),
        Chart(
            "Open links", "step", "fraction",
            (Series("open (hard)", _column(rows, "open_fraction")),
             Series("expected", _column(rows, "expected_open_fraction"))), y_log=True,
        ),
        Chart("The multiplier", "step", "λ", (Series("λ", _column(rows, "multiplier")),), y_log=True),
    ]  # fmt: skip


def loss_chart(metrics: Mapping[str, Any]) -> Chart:
    """Chart of loss against open fraction: the dense model, its top-k, the sparse model, the dense control."""
    # The dense loss on the text that top-k is measured on, so that the top-k curves end at their own dense model.
    whole = metrics.get("topk_loss_dense")
    ends = () if whole is None else ((1.0, whole),)
    series = [
        Series(
            "dense, top-k renormalised" if renormalised else "dense, top-k",
            tuple((row["open_fraction"], row["loss"]) for row in metrics["topk"] if row["renormalised"] == renormalised)
            + ends,
        )
        for renormalised in (False, True)
    ]
    points = (
        ("sparse", metrics["open_fraction"], metrics["loss_sparse"]),
        ("dense", 1.0, metrics["loss_dense"]),
        ("dense control", 1.0, metrics.get("loss_dense_control")),
    )
    series += [Series(name, ((x, y),), bare=True) for name, x, y in points if y is not None]
    return Chart("Loss against open links", "open fraction", "loss (nats)", tuple(series), x_log=True)


def faithfulness_charts(circuits: Mapping[str, Any]) -> list[Chart]:
    """Charts of faithfulness against circuit size, dense and sparse, one for each level."""
    charts = []
    for level in circuits["models"]["dense"]["levels"]:
        series = tuple(
            Series(name, tuple((point["size"], point["faithfulness"]) for point in model["levels"][level]["points"]))
            for name, model in circuits["models"].items()
        )
        total = circuits["models"]["dense"]["levels"][level]["total"]
        line = Series("90 %", ((1, 0.9), (total, 0.9)))
        what = "links kept (of one prompt)" if level == "links" else f"{level} kept"
        charts.append(Chart(f"Explained by {level}", what, "faithfulness", (*series, line), x_log=True))
    return charts


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Point, ...]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    every = -(-len(points) // AT_MOST) or 1
    return tuple(points[::every] + (points[-1:] if (len(points) - 1) % every else []))
