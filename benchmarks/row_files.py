"""Results as CSV and JSON, whole after each row: what was measured is not lost."""

import csv
import io
import json
import os
from collections import defaultdict
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
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue())


def read_csv(path: Path | None, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of such a file; none without a path, or where there is no file yet.

    Raises:
        SystemExit: it has other columns.
    """
    if not path or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if list(reader.fieldnames or []) != list(columns):
        raise SystemExit(f"{path} has other columns than {', '.join(columns)}; name another file")
    return rows


def in_place_of(
    earlier: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> list[Mapping[str, Any]]:
    """`earlier` with `rows` in place of those that are the same by `keys`; new ones at the end."""
    there, measured = _groups(earlier, keys), _groups(rows, keys)
    return [row for group in (there | measured).values() for row in group]


def _groups(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(str(row[key]) for key in keys)].append(row)
    return dict(groups)


def write_json(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """The same as a list of objects."""
    if path and rows:
        _write(path, json.dumps(rows, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """All of it, or the file stays as it was."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8", newline="")
    os.replace(unfinished, path)
