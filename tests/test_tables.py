"""Tables at narrow and wide widths: every number stays readable."""

import io
import random
import re
from collections import Counter

import pytest
from rich.console import Console

from gossamer.tables import Table


def shown(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"(?<!\S)[-+]?\d\S*", text))


def links() -> Table:
    table = Table(title="The circuits at first crossing, less what is cut off")
    for column in ("model", "circuit of", "heads", "MLPs", "edges", "links a prompt"):
        table.add_column(column, justify="left" if column in ("model", "circuit of") else "right")
    table.add_row("dense", "nodes", "1,234", "22", "-", "8.03")
    table.add_row("sparse", "links", "-", "-", "-", "23148421127.8")
    return table


@pytest.mark.parametrize("width", [20, 30, 50, 64, 80, 200])
def test_no_number_is_cut(width: int) -> None:
    found = shown(links(), width)
    assert "…" not in found
    assert numbers(found) == Counter(["1,234", "22", "8.03", "23148421127.8"])
    assert max(map(len, found.splitlines())) <= width


def test_a_table_that_fits_is_as_rich_has_it() -> None:
    lines = shown(links(), 80).splitlines()
    assert lines[1].startswith("┏")
    assert lines[4] == "│ dense  │ nodes      │ 1,234 │   22 │     - │           8.03 │"
    assert shown(links(), 200).strip() == shown(links(), 80).strip()


def test_texts_fold_before_rows_stand_one_below_another() -> None:
    table = Table(title="prompts")
    table.add_column("prompt")
    table.add_column("loss (nat)", justify="right")
    table.add_row("When Mary and John went to the store, John gave a drink to", "3.141592653589793")
    found = shown(table, 50)
    assert "│ 3.141592653589793 │" in found
    assert len(found.splitlines()) == 8
    found = shown(table, 20)
    assert "┃" not in found
    assert "3.141592653589793" in found


def test_facts_keep_their_numbers_too() -> None:
    table = Table(title="Run", show_header=False)
    table.add_row("open links per query and head", "123456789012.25 in 30 layers")
    table.add_row("model", "/a/path/without/any/space/that/is/longer/than/the/terminal")
    for width in (60, 40, 24, 16):
        found = shown(table, width)
        assert "123456789012.25" in found
        assert "…" not in found
        letters = re.sub(r"[\s│┌┐└┘─┬┴]", "", found)
        assert "longer" in letters


def test_many_tables_at_many_widths() -> None:
    draw = random.Random(0)
    for _ in range(200):
        table, wanted = Table(title="T"), []
        for column in range(draw.randint(1, 8)):
            heading = " ".join(draw.choices(("loss", "minus dense", "peak memory (MB)", "k"), k=draw.randint(1, 2)))
            table.add_column(heading, justify=draw.choice(("left", "right")) if column else "left")
        for _ in range(draw.randint(1, 4)):
            row = []
            for column in table.columns:
                values = [f"{draw.uniform(-1, 1) * 10 ** draw.randint(0, 9):,.{draw.randint(0, 4)}f}" for _ in "ab"]
                words = (
                    values if column.justify == "right" else [*draw.choices(("a", "prompt", "that"), k=3), values[0]]
                )
                wanted += [word for word in words if word[-1].isdigit()]
                row.append(" ± ".join(words) if column.justify == "right" else " ".join(words))
            table.add_row(*row)
        for width in (24, 37, 50, 80):
            found = shown(table, width)
            assert not Counter(wanted) - numbers(found)
            assert max(map(len, found.splitlines())) <= width
