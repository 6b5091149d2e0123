"""Terminal tables of the contents of ``circuits.json``."""

from statistics import mean, stdev
from typing import Any

from gossamer.circuits.metrics import EXPLAINED
from gossamer.tables import Table

SHOWN = (0.001, 0.01, 0.1)
"""Kept shares whose faithfulness the terminal shows."""


def comparison_tables(record: dict[str, Any]) -> list[Table]:
    """Build the terminal tables of a record."""
    dense, sparse = record["models"]["dense"], record["models"]["sparse"]
    ability = Table(title=f"{record['task']}, corruption {record['corruption']}, {record['prompts']} prompts")
    for column in ("model", "right (%)", "metric, clean", "metric, corrupted", "seconds", "peak memory (MB)"):
        ability.add_column(column, justify="left" if column == "model" else "right")
    for name, model in record["models"].items():
        numbers = (f"{model[key]:.3f}" for key in ("metric_clean", "metric_corrupted"))
        rest = (f"{model['seconds']:.0f}", f"{model['peak_memory_megabytes']:,.0f}")
        ability.add_row(name, f"{100 * model['accuracy']:.1f}", *numbers, *rest)
    sizes = Table(title=f"Units that explain {100 * EXPLAINED:.0f} % (first crossing; for good)")
    headings = ("level", "of", "dense", "sparse", "dense : sparse", "left when cut", "CPR dense", "CPR sparse")
    for column in headings:
        sizes.add_column(column, justify="left" if column == "level" else "right")
    explained = Table(title="Faithfulness by kept share")
    for column in ("level", "model", *(f"{100 * share:g} %" for share in SHOWN), "CMD"):
        explained.add_column(column, justify="left" if column in ("level", "model") else "right")
    for level in dense["levels"]:
        a, b = dense["levels"][level], sparse["levels"][level]
        ratio = f"{a['first_size'] / b['first_size']:.1f}" if a["first_size"] and b["first_size"] else "-"
        counts = (f"{_count(x['first_size'])}; {_count(x['lasting_size'])}" for x in (a, b))
        left = "; ".join(_share(x.get("left_when_cut")) for x in (a, b))
        sizes.add_row(level, f"{a['total']:,}", *counts, ratio, left, f"{a['cpr']:.3f}", f"{b['cpr']:.3f}")
        for name, curve in (("dense", a), ("sparse", b)):
            cells = (_faithfulness(curve, share) for share in SHOWN)
            explained.add_row(level, name, *cells, f"{curve['cmd']:.3f}")
    tables = [ability, sizes, explained, _pruned_table(record)]
    if dense.get("sets"):
        tables.append(_sets_table(record))
    return tables + ([_spread_table(record)] if len(record["variations"]) > 1 else [])


def _faithfulness(curve: dict[str, Any], share: float) -> str:
    """Faithfulness of the circuit at a share; records of earlier versions may have rounded its size differently."""
    at = {0: 0.0, **{point["size"]: point["faithfulness"] for point in curve["points"]}}
    exact = share * curve["total"]
    value = at.get(int(exact) if int(exact) in curve["shares"] else max(1, round(exact)))
    return "-" if value is None else f"{value:.3f}"


def _pruned_table(record: dict[str, Any]) -> Table:
    table = Table(title="The circuits at first crossing, less what is cut off")
    for column in ("model", "circuit of", "heads", "MLPs", "edges", "links a prompt", "links inside"):
        table.add_column(column, justify="left" if column in ("model", "circuit of") else "right")
    inside = [model["circuit"].get("nodes", {}).get("links_inside") for model in record["models"].values()]
    for name, model in record["models"].items():
        for level, counts in model["circuit"].items():
            cells = [_count(counts.get(key)) for key in ("heads", "mlps", "edges")]
            means = [_mean(counts.get(key)) for key in ("links_per_prompt", "links_inside")]
            table.add_row(name, level, *cells, *means)
    if all(inside):
        table.caption = f"links inside the circuits of nodes, dense : sparse = {inside[0] / inside[1]:.1f}"
    return table


def _sets_table(record: dict[str, Any]) -> Table:
    table = Table(title="The sets that the search found, on the prompts that it looked at (links: mean per prompt)")
    for column in ("level", "model", "units", "kept", "left when cut"):
        table.add_column(column, justify="left" if column in ("level", "model") else "right")
    for level in record["models"]["dense"]["sets"]:
        for name, model in record["models"].items():
            found = model["sets"][level]
            size = _mean(found["size"]) if level == "links" else _count(found["size"])
            table.add_row(level, name, size, _share(found["kept"]), _share(found["left_when_cut"]))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(count: float | None) -> str:
    return "-" if count is None else f"{count:,.1f}"


def _spread_table(record: dict[str, Any]) -> Table:
    """Mean ± standard deviation of the sizes at first crossing over the variations."""
    table = Table(title=f"Over {len(record['variations'])} variations (seeds and phrasings): mean ± standard deviation")
    for column in ("model", *record["models"]["dense"]["levels"], "overlap of edges"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in record["models"]:
        cells = []
        for level in record["models"][name]["levels"]:
            sizes = [each["models"][name]["levels"][level]["first_size"] for each in record["variations"]]
            known = [size for size in sizes if size is not None]
            cells.append(f"{mean(known):,.0f} ± {stdev(known):,.0f}" if len(known) > 1 else "-")
        overlap = record["overlap"][name]
        table.add_row(name, *cells, "-" if overlap is None else f"{overlap:.2f}")
    return table


def _count(size: int | None) -> str:
    return "-" if size is None else f"{size:,}"
