"""The largest batch that fits a device, by XLA's plan: nothing is run that could fail or swap."""

import json
import os
import subprocess
import sys
from pathlib import Path

# A process of its own, as what it compiles stays in memory.
_PROGRAM = "from benchmarks import largest_batch; print(largest_batch.search(**{arguments!r}))"
_SHARE = 0.9  # of the memory: the rest is for what XLA does not plan
_FIRST = 8  # images; the plan grows in proportion from here on


def find(workload: str, arch: str, image_size: int, num_classes: int, precision: str) -> int:
    """The largest batch of one device whose plan takes nine tenths of its memory at most."""
    arguments = {
        "workload": workload,
        "arch": arch,
        "image_size": image_size,
        "num_classes": num_classes,
        "precision": precision,
    }
    command = [sys.executable, "-c", _PROGRAM.format(arguments=arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


def search(workload: str, **arguments: object) -> int:
    """In this process: doubled while it fits, then halfway, to an eighth of the batch."""
    raise NotImplementedError
