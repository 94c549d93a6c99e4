"""Batch normalisation by hand: statistics, their types, and sharing across devices."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flaxcnn import blocks
from flaxcnn.blocks import BatchNorm, conv, dense, relu, uniform_fan_in

X = np.random.default_rng(0).normal(3.0, 2.0, size=(4, 5, 6, 7)).astype("float32")
FRESH = {"mean": np.zeros(7, "float32"), "var": np.ones(7, "float32")}
AFFINE = {
    "scale": np.linspace(0.5, 1.5, 7, dtype="float32"),
    "bias": np.linspace(-1, 1, 7, dtype="float32"),
}
VARIABLES = {"params": AFFINE, "batch_stats": FRESH}


def test_training_normalises_by_the_batch_and_keeps_the_unbiased_variance() -> None:
    norm = BatchNorm(use_running_average=False, momentum=0.9)
    y, updated = norm.apply(VARIABLES, X, mutable=["batch_stats"])
    mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
    expected = (X - mean) / np.sqrt(var + 1e-5) * AFFINE["scale"] + AFFINE["bias"]
    # Sums of squares 1.5 deviations off zero lose a bit or two of float32; test_torchvision.py has
    # the same in float64 to 1e-9.
    np.testing.assert_allclose(y, expected, atol=1e-5)
    unbiased = X.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * unbiased, rtol=3e-6)


def test_evaluation_normalises_by_the_running_statistics() -> None:
    norm = BatchNorm(use_running_average=True, epsilon=1e-3)
    stats = {"mean": np.full(7, 3, "float32"), "var": np.full(7, 4, "float32")}
    y = norm.apply({"params": AFFINE, "batch_stats": stats}, X)
    expected = (X - 3) / np.sqrt(4 + 1e-3) * AFFINE["scale"] + AFFINE["bias"]
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_statistics_hold_where_the_mean_is_far_from_zero() -> None:
    """One pass without a shift would lose all digits of a variance 1e-8 of the squared mean."""
    far = X + 10_000
    stats = {"mean": np.full(7, 10_000, "float32"), "var": np.ones(7, "float32")}
    norm = BatchNorm(use_running_average=False)
    _, updated = norm.apply({"params": AFFINE, "batch_stats": stats}, far, mutable=["batch_stats"])
    # Near 10,000 float32 itself steps by 0.001, of deviations of 2.
    unbiased = far.astype("float64").var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * unbiased, rtol=1e-3)


def test_bfloat16_is_normalised_in_float32() -> None:
    norm = BatchNorm(use_running_average=False, dtype=jnp.bfloat16)
    x = jnp.asarray(X, jnp.bfloat16)
    y, updated = norm.apply(VARIABLES, x, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert updated["batch_stats"]["mean"].dtype == jnp.float32
    exact = np.asarray(x, "float64").mean((0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * exact, rtol=1e-5)


def test_initialisation_leaves_the_statistics_alone() -> None:
    variables = BatchNorm(use_running_average=False).init(jax.random.key(0), X)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
def test_shared_statistics_are_those_of_all_the_images(groups: list[list[int]] | None) -> None:
    """Four devices, together or two and two, are equal to one with all their images."""
    norm = BatchNorm(use_running_average=False, axis_name="batch", axis_index_groups=groups)
    alone = BatchNorm(use_running_average=False)

    def run(module: BatchNorm, x: jax.Array) -> jax.Array:
        y, updated = module.apply(VARIABLES, x, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    over_devices = jax.pmap(functools.partial(run, norm), "batch", devices=jax.devices()[:4])
    y, stats = jax.device_get(over_devices(X[:, None]))
    parts = [range(4)] if groups is None else groups
    for part in parts:
        expected, expected_stats = run(alone, X[list(part)])
        np.testing.assert_allclose(y[list(part), 0], expected, atol=1e-5)
        for device in part:
            for name in ("mean", "var"):
                np.testing.assert_allclose(stats[name][device], expected_stats[name], rtol=3e-6)


def test_one_value_per_channel_is_refused() -> None:
    norm = BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm.apply(VARIABLES, X[:1, :1, :1], mutable=["batch_stats"])


def test_uniform_fan_in_fills_its_interval() -> None:
    draws = uniform_fan_in(25)(jax.random.key(0), (10_000,))
    assert -0.2 <= float(draws.min()) < -0.199
    assert 0.199 < float(draws.max()) <= 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_layer_of_copies_equals_one_that_takes_them_all(dtype: str) -> None:
    """In value and in gradient, to the rounding of `dtype`."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5)), dtype)
    params = {"kernel": rng.normal(size=(20, 7)).astype("float32"), "bias": np.ones(7, "float32")}

    def loss(params: Any, x: jax.Array, copies: int) -> tuple[jax.Array, jax.Array]:
        layer = dense(7, kernel_init=jax.nn.initializers.zeros, copies=copies, dtype=dtype, name="")
        y = layer.apply({"params": params}, jnp.tile(x, (1, 4)))
        return jnp.sum(jnp.sin(y.astype("float32"))), y

    value_and_grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
    all_of_them, fewer = value_and_grad(params, x, copies=1), value_and_grad(params, x, copies=4)
    tolerance = {"float32": 3e-6, "bfloat16": 0.1}[dtype]  # bfloat16: sums near 10, steps of 1/16
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, "float64"), np.asarray(b, "float64"), atol=tolerance, rtol=tolerance
        ),
        fewer,
        all_of_them,
    )


