"""Print the table "One command, no tuning" of docs/results.md from the runs in DIR: python untuned_table.py DIR."""

import json
import sys
from pathlib import Path
from typing import Any


def row(name: str, metrics: dict[str, Any]) -> tuple[str, bool]:
    """A line of the table, and whether the bound was met or missed by at most one standard error."""
    shift, share = metrics["gate_bias_shift"], metrics.get("weight_interpolation", 1.0)
    over = metrics["constraint_value"] - metrics["constraint_bound"]
    held = over <= (metrics["constraint_stderr"] or 0.0)
    verdict = "met" if metrics["constraint_met"] else "within one ±" if held else "**missed**"
    cells = [
        name,
        f"{100 * metrics['open_fraction']:.2f} %",
        f"{metrics['open_links_per_query']:.2f}",
        f"{metrics['loss_sparse'] - metrics['loss_dense']:+.3f} ± {metrics['loss_difference_stderr']:.3f}",
        f"{metrics['kl']:.3f} ± {metrics['kl_stderr']:.3f}",
        f"{shift:.2f}" if shift is not None else "none helps",
        f"{share:g}",
        verdict,
    ]
    return f"| {' | '.join(cells)} |", held


def main() -> None:
    """Print the table."""
    files = sorted(Path(sys.argv[1]).glob("*/metrics.json"))
    rows = [row(file.parent.name, json.loads(file.read_text())) for file in files]
    headings = ("run", "open", "links a query and head", "loss minus dense", "KL", "shift", "weights", "bound")
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    for line, _ in rows:
        print(line)
    count = sum(held for _, held in rows)
    print(f"\n{count} of {len(rows)} held their bound, or missed it by less than one standard error.")


if __name__ == "__main__":
    main()
