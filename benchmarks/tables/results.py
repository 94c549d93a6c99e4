"""The files of results in `benchmarks/results/`, as the tables read them."""

import csv
import pathlib
from collections.abc import Iterator, Sequence
from statistics import median

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def rows(pattern: str) -> Iterator[dict[str, str]]:
    """Of all files of results with such names, one after the other.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(RESULTS.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no {pattern} in {RESULTS}")
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios within the rounds."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])