def test_relus_derivatives_are_those_of_jax() -> None:
    """Of zeros of either sign, of what is not a number, forward, backward, and of a gradient."""
    x = jnp.asarray([-2.0, -0.0, 0.0, 1e-30, 3.0, jnp.nan, jnp.inf, -jnp.inf])
    dx = jnp.asarray([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])

    def derivatives(function: Any) -> Any:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(function(x)) * dx)

        return (
            jax.jvp(function, (x,), (dx,)),
            jax.grad(loss)(x),
            jax.vmap(jax.grad(loss))(jnp.stack([x, -x])),
            jax.jvp(jax.grad(loss), (x,), (dx,)),
            jax.grad(jax.checkpoint(loss))(x),
        )

    ours, jaxs = (jax.tree.leaves(derivatives(f)) for f in (relu, jax.nn.relu))
    for a, b in zip(ours, jaxs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_relus_derivative_is_told_by_its_output() -> None:
    """And behind a barrier: XLA makes max(x, 0) > 0 to x > 0, for which x stays in memory."""
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(relu(x)))))
    text = gradient.lower(jnp.zeros(3)).as_text()
    (kept,) = re.findall(r"(%\w+) = stablehlo.optimization_barrier", text)
    (compared,) = re.findall(r"stablehlo.compare\s+GT, (%\w+),", text)
    assert compared == kept


@pytest.mark.parametrize(("size", "strides", "padding"), [(3, 2, 1), (1, 1, 0), (5, 3, 0)])
def test_gradients_of_biases_are_summed_in_float32(size: int, strides: int, padding: int) -> None:
    """Of a narrow convolution too; its results are those of flax, to the last bit."""
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3), jnp.bfloat16)
    how: Any = {"strides": strides, "padding": padding, "use_bias": True, "name": "layer"}
    ours = conv(5, size, dtype=jnp.bfloat16, **how)
    params = ours.init(jax.random.key(1), x)
    params["params"]["bias"] = jax.random.normal(jax.random.key(2), (5,))
    program = jax.jit(lambda params: jax.vjp(lambda p: ours.apply(p, x), params))
    y, pullback = program(params)
    flaxs = ours.clone(promote_dtype=nn.dtypes.promote_dtype)
    np.testing.assert_array_equal(y, jax.jit(flaxs.apply)(params, x))
    assert y.dtype == jnp.bfloat16
    dy = jax.random.normal(jax.random.key(3), y.shape, y.dtype)
    gradient = pullback(dy)[0]["params"]["bias"]
    assert gradient.dtype == jnp.float32
    exact = np.asarray(dy, float).sum((0, 1, 2))
    # Float32 sums of at most 144 values; bfloat16 has eight bits.
    np.testing.assert_allclose(gradient, exact, rtol=1e-6, atol=1e-6)


def test_devices_add_sums_of_biases_gradients_not_maps() -> None:
    """In a `jax.shard_map` that keeps account of what varies."""
    layer = conv(8, 3, padding=1, use_bias=True, dtype=jnp.bfloat16, name="layer")
    x = jnp.ones((4, 16, 16, 3), jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def gradient(params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda params: jnp.sum(layer.apply(params, x).astype(float)))(params)

    over_devices = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    text = str(jax.make_jaxpr(over_devices)(params, x))
    assert "f32[8] = psum" in text
    assert not re.search(r"\[1,16,16,8\] = psum", text)


def test_plain_is_as_flax_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PLAIN", True)
    layer = conv(8, 3, use_bias=True, dtype=jnp.bfloat16, name="layer")
    assert layer.promote_dtype is nn.dtypes.promote_dtype
    assert str(jax.make_jaxpr(relu)(1.0)) == str(jax.make_jaxpr(jax.nn.relu)(1.0))
