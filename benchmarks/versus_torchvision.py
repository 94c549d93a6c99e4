"""The same network with the same weights in flaxcnn, in plain linen and in PyTorch, in turns.

    python -m benchmarks.versus_torchvision --arch resnet18 --image_size 32 --batch_size 128
    python -m benchmarks.versus_torchvision --arch resnet50 vgg16 --mode predict --batch_size 1 8

Contestants: flaxcnn as it comes; flaxcnn with `FLAXCNN_PLAIN_CONVOLUTION=1`, which is linen as
everybody writes it; torchvision's network in eager mode in NCHW and in channels_last, and with
`--compile` by `torch.compile` in channels_last. A training step is forward, loss (GoogLeNet's
auxiliary ones included), backward and SGD with Nesterov's momentum and weight decay on one fixed
batch; flaxcnn's is that of `train.main`. To predict, flaxcnn has `optimize_for_inference`. bfloat16
is compute in it, with parameters in float32: torch's autocast.

They take turns (see `paired`), and the ratios are to the fastest torch. flaxcnn and torch keep
freed memory, in huge pages (`train.cpu`). All begin with the same weights: how far the logits of
these very networks are apart in evaluation is printed too. With `--peak` a product of matrices of
the same type takes turns with them, by which `readme_tables` tells how much of the device is used.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machine import cores, cpu_name
from benchmarks.paired import Contestant, Timing, time_in_turns
from benchmarks.row_files import in_place_of, make_folders, read_csv, write_csv, write_json

OURS, THEIRS = "benchmarks.workloads", "benchmarks.torch_workloads"
MODES = {"train": "training", "predict": "prediction"}
LAYOUTS = ("NCHW", "channels_last")
PEAK = "matrix product"  # the contestant of that name


class Case(NamedTuple):
    """What is compared in one table."""

    arch: str
    mode: str
    image_size: int  # pixels
    batch_size: int  # images
    precision: str


_MEASURED = "contestant versions device cpu first_step_seconds logits_apart round step_ms flops"
COLUMNS = (*Case._fields, *_MEASURED.split())  # of the files of results


def contestants(case: Case, options: argparse.Namespace, folder: str) -> list[Contestant]:
    """Who takes part; `folder` holds the weights."""
    work = case._asdict() | {"num_classes": options.num_classes, "folder": folder}
    mode = MODES[work.pop("mode")]
    threads = str(options.threads)
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes on one accelerator
        "JAX_ENABLE_COMPILATION_CACHE": "true" if options.compilation_cache else "false",
    }
    if options.compilation_cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(options.compilation_cache)
    plain = environment | {"FLAXCNN_PLAIN_CONVOLUTION": "1"}
    entries = [Contestant("flaxcnn", OURS, mode, work, environment)]
    if not options.no_plain:
        entries.append(Contestant("flaxcnn, plain", OURS, mode, work, plain))
    ways = [(layout, False) for layout in options.layout]
    if options.compile:
        ways.append(("channels_last", True))
    for layout, compiled in ways:
        name = f"torch, {layout}{', compiled' if compiled else ''}"
        how = {"layout": layout, "compiled": compiled, "threads": options.threads}
        entries.append(Contestant(name, THEIRS, mode, work | how, environment))
    if options.peak:
        product = {"precision": case.precision}
        entries.append(Contestant(PEAK, OURS, "matrix_product", product, environment))
    return entries


def compare(case: Case, options: argparse.Namespace) -> list[Timing]:
    """All contestants, in turns, from weights that torch draws."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = {
            "arch": case.arch,
            "image_size": case.image_size,
            "num_classes": options.num_classes,
            "folder": folder,
        }
        time_in_turns([Contestant("weights", THEIRS, "write_weights", drawn)], rounds=1)
        return time_in_turns(
            contestants(case, options, folder),
            rounds=options.rounds,
            round_seconds=options.round_seconds,
            at_once=options.at_once,
        )


def fastest_torch(timings: Sequence[Timing]) -> Timing:
    """The way to compare with."""
    return min(
        (t for t in timings if t.name.startswith("torch")), key=lambda timing: timing.median_ms
    )


def logits_apart(ours: Timing, theirs: Timing) -> float:
    """The largest difference of their logits, relative to the largest of torch's."""
    a, b = (np.array(t.facts["logits"].split(), np.float64) for t in (ours, theirs))
    return float(np.abs(a - b).max() / np.abs(b).max())


