"""A GPU computes what the CPU does; where there is none, nothing is tested.

In a process of its own, as all other tests are for a CPU.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "accelerated.py"
# Training is compared in float64, logits in float32 too, whose sums come in another order, and in
# bfloat16, which has eight bits; errors add up over the layers.
ALLOWED = {
    **{f"pool {geometry}": 0.0 for geometry in ("3/2 of 32", "2/2 of 31", "3/1 of 14")},
    "losses": 1e-9,
    "momentum": 1e-6,
    "logits": 1e-5,
    "logits in bfloat16": 3e-2,
}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def accelerator() -> str:
    """The platform that JAX finds when it may choose."""
    program = "import jax; print(jax.default_backend())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"JAX_PLATFORMS": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_it_computes_what_the_cpu_does() -> None:
    platform = accelerator()
    if platform != "gpu":
        pytest.skip("there is no GPU")
    archs = ["resnet18", "vgg11", "googlenet", "alexnet"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *archs],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"JAX_PLATFORMS": "", "PYTHONPATH": str(ROOT)},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 3 + 4 * len(archs)
    for row in rows:
        assert row["apart"] <= ALLOWED[row["what"].split(maxsplit=1)[1]], row
