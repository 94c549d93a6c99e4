"""Batch norm in training, as a formula: normalising by the batch's own mean and variance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Normalised(NamedTuple):
    """An array, and the statistics by which it was normalised."""

    y: jax.Array  # [..., C]
    mean: jax.Array  # [C]
    var: jax.Array  # [C], biased


def moments(x: jax.Array) -> jax.Array:
    """[..., C] -> [2, C]: the means of x and of its square, in one pass over it."""
    axes = tuple(range(x.ndim - 1))
    return jnp.stack([jnp.mean(x, axes), jnp.mean(jnp.square(x), axes)])


def by_moments(
    x: jax.Array, moments: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> Normalised:
    """(x - mean) / sqrt(var + epsilon) * scale + bias.

    E[x^2] - E[x]^2 loses digits where the mean is far from zero: 100 deviations cost four. So `x`
    should come less what the mean is about.
    """
    mean, square = moments
    var = jnp.maximum(square - jnp.square(mean), 0)
    # Not (x - mean) * factor + bias, of which the gradient wants x - mean in memory.
    factor = jax.lax.rsqrt(var + epsilon) * scale
    return Normalised(x * factor + (bias - mean * factor), mean, var)


def by_statistics(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    epsilon: float,
) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, all but x [C]."""
    return (x - mean) * (jax.lax.rsqrt(var + epsilon) * scale) + bias


def statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance [C] of [..., C], in two passes, as exact as their sums whatever the mean.

    For a CPU: in a single pass, of x less what its mean is about, XLA writes that difference, to
    sum it up twice. Of 25 MB that took 3.0 ms where this takes 2.4, and a tenth of a norm with its
    ReLU both ways.
    """
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.mean(jnp.square(x - mean), axes)


def normalised_plainly(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float, relu: bool
) -> Normalised:
    """`by_moments` of x itself, and with `relu` the ReLU of it; `near` is about its mean.

    In at least float32, as mean and variance are; y is in the type of x.
    """
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, near.dtype), jnp.float32)
    near = near.astype(dtype)
    wide = x.astype(dtype) - near
    y, mean, var = by_moments(wide, moments(wide), scale.astype(dtype), bias.astype(dtype), epsilon)
    return Normalised((jax.nn.relu(y) if relu else y).astype(x.dtype), mean + near, var)