def table(timings: Sequence[Timing]) -> str:
    """Milliseconds per step, median and range over the rounds, and ratios to the fastest torch."""
    base = fastest_torch(timings)
    lines = [f"{'':32}{'median ms':>11}{'range ms':>19}{'  ratio to ' + base.name}"]
    for timing in timings:
        low, high = timing.range_ms
        ratio, least, greatest = timing.ratio_to(base)
        lines.append(
            f"{timing.name:32}{timing.median_ms:11.1f}{f'{low:.1f} .. {high:.1f}':>19}"
            f"  {ratio:.2f} ({least:.2f} .. {greatest:.2f})"
            f"  first step {float(timing.facts['first_step_seconds']):.1f} s"
        )
    apart = logits_apart(timings[0], base)
    lines.append(f"logits of flaxcnn and {base.name}: at most {apart:.1e} of the largest apart")
    return "\n".join(lines)


def rows_of(case: Case, timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """One row for each contestant and round."""
    base = fastest_torch(timings)
    return [
        {
            **case._asdict(),
            "contestant": timing.name,
            "versions": timing.facts["versions"],
            "device": timing.facts["device"],
            "cpu": cpu_name(),
            "first_step_seconds": timing.facts["first_step_seconds"],
            "logits_apart": f"{logits_apart(timing, base):.2e}" if timing.name != PEAK else "",
            "round": number,
            "step_ms": f"{1e3 * seconds:.4f}",
            "flops": timing.facts.get("flops", ""),  # of the matrix product
        }
        for timing in timings
        for number, seconds in enumerate(timing.seconds)
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, of this process if none is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", nargs="+", default=["resnet18"], help="torchvision's, resnet20 to 110 (resnet18)"
    )
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=["train"])
    parser.add_argument("--image_size", type=int, default=32, help="pixels (32)")
    parser.add_argument(
        "--batch_size", nargs="+", type=int, default=[128], help="images per step (128)"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32"]
    )
    parser.add_argument("--num_classes", type=int, default=10, help="(10)")
    parser.add_argument(
        "--layout",
        nargs="+",
        choices=list(LAYOUTS),
        default=list(LAYOUTS),
        help="of torch in eager mode (both)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile takes part")
    parser.add_argument(
        "--no_plain", action="store_true", help="without linen as everybody writes it"
    )
    parser.add_argument("--peak", action="store_true", help="a product of matrices takes part")
    parser.add_argument(
        "--at_once", action="store_true", help="set all of them up at once: for many cores"
    )
    parser.add_argument(
        "--compilation_cache",
        type=Path,
        help="folder of programs that flaxcnn compiled before (compiles; its first step then takes "
        "less, which is in the results)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="7 at least for a median (9)")
    parser.add_argument(
        "--round_seconds", type=float, default=1.0, help="of each in a round, about (1)"
    )
    parser.add_argument(
        "--threads", type=int, default=cores(), help="of torch (as many as there are cores)"
    )
    parser.add_argument(
        "--csv",
        type=Path,
        help="file to write every round to; what was compared before stays in it, "
        "but for what is compared again",
    )
    parser.add_argument("--json", type=Path, help="the rounds of this run as JSON")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.threads, options.image_size, *options.batch_size) < 1:
        parser.error("rounds, threads, image and batch sizes are at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Times, prints, writes; the files hold all that there are so far. Returns the exit code."""
    options = parse_arguments(arguments)
    make_folders(options.csv, options.json)
    earlier = read_csv(options.csv, COLUMNS)
    rows: list[dict[str, Any]] = []
    failed = 0
    for arch, mode, batch_size, precision in itertools.product(
        options.arch, options.mode, options.batch_size, options.precision
    ):
        case = Case(arch, mode, options.image_size, batch_size, precision)
        load = os.getloadavg()[0]
        try:
            timings = compare(case, options)
        except RuntimeError as error:
            print(f"{arch} {mode}: {error}", file=sys.stderr)
            failed = 1
            continue
        print(
            f"{arch} {mode}, {options.image_size} px, batch {batch_size}, {precision}, "
            f"{options.rounds} rounds"
        )
        # Torch's threads wait for each other in busy loops: on a machine at work it loses far more.
        print(f"{timings[0].facts['device']}, {cpu_name()}, load average before {load:.1f}")
        for versions in dict.fromkeys(timing.facts["versions"] for timing in timings):
            print(versions)
        print(table(timings), flush=True)
        rows += rows_of(case, timings)
        write_csv(options.csv, in_place_of(earlier, rows, Case._fields))
        write_json(options.json, rows)
    return failed


if __name__ == "__main__":
    sys.exit(main())
