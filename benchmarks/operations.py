"""Which operations of XLA's program a step spends its time in, by JAX's profiler.

    python -m benchmarks.operations --arch resnet50 --mode train predict --image_size 224 \\
        --batch_size 128 --precision bfloat16

On a GPU those are kernels, on a CPU whatever XLA runs on its threads, several at once, and a call
of oneDNN includes the time until it is its turn: their sum may be more than the step. Busy is the
time in which at least one runs; what is missing to the step is spent on launches and on Python.
"""

import argparse
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import workloads
from benchmarks.machine import cpu_name
from benchmarks.row_files import make_folders, write_csv, write_json

MODES = {"train": workloads.training, "predict": workloads.prediction}
_WARM, _STEPS, _ROUNDS = 3, 5, 7


class Event(NamedTuple):
    """One run of one operation, by the profiler's clock."""

    operation: str  # XLA's name
    start_ns: float
    end_ns: float


class Share(NamedTuple):
    """What one operation, or all of a kind, take of a step."""

    name: str
    ms: float
    times: float  # a step


def profiled(step: Callable[[], object], steps: int) -> list[Event]:
    """What ran on the device while so many steps were taken.

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow down each of our calls
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                step()
        (file,) = Path(folder).rglob("*.xplane.pb")
        events = events_of(list(jax.profiler.ProfileData.from_file(str(file)).planes))
    if not events:
        raise RuntimeError("the profiler saw no operation")
    return events


def events_of(planes: Sequence[Any]) -> list[Event]:
    """Of XLA's operations: a GPU's kernels, which have a plane of their own, or what a CPU runs."""
    of_devices = [plane for plane in planes if plane.name.startswith("/device:")]
    return [event for plane in of_devices or planes for event in _on(plane)]


def _on(plane: Any) -> list[Event]:
    found = []
    for line in plane.lines:
        for event in line.events:
            operation = dict(event.stats).get("hlo_op")
            if operation is not None:
                end_ns = event.start_ns + event.duration_ns
                found.append(Event(str(operation), event.start_ns, end_ns))
    return found


def kind(operation: str) -> str:
    """XLA's name without its number."""
    return re.sub(r"(\.\d+)+$", "", operation)


def shares(events: Iterable[Event], steps: int, naming: Callable[[str], str]) -> list[Share]:
    """Summed up under the name that `naming` makes of an operation's, the longest first."""
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(naming(event.operation), []).append(event.end_ns - event.start_ns)
    found = [
        Share(name, sum(spent) / 1e6 / steps, len(spent) / steps) for name, spent in by_name.items()
    ]
    return sorted(found, key=lambda share: -share.ms)


def busy_ms(events: Iterable[Event], steps: int) -> float:
    """Of a step, in which at least one operation ran."""
    busy, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start_ns):
        busy += max(0.0, event.end_ns - max(event.start_ns, until))
        until = max(until, event.end_ns)
    return busy / 1e6 / steps


def undisturbed_ms(step: Callable[[], object]) -> float:
    """Of a step without the profiler, the median of some."""
    spent = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        step()
        spent.append(1e3 * (time.perf_counter() - started))
    return statistics.median(spent)


def table(title: str, found: Sequence[Share]) -> str:
    """Milliseconds and runs of a step."""
    lines = [f"{title:52}{'ms':>10}{'times':>9}"]
    lines += [f"{share.name[:51]:52}{share.ms:10.3f}{share.times:9.1f}" for share in found]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, of this process if none is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["resnet50"], help="networks (resnet50)")
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=["train"])
    parser.add_argument("--image_size", type=int, default=224, help="pixels (224)")
    parser.add_argument("--batch_size", type=int, default=8, help="images (8)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--num_classes", type=int, default=1000, help="(1000)")
    parser.add_argument("--show", type=int, default=12, help="so many of the longest (12)")
    parser.add_argument("--csv", type=Path, help="file to write every operation to")
    parser.add_argument("--json", type=Path, help="the same as JSON")
    options = parser.parse_args(arguments)
    if min(options.image_size, options.batch_size, options.num_classes, options.show) < 1:
        parser.error("sizes and numbers are at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes; returns the exit code."""
    options = parse_arguments(arguments)
    make_folders(options.csv, options.json)
    rows: list[dict[str, Any]] = []
    for arch, mode in itertools.product(options.arch, options.mode):
        sizes = (options.image_size, options.batch_size, options.num_classes)
        step, facts = MODES[mode](arch, *sizes, options.precision)
        for _ in range(_WARM):
            step()
        step_ms = undisturbed_ms(step)
        events = profiled(step, _STEPS)
        each = shares(events, _STEPS, str)
        print(
            f"{arch}, {mode}, {options.image_size} px, batch {options.batch_size}, "
            f"{options.precision}: a step {step_ms:.2f} ms; profiled, busy "
            f"{busy_ms(events, _STEPS):.2f} ms\n{facts['device']}, {cpu_name()}; "
            f"{facts['versions']}"
        )
        print(table("all of a kind", shares(events, _STEPS, kind)[: options.show]))
        print(table("one", each[: options.show]), flush=True)
        case = {
            "arch": arch,
            "mode": mode,
            "image_size": options.image_size,
            "batch_size": options.batch_size,
            "precision": options.precision,
            "versions": facts["versions"],
            "device": facts["device"],
            "cpu": cpu_name(),
            "step_ms": round(step_ms, 3),
        }
        rows += [case | share._asdict() for share in each]
        write_csv(options.csv, rows)
        write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
