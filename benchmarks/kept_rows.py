"""Results that are kept row by row, so that a long benchmark goes on where it was stopped."""

import argparse
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


def parse_arguments(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """`--csv`, the file of kept rows, and `--seeds`, how many runs of each kind."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="file to append the runs to")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (3)")
    return parser.parse_args(arguments)
