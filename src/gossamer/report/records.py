"""Read the records of a run. ``docs/metrics.md`` documents their keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from gossamer.runs.read import (
    read_attention,
    read_circuits,
    read_findings,
    read_links,
    read_metrics,
    read_run_record,
    read_training_log,
)

SHOWN = {
    "open_fraction": "open fraction",
    "open_links_per_query": "open links per query and head",
    "loss_dense": "loss, dense (nats)",
    "loss_sparse": "loss, sparse (nats)",
    "loss_dense_control": "loss, dense control (nats)",
    "kl": "KL(dense ‖ sparse) (nats)",
    "constraint_bound": "bound on the {constraint_label} (nats)",
    "constraint_met": "constraint met",
    "seq_len": "tokens in a block",
    "tokens_trained": "tokens trained",
    "tokens_trained_before": "tokens trained before, in the run it started from",
    "seed": "seed",
}
"""Keys of ``metrics.json`` that a summary shows, with their labels; braces are filled with other metrics."""


@dataclass(frozen=True)
class TaskRecord:
    """The records that ``gossamer circuits`` wrote for one task.

    Attributes:
        circuits: ``circuits.json``.
        links: ``links.json``; None if it does not exist.
    """

    circuits: Mapping[str, Any]
    links: Mapping[str, Any] | None


@dataclass(frozen=True)
class Records:
    """All records of a run; a notebook displays its main metrics.

    Attributes:
        folder: of the run.
        config: ``config.json``.
        metrics: ``metrics.json``; None if the run has not been evaluated.
        training: the lines of ``training.jsonl``.
        tasks: by name.
        attention: ``attention.json``; None if it does not exist.
        findings: ``findings.json``; None if it does not exist.
    """

    folder: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Any] | None
    training: tuple[Mapping[str, Any], ...]
    tasks: Mapping[str, TaskRecord] = field(default_factory=dict)
    attention: Mapping[str, Any] | None = None
    findings: Mapping[str, Any] | None = None

    def summary(self) -> dict[str, str]:
        """The main metrics as strings, by label."""
        metrics = self.metrics or {}
        shown = {name: key for key, name in SHOWN.items() if metrics.get(key) is not None}
        return {name.format_map(metrics): _text(metrics[key]) for name, key in shown.items()}

    def __repr__(self) -> str:
        return f"Records({str(self.folder)!r}, " + ", ".join(f"{k}={v}" for k, v in self.summary().items()) + ")"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in self.summary().items())
        return f"<table><caption>{escape(str(self.folder))}</caption>{rows}</table>"


def load_records(folder: str | Path) -> Records:
    """Read the records that a run has written so far.

    Raises:
        GossamerError: if the folder is not a run; if a record is damaged, naming the file and the line.
    """
    folder = Path(folder)
    config = read_run_record(folder)
    metrics = folder / "metrics.json"
    tasks = {}
    for file in sorted(folder.glob("circuits/*/circuits.json")):
        if not file.parent.name.startswith("."):
            tasks[file.parent.name] = TaskRecord(read_circuits(file.parent), read_links(file.parent / "links.json"))
    return Records(
        folder,
        config,
        read_metrics(metrics) if metrics.exists() else None,
        read_training_log(folder / "training.jsonl"),
        tasks,
        read_attention(folder / "attention.json"),
        read_findings(folder / "findings.json"),
    )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
