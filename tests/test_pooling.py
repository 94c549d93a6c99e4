"""Pooling against loops that spell out torch's definitions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flaxcnn import pooling
from flaxcnn.cpu import pool_primitives
from flaxcnn.operators import max_places
from flaxcnn.operators.max_places import Pads, Windows

# The same maxima; their gradient is woven from another element of the padded image on.
BY_PLACES: dict[str, Any] = {
    "on a CPU": lambda x, windows: pool_primitives.max_pool(x, windows, (0, 0)),
    "on a GPU": lambda x, windows: pool_primitives.max_pool(
        x, windows, (windows.pads[0][0], windows.pads[1][0])
    ),
}


def random_maps(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def max_pool_by_loops(
    x: np.ndarray, window: int, stride: int, padding: int, ceil_mode: bool
) -> np.ndarray:
    """Every window that torch has, clipped to the image: padding never wins."""

    def starts(size: int) -> list[int]:
        found = list(range(-padding, size + padding - window + 1, stride))
        following = found[-1] + stride
        # One more where something is left over, unless it would begin in the padding.
        if ceil_mode and found[-1] + window < size + padding and following < size:
            found.append(following)
        return found

    rows, columns = starts(x.shape[1]), starts(x.shape[2])
    y = np.empty((x.shape[0], len(rows), len(columns), x.shape[3]), x.dtype)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            part = x[:, max(top, 0) : top + window, max(left, 0) : left + window]
            y[:, i, j] = part.max((1, 2))
    return y


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    ("window", "stride", "padding"), [(2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 1)]
)
@pytest.mark.parametrize("size", [(7, 8), (9, 12), (112, 5)])
def test_max_pool(
    size: tuple[int, int], window: int, stride: int, padding: int, ceil_mode: bool
) -> None:
    x = random_maps(2, *size, 3) - 5  # all below zero, so that zero padding would show
    ours = pooling.max_pool(x, window, stride, padding, ceil_mode)
    np.testing.assert_array_equal(ours, max_pool_by_loops(x, window, stride, padding, ceil_mode))


@pytest.mark.parametrize(
    "pads", [((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 2), (1, 0)), ((0, 1), (0, 2))]
)
@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 3), (3, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("where", ["on a CPU", "on a GPU"])
def test_our_max_pool_has_the_plain_ones_gradient(
    where: str, window: int, stride: int, pads: Pads
) -> None:
    """Bit for bit, ties included: small integers, of which many windows hold equal ones."""
    windows = Windows(window, stride, pads)
    x = jnp.asarray(np.random.default_rng(0).integers(-2, 3, (2, 9, 8, 3)), jnp.float32)

    def value_and_gradient(pool: Any) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(lambda x: pool(x, windows), x)
        return y, pullback(jnp.asarray(random_maps(*y.shape)))[0]

    ours = value_and_gradient(BY_PLACES[where])
    plain = value_and_gradient(pooling._max_by_windows)
    np.testing.assert_array_equal(ours[0], plain[0])
    np.testing.assert_array_equal(BY_PLACES[where](x, windows), plain[0])
    np.testing.assert_allclose(ours[1], plain[1], atol=1e-6)  # overlapping windows' sums


@pytest.mark.parametrize("where", ["on a CPU", "on a GPU"])
@pytest.mark.parametrize("pads", [((1, 2), (2, 0)), ((0, 1), (0, 0))])
@pytest.mark.parametrize(("window", "stride"), [(3, 2), (3, 1), (5, 3), (3, 3)])
def test_other_derivatives_of_max_pools(window: int, stride: int, pads: Pads, where: str) -> None:
    """Forward, of several images by vmap, and of a gradient, in float64."""
    windows = Windows(window, stride, pads)

    def derivatives(pool: Any) -> Any:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(pool(x, windows)) ** 2)

        x, dx = (jnp.asarray(random_maps(2, 9, 8, 3), float) for _ in range(2))
        return (
            jax.jvp(lambda x: pool(x, windows), (x,), (jnp.cos(dx),)),
            jax.vmap(jax.grad(loss))(jnp.stack([x, x[::-1]])),
            jax.jvp(jax.grad(loss), (x,), (jnp.cos(dx),)),
            jax.grad(jax.checkpoint(loss))(x),
        )

    with jax.enable_x64(True):
        ours, slices = map(derivatives, (BY_PLACES[where], max_places.maxima))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(slices), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [2, 3])
def test_max_pools_of_explicitly_sharded_images(window: int) -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    x = jnp.asarray(random_maps(4, 9, 8, 3))

    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.sin(pooling.max_pool(x, window, 2))))(x)

    with jax.set_mesh(mesh):
        ours = jax.jit(gradient)(jax.device_put(x, P("d")))
    np.testing.assert_allclose(ours, gradient(x), atol=1e-6)  # overlapping windows' sums


@pytest.mark.parametrize(("window", "stride", "padding"), [(3, 2, 1), (3, 1, 1), (2, 2, 0)])
def test_max_pool_in_bfloat16_is_exact(window: int, stride: int, padding: int) -> None:
    x = jnp.asarray(random_maps(2, 9, 8, 3), jnp.bfloat16)
    ours = pooling.max_pool(x, window, stride, padding)
    assert ours.dtype == jnp.bfloat16
    exact = max_pool_by_loops(np.asarray(x, np.float32), window, stride, padding, False)
    np.testing.assert_array_equal(ours.astype(jnp.float32), exact)


def test_max_pool_of_a_large_window() -> None:
    x = random_maps(1, 19, 20, 2)
    for stride in (1, 17):
        ours = pooling.max_pool(jnp.asarray(x), 17, stride)
        np.testing.assert_array_equal(ours, max_pool_by_loops(x, 17, stride, 0, False))


def test_max_pool_passes_nan_on() -> None:
    for window, stride in ((3, 1), (3, 2)):
        x = random_maps(1, 5, 5, 1)
        x[0, 2, 2] = np.nan
        windows = Windows(window, stride, ((0, 0), (0, 0)))
        ours = BY_PLACES["on a CPU"](jnp.asarray(x), windows)
        assert np.isnan(ours).all()
    for place in range(4):
        x = np.zeros((1, 2, 2, 1), "float32")
        x[0, place // 2, place % 2] = np.nan
        assert np.isnan(pooling.max_pool(x, 2, 2)).all()


def test_which_max_pool_is_whose() -> None:
    """XLA's windows and their scatter on a TPU alone."""

    def value_and_gradient(x: jax.Array) -> Any:
        y, pullback = jax.vjp(lambda x: pooling.max_pool(x, 3, 2, padding=1), x)
        return y, pullback(y)

    traced = jax.jit(value_and_gradient).trace(jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32))
    for platform in ("tpu", "cpu", "cuda", "rocm"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.select_and_scatter" in text) == (platform == "tpu")
        assert ("stablehlo.reduce_window" in text) == (platform == "tpu")


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (5, 9), (14, 21), (10, 7)])
def test_adaptive_avg_pool(size: tuple[int, int]) -> None:
    x = random_maps(2, *size, 3)
    ours = pooling.adaptive_avg_pool(x, 7)
    expected = np.empty((2, 7, 7, 3), "float32")
    for i in range(7):
        for j in range(7):
            rows = slice(i * size[0] // 7, int(np.ceil((i + 1) * size[0] / 7)))
            columns = slice(j * size[1] // 7, int(np.ceil((j + 1) * size[1] / 7)))
            expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_global_avg_pool_sums_bfloat16_in_float32() -> None:
    x = jnp.asarray(random_maps(1, 64, 64, 2) + 100, jnp.bfloat16)
    expected = np.asarray(x, "float64").mean((1, 2))
    # The result alone is rounded to bfloat16's eight bits, not its 4,096 summands' total.
    np.testing.assert_allclose(pooling.global_avg_pool(x).astype("float32"), expected, rtol=2**-8)
