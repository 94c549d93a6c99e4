"""Results that are kept row by row, so that a long benchmark goes on where it was stopped."""

import csv
from collections.abc import Sequence
from pathlib import Path


class KeptRows:
    """A CSV file of results; the first `keys` columns say which result a row is."""

    def __init__(self, path: Path, fields: Sequence[str], keys: int) -> None:
        self._path, self._keys = path, keys
        self._there: set[tuple[str, ...]] = set()
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                titles, *rows = csv.reader(file)
            if titles != list(fields):
                raise SystemExit(f"{path} has other columns: {', '.join(titles)}")
            self._there = {tuple(row[:keys]) for row in rows}
        else:
            path.write_text(",".join(fields) + "\n", encoding="utf-8")

    def has(self, *key: object) -> bool:
        """Whether there is a result for this key."""
        return tuple(map(str, key)) in self._there

    def append(self, row: Sequence[object]) -> None:
        """Writes a result."""
        self._there.add(tuple(map(str, row[: self._keys])))
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
