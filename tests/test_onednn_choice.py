"""What computes on a processor without AVX-512, and that it computes it."""

import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import pytest

from flaxcnn.cpu import compiled, onednn

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip(f"{onednn.PACKAGE} is for x86-64 Linux", allow_module_level=True)

SCRIPT = pathlib.Path(__file__).with_name("at_most_avx2.py")
ALL = ("FORWARD", "FIRST_GRADIENT", "SECOND_GRADIENT")
# How the names begin of what computes the value and both gradients.
CHOSEN = {
    "1x1": ("jit_1x1:avx2",) * 3,
    "1x1, many channels": ("jit_1x1:avx2", "jit_1x1:avx2", "x64:gemm"),
    "1x1, stride 2": ("jit_1x1:avx2",) * 3,
    "1x1, stride 2, odd": ("brgconv_1x1:avx2", "", "jit:avx2"),
    "1x1, groups": ("brgconv_1x1:avx2", "brg", "jit:avx2"),
    "depthwise": ("jit_dw:avx2", "jit_dw:avx2", "jit"),
    "groups of 8": ("jit:avx2",) * 3,
    "groups of 4": ("jit:avx2",) * 3,
    "groups of 2": ("jit:avx2",) * 3,
    "3x3, few channels": ("brgconv:avx2", "brg", "jit:avx2"),
    "3x3, channels of 16": ("winograd",) * 3,
    "3x3, channels of 8": ("winograd", "brg", "winograd"),
    "3x3, channels of 16, layer": ("winograd",),
    "3x3, channels of 8, layer": ("winograd",),
    "3x3, many channels": ("brgconv:avx2", "", "x64:gemm"),
    "3x3, large map": ("jit:avx2", "", "x64:gemm"),
    "no memory": ("brgconv:avx2", "brg", "jit:avx2"),
}


@pytest.fixture(scope="module")
def results() -> Any:
    if "avx2" not in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        pytest.skip("the processor has no AVX2")
    printed = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(printed.stdout)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_chosen_one_computes_it(name: str, results: Any) -> None:
    # Where a compiler is, CI fails if nothing was compiled.
    if CHOSEN[name][0] == "winograd" and compiled.library() is None:
        pytest.skip("no C compiler when flaxcnn was installed")
    implementations = results["compared"][name]["implementations"]
    for kind, begins in zip(ALL, CHOSEN[name], strict=False):  # a layer has no gradients
        assert implementations[kind].startswith(begins), (kind, implementations[kind])


def test_values_and_gradients(results: Any) -> None:
    """float32 rounds at 6e-8, and sums are of up to 35,000 products."""
    compared = results["compared"]
    assert len(compared) == 33
    assert {name: of["apart"] for name, of in compared.items() if max(of["apart"]) > 5e-6} == {}


def test_programs_in_bfloat16_are_refused(results: Any) -> None:
    """Made where there are instructions for it: here the library has no norm, and slow products."""
    assert len(results["refused"]) == 2
    for said in results["refused"]:
        assert "no instructions for bfloat16; compile the program here" in said


def test_gradients_of_max_pools_are_xlas(results: Any) -> None:
    """The library finds the maxima alone."""
    assert results["pooled"]["calls"] == [True, False]
    assert results["pooled"]["apart"] < 1e-6
