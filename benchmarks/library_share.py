"""How much of a training step on a CPU is not XLA's: what oneDNN computes, or our own functions.

    python -m benchmarks.library_share --arch resnet18 googlenet --image_size 224 --batch_size 8

By a clock around each call of theirs, of which one runs at a time. XLA may compute beside it.
Python makes the calls, which takes longer than those that are compiled (`flaxcnn.cpu.repeats`).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.machine import cpu_name
from benchmarks.row_files import make_folders, write_csv
from flaxcnn.cpu import onednn, repeats
from flaxcnn.cpu.plans import Function


class Clock:
    """Seconds so far in which was computed, and in which kernels were reordered or transformed."""

    def __init__(self) -> None:
        self.computing = self.reordering = 0.0

    def watch(self) -> None:
        """From now on, for good; before anything is compiled."""
        library: Any = onednn.library()
        library.execute = self._timed("computing", library.execute)
        library.execute_quickly = self._timed("reordering", library.execute_quickly)
        run: Any = Function.run  # which calls our own directly

        def timed(function: Function, *arguments: Any) -> None:
            what = "reordering" if "kernel" in function.name else "computing"
            self._timed(what, run)(function, *arguments)

        Function.run = timed  # type: ignore[assignment, method-assign]

    def _timed(self, what: str, execute: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            status = execute(*arguments)
            setattr(self, what, getattr(self, what) + time.perf_counter() - started)
            return status

        return call


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the medians; writes one row for each step to `--csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["resnet18"], help="networks (resnet18)")
    parser.add_argument("--image_size", type=int, default=224, help="pixels (224)")
    parser.add_argument("--batch_size", type=int, default=8, help="images (8)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each (15)")
    parser.add_argument("--csv", type=Path, help="file to write the steps to")
    options = parser.parse_args(arguments)
    if not onednn.available():
        parser.error(f"oneDNN is not installed (the package {onednn.PACKAGE})")
    make_folders(options.csv)
    clock = Clock()
    clock.watch()
    with repeats.switched_off():
        measure(options, clock)


def measure(options: argparse.Namespace, clock: Clock) -> None:
    """As `main` says."""
    rows: list[dict[str, Any]] = []
    for arch in options.arch:
        size, images = options.image_size, options.batch_size
        step, facts = workloads.training(arch, size, images, 1000, "float32")
        for _ in range(3):
            step()
        mine = []
        for number in range(options.rounds):
            started, computing, reordering = time.perf_counter(), clock.computing, clock.reordering
            step()
            spent = {
                "step_ms": time.perf_counter() - started,
                "computing_ms": clock.computing - computing,
                "reordering_ms": clock.reordering - reordering,
            }
            mine.append(
                {
                    "arch": arch,
                    "image_size": size,
                    "batch_size": images,
                    "round": number,
                    **{name: round(1e3 * seconds, 2) for name, seconds in spent.items()},
                    "versions": facts["versions"],
                    "cpu": cpu_name(),
                }
            )
        step_ms, computing_ms, reordering_ms = (
            statistics.median(row[name] for row in mine)
            for name in ("step_ms", "computing_ms", "reordering_ms")
        )
        print(
            f"{arch}: {step_ms:.0f} ms, of which calls compute {computing_ms:.0f} and reorder or "
            f"transform kernels {reordering_ms:.0f}",
            flush=True,
        )
        rows += mine
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
