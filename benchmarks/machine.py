"""The machine that a number was measured on."""

import os
import platform
from pathlib import Path


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """As the system names it, with the number of cores."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        pairs = [line.split(":", 1) for line in information.read_text().splitlines() if ":" in line]
        fields = {key.strip(): value.strip() for key, value in pairs}  # the last core's will do
        name = f"{fields.get('model name', name)} model {fields.get('model', '?')}"
    return f"{name}, {cores()} cores"
