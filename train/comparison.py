"""Candidates of `train.advice` run one after the other, their table, and a verdict."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flaxcnn import tables
from train.advice import Candidate
from train.config import Config
from train.errors import DivergedError, UsageError


class Outcome(NamedTuple):
    """What came of a run."""

    exit_code: int
    results: dict[str, float] | None  # "top1" and "n" of the last evaluation
    trained: int  # parameters
    resumed: bool


class Measured(NamedTuple):
    """A candidate and how it did; top1 is None where its loss ceased to be finite."""

    name: str
    top1: float | None
    n: int
    trained: int | None
    seconds: float | None  # None where a run was resumed, so that nobody saw the whole of it

    @property
    def variance(self) -> float:
        """Of the share that is right among n test images."""
        assert self.top1 is not None
        return self.top1 * (1 - self.top1) / self.n


def compare(
    ways: Sequence[Candidate], run: Callable[[Config], Outcome], say: Callable[[str], None]
) -> int:
    """Runs each, in WORKDIR/NAME if there is a WORKDIR, prints the table; returns the exit code.

    Raises:
        UsageError: as the runs do, and for a run of several processes.
    """
    if any(way.config.coordinator_address or way.config.num_processes for way in ways):
        raise UsageError("--compare is for one process; run its commands one by one")
    measured = []
    for number, way in enumerate(ways, 1):
        config = way.config
        if config.workdir:
            folder = pathlib.Path(config.workdir, way.name.replace(" ", "_"))
            config = dataclasses.replace(config, workdir=str(folder))
        say(f"\n== {number} of {len(ways)}: {way.name}")
        started = time.perf_counter()
        try:
            outcome = run(config)
        except DivergedError as error:
            say(f"{way.name}: {error}")
            measured.append(Measured(way.name, None, 0, None, None))
            continue
        seconds = None if outcome.resumed else time.perf_counter() - started
        if outcome.exit_code != 0:
            return outcome.exit_code
        assert outcome.results is not None  # as the run went to its end
        top1, n = outcome.results["top1"], int(outcome.results["n"])
        measured.append(Measured(way.name, top1, n, outcome.trained, seconds))
    say("")
    say(table(measured))
    say(verdict(measured))
    return 0


_COLUMNS = (
    tables.Column("name", "", to_the_right=False),
    tables.Column("top1", "test top-1", lambda share: f"{share:.2%}"),
    tables.Column("seconds", "time, s", lambda seconds: f"{seconds:.0f}"),
    tables.Column("trained", "trained parameters", tables.count),
)


def table(measured: Sequence[Measured]) -> str:
    """One row each, in the order of the runs."""
    return tables.aligned(_COLUMNS, [row._asdict() for row in measured])


def verdict(measured: Sequence[Measured]) -> str:
    """Of those that the test images cannot tell from the best, that with the fewest parameters."""
    finished = [row for row in measured if row.top1 is not None]
    if not finished:
        return "verdict: none; every loss ceased to be finite"
    best = max(finished, key=lambda row: row.top1 or 0.0)
    tied = [row for row in finished if _difference(best, row) <= _noise(best, row)]
    chosen = min(tied, key=lambda row: (row.trained or 0, row is not best))
    if chosen is best:
        others = [row for row in finished if row is not best]
        if not others:
            return f"verdict: {best.name}"
        second = max(others, key=lambda row: row.top1 or 0.0)
        ahead = 100 * _difference(best, second)
        return f"verdict: {best.name}, {ahead:.1f} points ahead of {second.name}"
    return (
        f"verdict: {chosen.name}; {best.name} is {100 * _difference(best, chosen):.1f} points "
        f"better, and {best.n} test images tell {100 * _noise(best, chosen):.1f} points apart"
    )


def _difference(best: Measured, other: Measured) -> float:
    assert best.top1 is not None
    assert other.top1 is not None
    return best.top1 - other.top1


def _noise(a: Measured, b: Measured) -> float:
    """Two standard errors of the difference of two shares of right answers."""
    return 2 * math.sqrt(a.variance + b.variance)
