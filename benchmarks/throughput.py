"""Images a second, of any network: training and prediction, by batch size, type and devices.

    python -m benchmarks.throughput --arch resnet50 vgg16 --mode train --batch_size 8 32
    python -m benchmarks.throughput --arch resnet50 --precision bfloat16 --batch_size max
    python -m benchmarks.throughput --arch resnet50 --devices all

Every combination is timed in a process of its own, in turns with a matrix product of the same type
in another: utilisation is the network's multiply-adds a second by those of the product, round by
round. A training step is that of `train.main`, and counts three times its forward pass; prediction
is that of `optimize_for_inference`. `--batch_size` is of each device: `--devices all` shows weak
scaling, on 1, 2, 4 and so on of them. `--batch_size max` is the largest that fits by XLA's plan.

Memory is what the device's allocator says was its peak after a first step, on a CPU that of the
whole process. Compile time is tracing and compiling, which no other time contains, and is not saved
by a cache. For a CPU or GPU: a TPU takes one process at a time.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import largest_batch
from benchmarks.machine import cpu_name
from benchmarks.paired import Contestant, Timing, time_in_turns
from benchmarks.row_files import make_folders, write_csv, write_json

WORKLOADS = "benchmarks.workloads"
MODES = {"train": "training", "predict": "prediction"}
PRECISIONS = ("float32", "bfloat16")


class Case(NamedTuple):
    """One row of the results."""

    arch: str
    mode: str
    image_size: int  # pixels
    batch_size: int  # images of each device
    precision: str
    devices: int


def row_of(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a case: what it is, what it took, and where."""
    environment = environment_for(case.devices)
    arguments = {"precision": case.precision}
    timings = time_in_turns(
        [
            Contestant("matrix product", WORKLOADS, "matrix_product", arguments, environment),
            Contestant(
                case.arch,
                WORKLOADS,
                MODES[case.mode],
                {
                    "arch": case.arch,
                    "image_size": case.image_size,
                    "batch_size": case.batch_size * case.devices,
                    "num_classes": options.num_classes,
                    "precision": case.precision,
                    "devices": case.devices,
                },
                environment,
            ),
        ],
        rounds=options.rounds,
        round_seconds=options.round_seconds,
    )
    return {**case._asdict(), **numbers_of(case, options.num_classes, *timings)}


def numbers_of(case: Case, num_classes: int, product: Timing, network: Timing) -> dict[str, Any]:
    """Medians and ranges of the rounds; a CPU's devices share the peak that one of them has."""
    import flaxcnn
    from benchmarks.workloads import CHANNELS, TRAINING_FACTOR

    model = flaxcnn.create_model(case.arch, num_classes=num_classes)
    size = case.image_size
    forward = 2 * flaxcnn.summarize(model, image_size=size, in_channels=CHANNELS).macs
    images = case.batch_size * case.devices
    flops = forward * images * (TRAINING_FACTOR if case.mode == "train" else 1)
    peaks = 1 if network.facts["device"] == "cpu" else case.devices
    peak_rates = [peaks * float(product.facts["flops"]) / s for s in product.seconds]
    rates = [flops / s for s in network.seconds]
    low, high = network.range_ms
    return {
        "images_per_second": round(1e3 * images / network.median_ms, 2),
        "step_ms": round(network.median_ms, 3),
        "fastest_ms": round(low, 3),
        "slowest_ms": round(high, 3),
        "rounds": len(network.seconds),
        "compile_seconds": float(network.facts["compile_seconds"]),
        "peak_mb": round(int(network.facts["peak_bytes"]) / 1e6),
        "planned_mb": round(int(network.facts["planned_bytes"]) / 1e6),
        "gflops_per_second": round(statistics.median(rates) / 1e9, 1),
        "utilisation": round(
            statistics.median(r / p for r, p in zip(rates, peak_rates, strict=True)), 3
        ),
        "device": network.facts["device"],
        "cpu": cpu_name(),
        "versions": network.facts["versions"],
    }


