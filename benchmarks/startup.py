"""How long it takes to begin: importing, and the first training step with and without a cache.

    python -m benchmarks.startup --csv startup.csv

`import flaxcnn` and `import flax.linen` take turns, each in a process of its own, the interpreter's
start included. Then `python -m train.main --steps=1` of each `--arch` on digits, cold, with an
empty compilation cache, and again with what that left there (`JAX_COMPILATION_CACHE_DIR`): the
whole process, evaluation of 360 images included. Files are in the page cache for all. And of each
`--trace` what JAX takes to trace the trainer's step, which each start waits for, here and in linen
as everybody writes it (`FLAXCNN_PLAIN_CONVOLUTION=1`).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.machine import cpu_name
from benchmarks.row_files import make_folders, write_csv

IMPORTS = ("flaxcnn", "flax.linen")
FLAGS = ("--dataset=digits", "--steps=1", "--batch_size=32")


def seconds_of(arguments: Sequence[str], environment: Mapping[str, str]) -> float:
    """One process of Python, from its start to its end."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    return time.perf_counter() - started


def import_times(rounds: int) -> dict[str, list[float]]:
    """Module -> seconds, of rounds in turns; the first, which reads files from disk, left out."""
    times: dict[str, list[float]] = {f"import {name}": [] for name in IMPORTS}
    for turn in range(rounds + 1):
        for name in IMPORTS:
            seconds = seconds_of(["-c", f"import {name}"], {})
            if turn:
                times[f"import {name}"].append(seconds)
    return times


def first_step_times(arch: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of runs of one step, each pair with a cache of its own."""
    cold, cached = f"{arch}, first step, cold", f"{arch}, first step, cached"
    times: dict[str, list[float]] = {cold: [], cached: []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            environment = {
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_ENABLE_COMPILATION_CACHE": "true",
            }
            command = ["-m", "train.main", f"--arch={arch}", *FLAGS]
            for name in (cold, cached):
                times[name].append(seconds_of(command, environment))
    return times


def tracing_times(arch: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of tracing, of rounds in turns, each in a process of its own."""
    environments = {
        f"{arch}, tracing a step": {},
        f"{arch}, tracing a step, plain linen": {"FLAXCNN_PLAIN_CONVOLUTION": "1"},
    }
    command = f"from benchmarks import workloads as w; print(w.seconds_to_trace({arch!r}, 64, 8))"
    times: dict[str, list[float]] = {name: [] for name in environments}
    for _ in range(rounds):
        for name, environment in environments.items():
            answer = subprocess.run(
                [sys.executable, "-c", command],
                check=True,
                stdout=subprocess.PIPE,
                env={**os.environ, **environment},
            )
            times[name].append(float(answer.stdout))
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints medians and ranges; writes one row for each process to `--csv`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", nargs="*", default=["resnet18", "vgg16"], help="networks (resnet18 vgg16)"
    )
    parser.add_argument(
        "--trace",
        nargs="*",
        default=["resnet50", "googlenet", "efficientnet_b0"],
        help="networks (resnet50 googlenet efficientnet_b0)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="imports, tracings of each (9)")
    parser.add_argument("--runs", type=int, default=3, help="pairs of first steps of each (3)")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.runs) < 1:
        parser.error("--rounds and --runs must be at least 1")
    make_folders(options.csv)
    times = import_times(options.rounds)
    ours, theirs = (times[f"import {name}"] for name in IMPORTS)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    for arch in options.arch:
        times |= first_step_times(arch, options.runs)
    for arch in options.trace:
        times |= tracing_times(arch, options.rounds)
    for name, seconds in times.items():
        print(
            f"{name}: {statistics.median(seconds):.2f} s "
            f"({min(seconds):.2f} .. {max(seconds):.2f}, {len(seconds)} processes)"
        )
    print(f"import {IMPORTS[0]} takes {ratio:.2f} times import {IMPORTS[1]}, median of the rounds")
    facts = {"jax": metadata.version("jax"), "cpu": cpu_name()}
    rows = [
        {"what": name, "round": number, "seconds": round(value, 3), **facts}
        for name, seconds in times.items()
        for number, value in enumerate(seconds)
    ]
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
