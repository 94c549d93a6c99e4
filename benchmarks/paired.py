"""Paired timing: contestants in processes of their own, taking turns.

A shared machine drifts by more than what is measured, so that two medians of separate runs say
little. Here every contestant is set up first, each in a subprocess with its own environment, and
then all take turns, A B C C B A ...: what disturbs a round disturbs all. The ratio of two is the
median of the ratios within the rounds.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

_MARK = "@paired "  # before what a worker has to say, whatever else it prints


@dataclass(frozen=True)
class Contestant:
    """Work that a worker process sets up: `module.setup(**arguments)`.

    `setup` returns (step, facts): a function that does one unit of work and waits for it, and a
    mapping of strings to say what ran (versions, device).
    """

    name: str
    module: str
    setup: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # must survive JSON
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of this process's


@dataclass(frozen=True)
class Timing:
    """One contestant's seconds per step, a mean of several steps for each round."""

    name: str
    seconds: tuple[float, ...]
    facts: Mapping[str, str]

    @property
    def median_ms(self) -> float:
        """The median round."""
        return 1e3 * statistics.median(self.seconds)

    @property
    def range_ms(self) -> tuple[float, float]:
        """The fastest and the slowest round."""
        return 1e3 * min(self.seconds), 1e3 * max(self.seconds)

    def ratio_to(self, base: "Timing") -> tuple[float, float, float]:
        """This one's time over that of `base`, round by round: median, least, greatest."""
        ratios = [a / b for a, b in zip(self.seconds, base.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def time_in_turns(
    contestants: Sequence[Contestant],
    *,
    rounds: int = 9,
    round_seconds: float = 1.0,
    at_once: bool = False,
) -> list[Timing]:
    """Times all contestants, interleaved; about `round_seconds` for each in a round.

    They are set up one after the other, as compilation takes all cores of a small machine, or
    `at_once` where there are many; then libraries that try their algorithms do so beside others at
    work, and may choose a slower one.

    Raises:
        RuntimeError: a worker failed; the message ends with what it printed.
    """
    workers: list[_Worker] = []
    try:
        for contestant in contestants:
            workers.append(_Worker(contestant, round_seconds))
            if not at_once:
                workers[-1].wait_until_ready()
        for worker in workers:
            worker.wait_until_ready()
        for worker in workers if at_once else ():
            worker.time_pace()
        for turn in range(rounds):
            for worker in workers if turn % 2 == 0 else workers[::-1]:
                worker.time_round()
        return [Timing(w.name, tuple(w.seconds), w.facts) for w in workers]
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """The near end of a worker process."""

    def __init__(self, contestant: Contestant, round_seconds: float) -> None:
        self.name = contestant.name
        self.seconds: list[float] = []
        self.facts: dict[str, str] = {}
        self._round_seconds = round_seconds
        self._steps = 0  # in a round; until it is ready
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.paired"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **contestant.environment},
        )
        try:
            self._tell([contestant.module, contestant.setup, dict(contestant.arguments)])
        except BaseException:
            self.close()
            raise

    def wait_until_ready(self) -> None:
        """Until its set-up is over; at once if it has been."""
        if not self._steps:
            ready = self._answer()
            self.facts = ready["facts"]
            self._set_pace(ready["seconds"])

    def time_pace(self) -> None:
        """Anew: what the set-up found is too slow where others were set up beside it."""
        self._tell(2)
        self._set_pace(self._answer())

    def _set_pace(self, seconds: float) -> None:
        self._steps = max(1, round(self._round_seconds / seconds))

    def time_round(self) -> None:
        """Adds one to `seconds`."""
        self._tell(self._steps)
        self.seconds.append(self._answer())

    def _tell(self, what: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; its answer is the reason

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        self._errors.seek(0)
        tail = self._errors.read()[-2000:]
        raise RuntimeError(f"{self.name}: the worker stopped; it printed:\n{tail}")

    def close(self) -> None:
        """Ends the process; may be called twice."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=10)  # a closed stdin tells it to stop
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def _mean_seconds(step: Callable[[], object], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def _work() -> None:
    """The far end: set up, then time as many steps as each line of stdin says."""

    def answer(value: Any) -> None:
        print(_MARK + json.dumps(value), flush=True)

    module, setup, arguments = json.loads(sys.stdin.readline())
    step, facts = getattr(importlib.import_module(module), setup)(**arguments)
    _mean_seconds(step, 2)  # compiles, and fills the allocator's caches
    answer({"facts": facts, "seconds": _mean_seconds(step, 2)})
    for line in sys.stdin:
        step()  # the others ran meanwhile: warm the caches again
        answer(_mean_seconds(step, json.loads(line)))


if __name__ == "__main__":
    _work()
