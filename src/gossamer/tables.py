"""Tables for terminals of any width: text wraps, numbers are never truncated or broken.

natural width                  if it fits
full width for number columns, if that fits; right-justified columns are number columns
text wrapped in the rest
stacked rows, a cell per line  otherwise
"""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich import table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column
from rich.text import Text

_NUMBER = re.compile(r"[^\w\s]*\d[\d.,:_/]*(e[-+]?\d+)?[^\w\s]*", re.ASCII)

_WORD = 12
"""Number of letters of a longer word that stay together in narrow columns."""


class Table(table.Table):
    """A rich table that fits the terminal without truncating a number."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render at natural width, with wrapped text, or as stacked rows."""
        spans = [self._span(console, column) for column in self.columns]
        padding = sum(self._get_padding_width(place) for place in range(len(spans)))
        room = options.max_width - self._extra_width - padding
        if sum(most for _, most in spans) <= room:
            yield from super().__rich_console__(console, options)
        elif sum(least for least, _ in spans) <= room:
            fitted = copy.copy(self)
            widths = _shared(spans, [column.justify == "right" for column in self.columns], room)
            fitted.columns = [
                replace(column, width=width, overflow="fold")
                for column, width in zip(self.columns, widths, strict=True)
            ]
            yield from super(Table, fitted).__rich_console__(console, options)
        else:
            yield from self._stacked(console)

    def _span(self, console: Console, column: Column) -> tuple[int, int]:
        """The smallest width of a column at which no number breaks, and its natural width."""
        lines = [line for cell in column.cells for line in _text(console, cell).plain.splitlines()]
        header = _text(console, column.header).plain if self.show_header else ""
        words = [word for line in lines for word in line.split()]
        whole = [cell_len(word) for word in words if column.justify == "right" or _NUMBER.fullmatch(word)]
        others = [min(cell_len(word), _WORD) for word in (*words, *header.split())]
        return max(1, *whole, *others), max(1, *map(cell_len, (*lines, header)))

    def _stacked(self, console: Console) -> Iterator[Any]:
        if self.title:
            yield Text.assemble(_text(console, self.title), style="italic", overflow="fold")
        for row in zip(*(column.cells for column in self.columns), strict=True):
            if self.show_header:
                below = Table(show_header=False, box=None, pad_edge=False)
                for column, cell in zip(self.columns, row, strict=True):
                    below.add_row(column.header, cell)
                yield below
                yield ""
            else:
                for cell in row:
                    yield Text.assemble(_text(console, cell), overflow="fold")
        if self.caption:
            yield Text.assemble(_text(console, self.caption), style="dim", overflow="fold")


def _text(console: Console, cell: Any) -> Text:
    return cell if isinstance(cell, Text) else console.render_str(str(cell))


def _shared(spans: Sequence[tuple[int, int]], numbers: Sequence[bool], room: int) -> list[int]:
    """Column widths: the minimum for each; number columns then share the remaining room first, then the others."""
    widths = [least for least, _ in spans]
    rest = room - sum(widths)
    for kind in (True, False):
        places = [place for place, number in enumerate(numbers) if number == kind]
        places.sort(key=lambda place: spans[place][1] - spans[place][0])
        for done, place in enumerate(places):
            more = min(spans[place][1] - spans[place][0], rest // (len(places) - done))
            widths[place] += more
            rest -= more
    return widths
