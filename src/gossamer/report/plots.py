"""Figures for papers: pure functions from result records to matplotlib figures.

Dense and sparse differ in line style and marker as well as in colour (Okabe and Ito's colour-blind-safe palette).
"""

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.errors import GossamerError
from gossamer.files import atomic_file
from gossamer.report.records import Records
from gossamer.report.series import Chart, faithfulness_charts, loss_chart, training_charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
MOST_DRAWN = 2_000
"""Most links of a circuit that one figure draws; if there are more, it draws the strongest."""

LINES = ("-", "--", ":", "-.", "-")
MARKERS = ("o", "s", "^", "D", "v")
TINTS = {"dense": "Blues", "sparse": "Oranges"}


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, size in inches, that has no window and displays itself in a notebook.

    Raises:
        GossamerError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GossamerError("figures need matplotlib: pip install 'gossamer[report]'") from error

    class InlineFigure(Figure):
        def _repr_png_(self) -> bytes:
            return png(self)

    return InlineFigure(figsize=(width, height), layout="constrained")


def png(figure: "Figure") -> bytes:
    """The figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def chart_figure(chart: Chart) -> "Figure":
    """Plot series on common axes: training curves, loss against open fraction, faithfulness against circuit size."""
    figure = new_figure(5.2, 3.4)
    axes = figure.subplots()
    for place, series in enumerate(chart.series):
        x, y = zip(*series.points, strict=True) if series.points else ((), ())
        style = "" if series.bare else LINES[place % len(LINES)]
        marker = MARKERS[place % len(MARKERS)] if len(x) <= 60 and series.name != "90 %" else ""
        axes.plot(x, y, linestyle=style, marker=marker, markersize=4, color=COLORS[place % 5], label=series.name)
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    if chart.x_log:
        axes.set_xscale("log")
    if chart.y_log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(chart.series) > 1:
        axes.legend(fontsize="small")
    return figure


def heads_figure(metrics: Mapping[str, Any]) -> "Figure":
    """Plot the open fraction by layer (rows) and head (columns), on a logarithmic scale; closed heads are blank."""
    shares = np.array(metrics["open_fraction_per_head"])
    figure = new_figure(2 + 0.28 * shares.shape[1], 1.4 + 0.19 * shares.shape[0])
    axes = figure.subplots()
    shown = np.ma.masked_less_equal(shares, 0)
    from matplotlib.colors import LogNorm

    image = axes.imshow(shown, cmap="Oranges", norm=LogNorm(1e-4, 1), aspect="auto")
    axes.set(title=f"Open fraction, T = {metrics['seq_len']}", xlabel="head", ylabel="layer")
    figure.colorbar(image)
    return figure


def attention_figure(attention: Mapping[str, Any], prompt: int = 0) -> "Figure":
    """Plot the attention of all heads on one prompt, dense beside sparse; rows are layers, columns heads."""
    from matplotlib import colormaps

    shown = attention["prompts"][prompt]
    layers, heads, names = attention["layers"], attention["heads"], list(shown["models"])
    edge = 0.32 if layers > 8 else 0.9
    figure = new_figure(len(names) * (edge * heads + 0.6), edge * layers + 0.9)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        picture = _side_by_side(attention_weights(attention, prompt, name))
        tint = colormaps[TINTS.get(name, "Greys")].with_extremes(bad="0.75")
        # The unit of both axes is one head. For 270 heads, one image is fifteen times faster than one axes per head.
        axes.imshow(picture, cmap=tint, vmin=0, vmax=1, extent=(-0.5, heads - 0.5, layers - 0.5, -0.5), aspect="equal")
        axes.set(title=name, xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
        axes.tick_params(length=0, labelsize=6)
    return figure


def _side_by_side(weights: np.ndarray) -> np.ndarray:
    """``[layers, heads, tokens, tokens]`` as one image, with a margin of NaN around each head."""
    layers, heads, tokens, _ = weights.shape
    margin = 1 + tokens // 40
    framed = np.pad(weights, ((0, 0), (0, 0), (margin, margin), (margin, margin)), constant_values=np.nan)
    edge = framed.shape[-1]
    return framed.transpose(0, 2, 1, 3).reshape(layers * edge, heads * edge)


def attention_weights(attention: Mapping[str, Any], prompt: int, model: str) -> np.ndarray:
    """``[layers, heads, tokens, tokens]`` from ``attention.json``."""
    shown = attention["prompts"][prompt]
    tokens, record = len(shown["tokens"]), shown["models"][model]
    weights = np.zeros((attention["layers"], attention["heads"], tokens, tokens), dtype=np.float32)
    if "triangles" in record:
        steps = np.frombuffer(base64.b64decode(record["triangles"]), dtype=np.uint8)
        query, key = np.tril_indices(tokens)
        weights[:, :, query, key] = steps.reshape(*weights.shape[:2], -1) / 255
    else:
        for layer, head, query, key, weight in record["links"]:
            weights[layer, head, query, key] = weight
    return weights


def circuit_figure(links: Mapping[str, Any], layers: int) -> "Figure":
    """Plot the circuit of one prompt as a layered graph: tokens along x, layers upwards, line widths by score."""
    tokens, names = links["tokens"], list(links["models"])
    figure = new_figure(len(names) * max(3.5, 0.34 * len(tokens)), 5)
    for place, (axes, name) in enumerate(zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True)):
        found = sorted(links["models"][name]["links"], key=lambda link: -abs(link[-1]))[:MOST_DRAWN]
        count = len(links["models"][name]["links"])
        most = max((abs(score) for *_, score in found), default=1.0) or 1.0
        for layer, _, query, key, score in found:
            # Dashed links work against the answer: patching them raises the metric.
            axes.plot(
                (key, query), (layer, layer + 1), color=COLORS[place], alpha=0.7,
                linewidth=0.3 + 3 * abs(score) / most, linestyle="--" if score > 0 else "-",
            )  # fmt: skip
        axes.set(
            title=f"{name}: {count:,} links" + (f", {MOST_DRAWN:,} drawn" if count > MOST_DRAWN else ""),
            ylabel="layer",
            ylim=(-0.3, layers + 0.3),
        )
        # Matplotlib renders text between dollar signs as mathematics.
        labels = [repr(token)[1:-1].replace("$", r"\$") for token in tokens]
        axes.set_xticks(range(len(tokens)), labels, rotation=60, ha="right", fontsize=7)
    return figure


def explanation_figure(record: Mapping[str, Any]) -> "Figure":
    """Plot the links of an explanation, dense beside sparse, as a layered graph; line widths show the share lost."""
    models = {"sparse" if record.get("dense") else "model": record, "dense": record.get("dense")}
    shown = {}
    for name, of_model in models.items():
        if of_model is not None:
            lost = {tuple(each["link"]): each["lost_from_set"] for each in of_model["details"]}
            shown[name] = {"links": [[*link, -lost.get(tuple(link), 0.0)] for link in of_model["links"]]}
    layers = 1 + max(link[0] for of_model in shown.values() for link in of_model["links"])
    return circuit_figure({"tokens": record["tokens"], "models": shown}, layers)


def all_figures(records: Records) -> Iterator[tuple[str, "Figure"]]:
    """All figures for which a run has records, each with a name for its file."""
    metrics = records.metrics or {}
    for chart, name in zip(training_charts(records), ("constraint", "open_links", "multiplier"), strict=False):
        yield f"training_{name}", chart_figure(chart)
    if metrics.get("topk"):
        yield "loss", chart_figure(loss_chart(metrics))
    if metrics.get("open_fraction_per_head"):
        yield "heads", heads_figure(metrics)
    if records.attention is not None:
        for prompt in range(len(records.attention["prompts"])):
            yield f"attention_{prompt}", attention_figure(records.attention, prompt)
    for task, record in records.tasks.items():
        for level, chart in zip(
            record.circuits["models"]["dense"]["levels"], faithfulness_charts(record.circuits), strict=True
        ):
            yield f"faithfulness_{task}_{level}", chart_figure(chart)
        if record.links is not None:
            layers = record.circuits["models"]["dense"]["units"]["layers"]
            yield f"circuit_{task}", circuit_figure(record.links, layers)


def save_figures(figures: Iterable[tuple[str, "Figure"]], folder: Path) -> list[Path]:
    """Write named figures as PNG and SVG into a folder.

    Raises:
        GossamerError: if matplotlib is not installed; if the folder cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures:
            for suffix in (".png", ".svg"):
                with atomic_file(folder / f"{name}{suffix}") as staging:
                    figure.savefig(staging, dpi=150)
                written.append(folder / f"{name}{suffix}")
    except OSError as error:
        raise GossamerError(f"cannot write {folder}: {error.strerror or error}") from error
    return written