def environment_for(devices: int) -> dict[str, str]:
    """So that two processes share an accelerator, and a CPU is as many devices as are asked for."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {
        "XLA_FLAGS": flags.strip(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def device_counts(asked: str) -> list[int]:
    """1, 2, 4 and so on up to all there are, for "all"; a number for a number."""
    if asked != "all":
        return [int(asked)]
    program = "import jax; print(jax.device_count())"
    shown = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    available = int(shown.stdout.splitlines()[-1])
    return sorted({min(2**i, available) for i in range(available.bit_length() + 1)})


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """What the command line asks for; 0 images stand for the largest batch."""
    import flaxcnn

    for arch, mode, precision, devices, batch_size in itertools.product(
        options.arch,
        options.mode,
        options.precision,
        device_counts(options.devices),
        options.batch_size,
    ):
        image_size = options.image_size or flaxcnn.create_model(arch).default_image_size
        images = 0 if batch_size == "max" else int(batch_size)
        yield Case(arch, mode, image_size, images, precision, devices)


def with_its_batch(case: Case, num_classes: int) -> Case:
    """The largest batch is looked for when its turn comes."""
    if case.batch_size:
        return case
    batch_size = largest_batch.find(
        workload=MODES[case.mode],
        devices=case.devices,
        arch=case.arch,
        image_size=case.image_size,
        num_classes=num_classes,
        precision=case.precision,
    )
    return case._replace(batch_size=batch_size)


COLUMNS = {
    "arch": "network",
    "mode": "mode",
    "image_size": "px",
    "batch_size": "batch",
    "precision": "type",
    "devices": "devices",
    "images_per_second": "images/s",
    "step_ms": "step, ms",
    "fastest_ms": "from",
    "slowest_ms": "to",
    "compile_seconds": "compile, s",
    "peak_mb": "peak, MB",
    "utilisation": "utilisation",
}


def line(row: Mapping[str, Any]) -> str:
    """A row of the table; of `COLUMNS` itself, its titles."""
    widths = [max(len(title), 8) for title in COLUMNS.values()]
    widths[0] = 18
    cells = [str(row[key]) for key in COLUMNS]
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, of this process if none is given; it names no network that is none."""
    import flaxcnn

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", nargs="+", default=["resnet50"], help="networks, or all (resnet50)"
    )
    parser.add_argument(
        "--mode", nargs="+", choices=list(MODES), default=list(MODES), help="(train predict)"
    )
    parser.add_argument(
        "--batch_size", nargs="+", default=["8"], help="images of each device, or max (8)"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["float32"], help="(float32)"
    )
    parser.add_argument(
        "--devices", default="1", help="how many, or all: 1, 2, 4 and so on of them (1)"
    )
    parser.add_argument("--image_size", type=int, help="pixels (as the network was published)")
    parser.add_argument("--num_classes", type=int, default=1000, help="(1000)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (9)")
    parser.add_argument(
        "--round_seconds", type=float, default=1.0, help="of each in a round, about (1)"
    )
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    parser.add_argument("--json", type=Path, help="the same as JSON")
    options = parser.parse_args(arguments)
    known = flaxcnn.list_models()
    if "all" in options.arch:
        options.arch = known
    for arch in options.arch:
        if arch not in known:
            parser.error(f"--arch: no network {arch}; there are {', '.join(known)}")
        least = flaxcnn.create_model(arch).min_size
        if options.image_size is not None and options.image_size < least:
            parser.error(f"--image_size: {arch} needs images of at least {least} pixels")
    for size in options.batch_size:
        if size != "max" and not (size.isdecimal() and int(size) > 0):
            parser.error(f"--batch_size: {size} is neither a number of images nor max")
    if options.devices != "all" and not (options.devices.isdecimal() and int(options.devices) > 0):
        parser.error(f"--devices: {options.devices} is neither a number nor all")
    for flag in ("rounds", "num_classes"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints each row when it is there; the files hold all that there are so far.

    Returns the exit code: 1 where a case failed, which is told, and the others go on.
    """
    options = parse_arguments(arguments)
    make_folders(options.csv, options.json)
    print(line(COLUMNS))
    rows: list[dict[str, Any]] = []
    failed = 0
    for case in cases(options):
        try:
            rows.append(row_of(with_its_batch(case, options.num_classes), options))
        except RuntimeError as error:
            print(f"{case.arch} {case.mode}: {error}", file=sys.stderr)
            failed = 1
            continue
        print(line(rows[-1]), flush=True)
        write_csv(options.csv, rows)
        write_json(options.json, rows)
    if rows:
        print(f"{rows[0]['device']} ({rows[0]['cpu']}); {rows[0]['versions']}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
