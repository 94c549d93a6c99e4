"""Results as CSV and JSON, whole after each row: what was measured is not lost."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def make_folders(*paths: Path | None) -> None:
    """Of files that results will be written to, before the minutes that they are to hold."""
    for path in paths:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)


def write_csv(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows, which have the columns of the first; nothing without a path or rows."""
    if not path or not rows:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """The same as a list of objects."""
    if path and rows:
        path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
