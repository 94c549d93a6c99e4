"""The largest batch that fits a device, by XLA's plan: no step is run that could fail or swap."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A process of its own, as what it compiles stays in memory.
_PROGRAM = "from benchmarks import largest_batch; print(largest_batch.find_here(**{arguments!r}))"
_SHARE = 0.9  # of the memory: the rest is for what XLA does not plan
_FIRST = 8  # images
_PRECISION = 0.02  # of the batch


def find(**arguments: Any) -> int:
    """`find_here` in a process of its own.

    Raises:
        RuntimeError: where not even one image fits, or the search failed; with what it printed.
    """
    command = [sys.executable, "-c", _PROGRAM.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no largest batch of {arguments}:\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def find_here(workload: str, devices: int = 1, **arguments: Any) -> int:
    """The most images, to 2 %, whose plan takes nine tenths of a device's memory at most.

    Args:
        workload: "training" or "prediction", of `workloads`.
        devices: that share the memory, if they are those of a CPU.
        arguments: arch, image_size, num_classes and precision.

    Raises:
        RuntimeError: where not even one image fits.
    """
    from benchmarks import workloads

    allowed = int(_SHARE * device_bytes(devices))

    def fits(batch_size: int) -> bool:
        program = getattr(workloads, f"{workload}_program")(batch_size=batch_size, **arguments)
        return workloads.planned_bytes(program) <= allowed

    batch_size = most(fits)
    if not batch_size:
        raise RuntimeError(f"one image takes more than the {allowed / 1e6:.0f} MB there are")
    return batch_size


def most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, to 2 %; 0 if 1 does not. What is larger than one that does not
    fit is taken not to."""
    low, high = 0, _FIRST
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, _PRECISION * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def device_bytes(devices: int) -> int:
    """Memory of the first device: of an accelerator's allocator, of a CPU what is available."""
    import jax

    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    information = Path("/proc/meminfo")
    if information.exists():
        lines = dict(line.split(":") for line in information.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    return available // devices
