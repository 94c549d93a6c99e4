"""Runs of `python -m train.main` as a user starts them, in processes of their own."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
# What a log line says of time differs from run to run.
TIMINGS = ("images_per_second", "data_wait")


def start(*flags: str, devices: int = 1, cached: bool = True) -> subprocess.Popen[str]:
    """The command with these flags, on so many host devices.

    `cached`: what other runs of the tests have compiled is not compiled again.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_ENABLE_COMPILATION_CACHE": str(cached).lower(),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "train.main", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*flags: str, devices: int = 1, code: int = 0, cached: bool = True) -> str:
    """Waits for the command, checks its exit code, returns what it printed."""
    process = start(*flags, devices=devices, cached=cached)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err[-4000:]}"
    return out if code == 0 else out + err


def kill_after(process: subprocess.Popen[str], workdir: pathlib.Path, step: int) -> None:
    """SIGKILL as soon as the run has logged that step."""
    deadline = time.monotonic() + 300
    while not any(record["step"] >= step for record in records(workdir)):
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"


def records(workdir: pathlib.Path, split: str | None = None) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without what they say of time."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [
        {name: value for name, value in record.items() if name not in TIMINGS}
        for record in found
        if split in (None, record["split"])
    ]


def final_state(workdir: pathlib.Path) -> Any:
    """The arrays of the newest checkpoint, as numpy."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    checkpoints = workdir / "checkpoints"
    newest = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(checkpoints / str(newest) / "state").item_metadata.tree
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
        )
        restored = checkpointer.restore(checkpoints / str(newest) / "state", target)
    return jax.tree.map(np.asarray, restored)


def cluster(size: int) -> list[Sequence[str]]:
    """The flags of each of `size` processes that are to find each other on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        (f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={size}", f"--process_id={i}")
        for i in range(size)
    ]
