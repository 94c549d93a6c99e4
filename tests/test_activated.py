"""An activation behind a batch norm, whose gradient on a CPU computes the norm's output again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flaxcnn import blocks, normalisation

ACTIVATIONS = [nn.silu, nn.relu6]
EPSILON = 1e-3
SHAPE = (3, 5, 7, 16)

Function = Callable[..., jax.Array]  # of x, scale, bias, mean and var


def operands() -> list[np.ndarray]:
    """x, scale, bias, mean and var."""
    rng = np.random.default_rng(0)
    channels = SHAPE[-1]
    mean = rng.normal(0.7, 1.0, channels)
    x = rng.normal(mean, rng.uniform(0.5, 3.0, channels), SHAPE)
    scale, bias = rng.uniform(-1, 2, channels), rng.normal(0, 1, channels)
    return [x, scale, bias, mean, rng.uniform(0.3, 4.0, channels)]


def formula(activation: Any, *of: jax.Array) -> jax.Array:
    x, scale, bias, mean, var = of
    result: jax.Array = activation((x - mean) / jnp.sqrt(var + EPSILON) * scale + bias)
    return result


def by_two_steps(activation: Any, *of: jax.Array) -> jax.Array:
    """y as a norm computes it, and then its activation."""
    x, scale, bias, mean, var = of
    y = (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias
    return normalisation.activated(activation, y, *of, epsilon=EPSILON)


def assert_equal_to_float64(activation: Any, quantity: Callable[[Function, Any], Any]) -> None:
    found = quantity(partial(by_two_steps, activation), [jnp.float32(a) for a in operands()])
    with jax.enable_x64(True):
        wanted = quantity(partial(formula, activation), [jnp.asarray(a) for a in operands()])
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(found))
    assert_close(found, wanted)


def assert_close(found: Any, wanted: Any) -> None:
    """But for what rounding to 6e-8, some ten times each, makes of sums of 105 numbers."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())


def loss(f: Function, of: Any) -> jax.Array:
    y = f(*of)
    return jnp.sum(y * jnp.cos(y))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
def test_values_and_all_derivatives(activation: Any) -> None:
    """Of mean and variance too, which in training depend on x."""

    def gradients(f: Function, of: Any) -> Any:
        return f(*of), jax.jit(jax.grad(partial(loss, f)))(of)

    def forward(f: Function, of: Any) -> Any:
        return jax.jvp(f, of, [jnp.cos(a) for a in of])

    def of_gradients(f: Function, of: Any) -> Any:
        def total(of: Any) -> jax.Array:
            found = jax.grad(partial(loss, f))(of)
            pairs = zip(found, of, strict=True)
            return sum((jnp.vdot(a, jnp.sin(b)) for a, b in pairs), jnp.zeros((), of[0].dtype))

        return jax.grad(total)(of)

    def of_each_image(f: Function, of: Any) -> Any:
        return jax.vmap(jax.grad(partial(loss, f)), ([0, None, None, None, None],))(of)

    def of_scale_alone(f: Function, of: Any) -> Any:
        return jax.grad(lambda scale: loss(f, [of[0], scale, *of[2:]]))(of[1])

    for quantity in (gradients, forward, of_gradients, of_each_image, of_scale_alone):
        assert_equal_to_float64(activation, quantity)


def gradient_of_a_norm(activation: Any, method: Any, dtype: Any = jnp.float32) -> Any:
    """Of x and the parameters, as a function of x."""
    norm = blocks.BatchNorm(use_running_average=False, dtype=dtype)
    x, scale, bias, mean, var = (jnp.float32(a) for a in operands())
    stats = {"mean": mean, "var": var}

    def total(params: Any, x: jax.Array) -> jax.Array:
        variables = {"params": params, "batch_stats": stats}
        y = norm.apply(variables, x, activation, mutable=["batch_stats"], method=method)[0]
        return jnp.sum(jnp.square(y @ jnp.eye(y.shape[-1], 7, dtype=y.dtype)))

    return jax.jit(jax.grad(total, (0, 1))), ({"scale": scale, "bias": bias}, x.astype(dtype))


def as_in_evaluation(norm: Any, x: jax.Array, activation: Any) -> tuple[jax.Array, Any]:
    return norm.as_in_evaluation(x, activation)


@pytest.mark.parametrize("method", [blocks.norm_act, as_in_evaluation])
def test_a_sigmoid_is_not_kept(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient takes the exponential again; with JAX as everybody has it, once for both."""
    gradient, of = gradient_of_a_norm(nn.silu, method)
    wanted = {True: 1, False: 2}
    for plain, count in wanted.items():
        monkeypatch.setattr(normalisation, "PLAIN", plain)
        jax.clear_caches()
        compiled = gradient.lower(*of).compile().as_text()
        assert compiled.count(" exponential(") == count
    for platform, again in (("tpu", False), ("cpu", True)):
        text = gradient.trace(*of).lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in text) is again


def test_wider_parameters_than_the_type_of_the_layer() -> None:
    with jax.enable_x64(True):
        norm = blocks.BatchNorm(use_running_average=False)
        x, scale, bias, mean, var = operands()
        params = {"scale": scale, "bias": bias}
        stats = {"mean": mean, "var": var}

        def total(method: Any, params: Any) -> jax.Array:
            variables = {"params": params, "batch_stats": stats}
            y, _ = norm.apply(variables, np.float32(x), mutable=["batch_stats"], method=method)
            return jnp.sum(jnp.square(y))

        together, apart = (
            jax.grad(partial(total, method))(params)
            for method in (
                lambda norm, x: blocks.norm_act(norm, x, nn.silu),
                lambda norm, x: nn.silu(norm(x)),
            )
        )
    assert_close(together, apart)


def test_in_bfloat16_the_activation_is_of_what_was_rounded() -> None:
    together, of = gradient_of_a_norm(nn.silu, blocks.norm_act, jnp.bfloat16)
    apart, _ = gradient_of_a_norm(nn.silu, lambda norm, x, f: f(norm(x)), jnp.bfloat16)
    found, wanted = (str(f.lower(*of).as_text()) for f in (together, apart))
    assert found == wanted
