"""The records of a run or an explanation as one self-contained HTML page that opens offline."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from gossamer.files import atomic_write_text
from gossamer.inputs import reading
from gossamer.report.records import Records, load_records
from gossamer.report.series import Chart, faithfulness_charts, loss_chart, training_charts


def write_report(folder: str | Path, out: str | Path | None = None, *, name: str | None = None) -> Path:
    """Write the page of a run.

    Args:
        folder: of the run.
        out: the file to write; ``report.html`` in the folder if None.
        name: the run's name on the page; the folder's name if None.

    Raises:
        GossamerError: if the folder is not a run, or one of its records is damaged.
    """
    records = load_records(folder)
    with reading(f"a record in {folder}", "its files are documented in docs/metrics.md"):
        shown = page(records, name)
    file = Path(folder) / "report.html" if out is None else Path(out)
    atomic_write_text(file, shown)
    return file


def page(records: Records, name: str | None = None) -> str:
    """The HTML of a run's page; the run is named after its folder if no name is given."""
    return _filled("page.js", {"name": name or records.folder.resolve().name, **_content(records)})


def explanation_page(record: Mapping[str, Any]) -> str:
    """The HTML of an explanation's page, from its record."""
    return _filled("explanation.js", {"name": record["model"], **record})


def _filled(script: str, content: dict[str, Any]) -> str:
    """The HTML of a page that a script draws from the content."""
    parts = files("gossamer.report") / "page"
    filled = (parts / "page.html").read_text(encoding="utf-8")
    scripts = [(parts / name).read_text(encoding="utf-8") for name in ("common.js", script)]
    for place, text in (
        ("/*STYLE*/", (parts / "page.css").read_text(encoding="utf-8")),
        ("/*SCRIPT*/", "\n".join(scripts)),
        ("/*DATA*/", _embedded(content)),
    ):
        filled = filled.replace(place, text, 1)
    return filled


def _embedded(content: dict[str, Any]) -> str:
    """JSON for embedding in a script element: none of its characters can end the element or start markup."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _content(records: Records) -> dict[str, Any]:
    metrics = records.metrics or {}
    heads = metrics.get("open_fraction_per_head")
    links = {
        name: {**task.links, "ablation": task.circuits.get("ablation"), "corruption": task.circuits.get("corruption")}
        for name, task in records.tasks.items()
        if task.links is not None
    }
    charts = []
    if metrics.get("topk"):
        charts.append({"id": "loss", "title": "Loss", "figures": [_chart(loss_chart(metrics))]})
    for name, task in records.tasks.items():
        figures = [_chart(chart) for chart in faithfulness_charts(task.circuits)]
        charts.append({"id": f"faithfulness-{name}", "title": f"Circuit size: {name}", "figures": figures})
    training = [_chart(chart) for chart in training_charts(records)]
    charts.append({"id": "training", "title": "Training", "figures": training})
    return {
        "summary": records.summary(),
        "layers": _layers(records),
        "attention": records.attention,
        "findings": records.findings,
        "links": links,
        "charts": charts,
        "heads": heads,
    }


def _layers(records: Records) -> int:
    """The model's number of layers, from whichever record has it."""
    if records.attention is not None:
        return int(records.attention["layers"])
    if records.metrics is not None and records.metrics.get("open_fraction_per_layer"):
        return len(records.metrics["open_fraction_per_layer"])
    units = (task.circuits["models"]["dense"]["units"]["layers"] for task in records.tasks.values())
    return next((int(layers) for layers in units), 1)


def _chart(chart: Chart) -> dict[str, Any]:
    found = asdict(chart)
    return {**found, "options": {"xLog": found.pop("x_log"), "yLog": found.pop("y_log")}}
