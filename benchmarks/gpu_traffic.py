"""What XLA makes of a network for an NVIDIA H100, and the bytes that it moves; without a GPU.

    pip install -e ".[cuda]"
    python -m benchmarks.gpu_traffic --arch resnet50 vgg16 --mode train --batch_size 128

Most of a network on a GPU is limited by memory, and what XLA keeps, copies or computes twice shows
in the program that it compiles. For that it needs a description of the device alone, which is here.
Without the device it tries no algorithms: the convolutions' are not those that would run.

Each kernel is taken to read its arguments and write its results once, whole: of what it reads in
part that is too much. The total over the device's bandwidth is about the least time. In bfloat16.
"""

import argparse
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.row_files import make_folders, write_csv, write_json

# `GpuTargetConfigProto` of XLA, as text; the numbers are those that CUDA tells of the device.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BANDWIDTH = 3.35e12  # bytes a second, by its data sheet
MODES = {"train": "training_program", "predict": "prediction_program"}

_TYPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_OPERATION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$")
_NO_KERNEL = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "opt-barrier"}


class Kernel(NamedTuple):
    """One operation of a compiled program."""

    name: str  # XLA's
    megabytes: float  # of arguments and results
    results: str
    arguments: str
    origin: str  # the end of JAX's name for what it was made of


def kernels(program: str) -> list[Kernel]:
    """Those of the entry computation of a compiled program's text, in their order."""
    entry = program[program.index("\nENTRY ") :].splitlines()[2:]
    types: dict[str, str] = {}
    found = []
    for line in itertools.takewhile(lambda line: line != "}", entry):
        if not (match := _OPERATION.match(line)):
            continue
        name, types[match[1]], operation, arguments, rest = match.groups()
        if operation in _NO_KERNEL:
            continue
        taken = [types.get(argument, "") for argument in re.findall(r"%([\w.\-]+)", arguments)]
        origin = re.search(r'op_name="([^"]*)"', rest)
        found.append(
            Kernel(
                name,
                (sum(map(_bytes_of, taken)) + _bytes_of(types[name])) / 1e6,
                _without_layout(types[name]),
                _without_layout(", ".join(taken)),
                "/".join(origin[1].split("/")[-3:]) if origin else "",
            )
        )
    return found


def _bytes_of(types: str) -> int:
    """Of all arrays in such a text as "(bf16[8,64]{1,0}, u8[0])"."""
    total = 0
    for name, sizes in _TYPE.findall(types):
        bits = 8 if name == "pred" else int("".join(filter(str.isdigit, name)) or 0)
        elements = 1
        for size in filter(None, sizes.split(",")):
            elements *= int(size)
        total += elements * bits // 8
    return total


def _without_layout(types: str) -> str:
    return re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", types)


def compiled(arch: str, mode: str, image_size: int, batch_size: int, num_classes: int) -> Any:
    """The program of `train.main`'s step or of a prediction, for an H100.

    Raises:
        RuntimeError: where JAX has no plugin for NVIDIA's GPUs.
    """
    from jax.experimental import topologies

    from benchmarks import workloads

    try:
        described = topologies.get_topology_desc(
            "", platform="cuda", target_config=H100, topology="1x1x1"
        )
    except NotImplementedError as error:  # no plugin of that name has registered itself
        raise RuntimeError('no plugin for NVIDIA\'s GPUs; pip install -e ".[cuda]"') from error
    program = getattr(workloads, MODES[mode])
    return program(
        arch, image_size, batch_size, num_classes, "bfloat16", device=described.devices[0]
    )


def report(program: Any, shown: int) -> str:
    """The total, by kind of kernel, and the largest kernels."""
    from benchmarks import workloads

    found = kernels(program.as_text())
    total = sum(kernel.megabytes for kernel in found)
    planned = workloads.planned_bytes(program) / 1e6
    lines = [
        f"{total:,.0f} MB in {len(found)} kernels, {1e9 * total / BANDWIDTH:.2f} ms at "
        f"{BANDWIDTH / 1e12:.2f} TB/s; memory by XLA's plan {planned:,.0f} MB"
    ]
    kinds: Counter[str] = Counter()
    for kernel in found:
        kinds[re.sub(r"[.\d]+$", "", kernel.name)] += round(1000 * kernel.megabytes)
    lines += [f"{kilobytes / 1000:10,.0f}  {kind}" for kind, kilobytes in kinds.most_common(12)]
    largest = sorted(found, key=lambda kernel: -kernel.megabytes)[:shown]
    lines += [
        f"{k.megabytes:10,.0f}  {k.name}: {k.results} of {k.arguments} | {k.origin}"
        for k in largest
    ]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, of this process if none is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["resnet50"], help="networks (resnet50)")
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=["train"])
    parser.add_argument("--image_size", type=int, default=224, help="pixels (224)")
    parser.add_argument("--batch_size", type=int, default=128, help="images (128)")
    parser.add_argument("--num_classes", type=int, default=1000, help="(1000)")
    parser.add_argument("--show", type=int, default=12, help="so many of the largest kernels (12)")
    parser.add_argument("--csv", type=Path, help="file to write every kernel to")
    parser.add_argument("--json", type=Path, help="the same as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes; returns the exit code."""
    options = parse_arguments(arguments)
    make_folders(options.csv, options.json)
    os.environ["JAX_PLATFORMS"] = "cpu"  # no GPU is looked for
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    rows: list[dict[str, Any]] = []
    for arch, mode in itertools.product(options.arch, options.mode):
        sizes = (options.image_size, options.batch_size, options.num_classes)
        try:
            program = compiled(arch, mode, *sizes)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{arch}, {mode}, {options.image_size} px, batch {options.batch_size}, bfloat16")
        print(report(program, options.show), flush=True)
        case = {"arch": arch, "mode": mode, "batch_size": options.batch_size}
        rows += [case | kernel._asdict() for kernel in kernels(program.as_text())]
        write_csv(options.csv, rows)
        write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
