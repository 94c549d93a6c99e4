"""Freed memory stays with a process that trains on the CPU."""

import os
import platform
import subprocess
import sys
from importlib import metadata

import pytest

from train import allocator

# Prints what the call said, and the pages (of 4 kB) that stay when 200 MB are freed again.
PROBE = """
import sys
from train.allocator import keep_freed_memory
resident = lambda: int(open("/proc/self/statm").read().split()[1])
said = keep_freed_memory() if sys.argv[1] == "keep" else None
before = resident()
block = bytearray(200_000_000)
del block
print(said, resident() - before)
"""

linux_with_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the allocator of glibc"
)


def probe(argument: str) -> list[str]:
    command = [sys.executable, "-c", PROBE, argument]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


@linux_with_glibc
def test_freed_memory_stays() -> None:
    said, pages = probe("keep")
    assert said == "True"
    assert int(pages) > 40_000
    _, pages_otherwise = probe("leave")
    assert int(pages_otherwise) < 1_000


def test_nothing_is_set_where_an_accelerator_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = metadata.EntryPoint("cuda", "jax_plugins.cuda", "jax_plugins")
    monkeypatch.setattr(allocator.metadata, "entry_points", lambda group: [plugin])
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("malloc was touched"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not allocator.keep_freed_memory()
