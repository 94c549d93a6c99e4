"""Rows of values as text."""

import csv
import io
import json

import pytest

from flaxcnn import tables
from flaxcnn.tables import Column

COLUMNS = (
    Column("name", "name", to_the_right=False),
    Column("side", "side, px", tables.sides),
    Column("size", "size", tables.count),
)
ROWS = [
    {"name": "a, b", "side": (3, 5), "size": 1234567, "more": 1},
    {"name": "c", "side": None, "size": 0, "more": 2},
]


def test_formats() -> None:
    assert tables.aligned(COLUMNS, ROWS).splitlines() == [
        "name  side, px       size",
        "----  --------  ---------",
        "a, b       3x5  1,234,567",
        "c                       0",
    ]
    assert tables.markdown(COLUMNS, ROWS).splitlines() == [
        "| name | side, px | size |",
        "| --- | ---: | ---: |",
        "| a, b | 3x5 | 1,234,567 |",
        "| c |  | 0 |",
    ]
    assert list(csv.reader(io.StringIO(tables.csv_lines(COLUMNS, ROWS)))) == [
        ["name", "side", "size"],
        ["a, b", "3x5", "1234567"],
        ["c", "", "0"],
    ]
    assert json.loads(tables.json_text(COLUMNS, ROWS)) == [
        {"name": "a, b", "side": [3, 5], "size": 1234567},
        {"name": "c", "side": None, "size": 0},
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (99.96, "100"),
        (12.345, "12.3"),
        (1, "1.00"),
        (0.7142, "0.714"),
        (0.0001234, "0.000123"),
        (-0.05, "-0.0500"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert tables.significant(value) == text
    assert tables.millions(value * 1e6) == tables.significant(value * 1e6 / 1e6)
