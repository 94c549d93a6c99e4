"""The largest batch that fits a device, by XLA's plan: nothing is run that could fail or swap."""

import os
import subprocess
import sys
from typing import Any

# A process of its own, as what it compiles stays in memory.
_PROGRAM = "from benchmarks import largest_batch; print(largest_batch.search(**{arguments!r}))"
_SHARE = 0.9  # of the memory: the rest is for what XLA does not plan
_TRIED = (8, 16)  # images: the plan grows in proportion


def find(**arguments: Any) -> int:
    """`search` in a process of its own.

    Raises:
        RuntimeError: where not even one image fits, or the search failed; with what it printed.
    """
    command = [sys.executable, "-c", _PROGRAM.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no largest batch of {arguments}:\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def search(workload: str, **arguments: Any) -> int:
    """The most images whose plan takes nine tenths of one device's memory at most.

    Args:
        workload: "training" or "prediction", of `workloads`.
        arguments: arch, image_size, num_classes and precision.
    """
    from benchmarks import workloads

    def planned(batch_size: int) -> int:
        program = getattr(workloads, f"{workload}_program")(batch_size=batch_size, **arguments)
        return workloads.planned_bytes(program)

    allowed = int(_SHARE * device_bytes())
    few, more = (planned(batch_size) for batch_size in _TRIED)
    by_image = (more - few) / (_TRIED[1] - _TRIED[0])
    batch_size = int((allowed - few) / by_image) + _TRIED[0]
    while batch_size > 0 and planned(batch_size) > allowed:
        batch_size = int(0.98 * batch_size)
    if batch_size < 1:
        raise RuntimeError(f"one image takes more than the {allowed / 1e6:.0f} MB there are")
    return batch_size


def device_bytes() -> int:
    """Memory of the first device: of an accelerator's allocator, of a CPU what is available."""
    import jax

    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
