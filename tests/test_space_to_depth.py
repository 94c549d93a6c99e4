"""A first layer over blocks of pixels: the same sums, and only where a TPU was asked for them."""

import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flaxcnn import convolution
from flaxcnn.operators import space_to_depth

PLACES = ("NHWC", "HWIO", "NHWC")
# Images, kernel, strides, padding: first layers of ResNet, AlexNet, ZFNet, EfficientNet and others.
CASES: list[tuple[Any, ...]] = [
    ((2, 20, 23, 3), (7, 7, 3, 5), (2, 2), ((3, 3), (3, 3))),
    ((2, 35, 41, 3), (11, 11, 3, 4), (4, 4), ((2, 2), (2, 2))),
    ((2, 21, 18, 3), (7, 7, 3, 4), (2, 2), ((1, 1), (1, 1))),
    ((2, 17, 16, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1))),
    ((2, 17, 16, 1), (5, 4, 1, 4), (3, 2), ((0, 2), (1, 0))),
    ((2, 20, 19, 2), (2, 2, 2, 4), (4, 4), ((0, 0), (0, 0))),  # steps over some of the image
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: tuple[Any, ...]) -> None:
    image, kernel, strides, padding = case
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, k = jnp.asarray(rng.normal(size=image)), jnp.asarray(rng.normal(size=kernel))

        def both_ways(convolve: Any) -> Any:
            y, back = jax.vjp(convolve, x, k)
            # The cotangent differs at each output, so that misplaced gradients show.
            return y, *back(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

        plain = partial(
            lax.conv_general_dilated,
            window_strides=strides,
            padding=padding,
            dimension_numbers=PLACES,
        )
        wanted = both_ways(plain)
        found = both_ways(partial(space_to_depth.convolution, strides=strides, padding=padding))
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * np.abs(b).max())  # of sums of 400


def lowered(platform: str) -> str:
    first = partial(
        convolution.conv_general_dilated,
        window_strides=(2, 2),
        padding=((3, 3), (3, 3)),
        dimension_numbers=PLACES,
    )
    traced = jax.jit(first).trace(jnp.zeros((2, 32, 32, 3)), jnp.zeros((7, 7, 3, 8)))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_computes_so_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for wanted in (False, True):
            jax.clear_caches()
            monkeypatch.setattr(space_to_depth, "WANTED", wanted)
            assert ("4x4x12x8" in lowered("tpu")) == wanted
            assert "4x4x12x8" not in lowered("cuda")
            assert "4x4x12x8" not in lowered("cpu")
    finally:
        jax.clear_caches()  # for the tests that follow


def test_the_environment_asks() -> None:
    program = "from flaxcnn.operators import space_to_depth; print(space_to_depth.WANTED)"
    for value, wanted in (("1", "True"), ("0", "False"), ("", "False")):
        said = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "FLAXCNN_SPACE_TO_DEPTH": value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.strip() == wanted
