"""Rows of values as text: aligned for a terminal, as Markdown, CSV or JSON."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Column(NamedTuple):
    """One column; CSV and JSON have the bare values under `key`, the others `text` of them."""

    key: str
    title: str  # with the unit
    text: Callable[[Any], str] = str
    to_the_right: bool = True


def aligned(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """For a terminal: two spaces between columns, a line under the titles."""
    cells = [[column.title for column in columns], *_cells(columns, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        placed = (
            cell.rjust(width) if column.to_the_right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        return "  ".join(placed).rstrip()

    title, *others = map(line, cells)
    return "\n".join([title, "  ".join("-" * width for width in widths), *others])


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table of GitHub's Markdown."""
    rule = ["---:" if column.to_the_right else "---" for column in columns]
    lines = [[column.title for column in columns], rule, *_cells(columns, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def csv_lines(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A line of keys, then a line a row; no end of line behind the last."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.key for column in columns)
    writer.writerows([_plain(row[column.key]) for column in columns] for row in rows)
    return text.getvalue().rstrip("\n")


def json_text(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A list of objects."""
    return json.dumps(
        [{column.key: row[column.key] for column in columns} for row in rows], indent=1
    )


FORMATS: Mapping[str, Callable[[Sequence[Column], Sequence[Row]], str]] = {
    "table": aligned,
    "markdown": markdown,
    "csv": csv_lines,
    "json": json_text,
}


def _cells(columns: Sequence[Column], rows: Sequence[Row]) -> list[list[str]]:
    return [
        ["" if row[column.key] is None else column.text(row[column.key]) for column in columns]
        for row in rows
    ]


def _plain(value: Any) -> Any:
    return sides(value) if isinstance(value, tuple) else value


# ----------------------------------------------------------------------------------------- texts
def sides(value: int | Sequence[int]) -> str:
    """3 -> "3"; (3, 5) -> "3x5"."""
    return str(value) if isinstance(value, int) else "x".join(map(str, value))


def count(value: int) -> str:
    """25557032 -> "25,557,032"."""
    return f"{value:,}"


def millions(value: float) -> str:
    """In millions, to three digits."""
    return significant(value / 1e6)


def significant(value: float) -> str:
    """To three digits, never as a power of ten: 1234.5 -> "1,234", 0.01234 -> "0.0123"."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")  # 99.96 has as many digits before the point as 100
    decimals = max(2 - math.floor(math.log10(abs(rounded))), 0)
    return f"{value:,.{decimals}f}"
