"""What `benchmarks.operations` makes of a profile."""

import csv
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import operations
from benchmarks.operations import Event, Share

ROOT = pathlib.Path(__file__).parents[1]
MS = 1e6  # nanoseconds

# Of two steps: two convolutions, beside one of which, in part, runs an addition.
EVENTS = [
    Event("convolution.1", 0 * MS, 4 * MS),
    Event("add_fusion", 3 * MS, 6 * MS),
    Event("convolution.2", 10 * MS, 12 * MS),
]


def plane(name: str, *events: Any) -> Any:
    return SimpleNamespace(name=name, lines=[SimpleNamespace(events=list(events))])


def event(start: float, duration: float, **stats: str) -> Any:
    return SimpleNamespace(start_ns=start, duration_ns=duration, stats=list(stats.items()))


def test_shares_are_of_a_step_and_the_longest_first() -> None:
    assert operations.shares(EVENTS, 2, operations.kind) == [
        Share("convolution", 3.0, 1.0),
        Share("add_fusion", 1.5, 0.5),
    ]
    assert [share.name for share in operations.shares(EVENTS, 2, str)] == [
        "convolution.1",
        "add_fusion",
        "convolution.2",
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_what_runs_at_once_is_busy_once(order: int) -> None:
    assert operations.busy_ms(EVENTS[::order], 2) == 4.0
    within = [*EVENTS, Event("part", 1 * MS, 2 * MS)]
    assert operations.busy_ms(within[::order], 2) == 4.0


def test_of_a_gpu_only_its_kernels_are_asked() -> None:
    host = plane("/host:CPU", event(0, 5, hlo_op="launch"), event(5, 1, other="python"))
    device = plane("/device:GPU:0", event(1, 2, hlo_op="gemm", hlo_module="jit"), event(3, 1))
    assert operations.events_of([host, device]) == [Event("gemm", 1, 3)]
    assert operations.events_of([host]) == [Event("launch", 0, 5)]


def test_a_step_on_this_machine(tmp_path: pathlib.Path) -> None:
    results = tmp_path / "operations.csv"
    small = ["--arch=lenet5", "--image_size=32", "--batch_size=8", "--num_classes=10"]
    program = [sys.executable, "-m", "benchmarks.operations", *small, f"--csv={results}"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "lenet5, train, 32 px, batch 8, float32: a step" in done.stdout
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum("convolution" in row["name"] for row in rows) >= 3
    assert all(float(row["ms"]) > 0 and float(row["times"]) > 0 for row in rows)
    # Each once a step; what waits for another is still counted.
    assert max(float(row["times"]) for row in rows if "convolution" in row["name"]) == 1
