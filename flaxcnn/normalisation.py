"""What batch norm does in training: arrays [..., C] normalised by their own statistics per channel.

On a CPU, in float32, oneDNN does it together with the ReLU behind it (`onednn_norm`), as XLA goes
over the array more often than that needs. On other platforms, and with
`FLAXCNN_PLAIN_CONVOLUTION=1`, it is written in JAX's own functions.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxcnn import onednn, onednn_norm
from flaxcnn.bilinear import explicitly_sharded
from flaxcnn.convolution import PLAIN


class Normalised(NamedTuple):
    """An array, and the statistics by which it was normalised."""

    y: jax.Array  # [..., C]
    mean: jax.Array  # [C]
    var: jax.Array  # [C], biased


# ------------------------------------------------------------------------------------- by moments
def moments(x: jax.Array) -> jax.Array:
    """[..., C] -> [2, C]: the means of x and of its square, in one pass over it."""
    axes = tuple(range(x.ndim - 1))
    return jnp.stack([jnp.mean(x, axes), jnp.mean(jnp.square(x), axes)])


def by_moments(
    x: jax.Array, moments: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> Normalised:
    """(x - mean) / sqrt(var + epsilon) * scale + bias.

    E[x^2] - E[x]^2 loses digits where the mean is far from zero: 100 deviations cost four.
    """
    mean, square = moments
    var = jnp.maximum(square - jnp.square(mean), 0)
    # Not (x - mean) * factor + bias, of which the gradient wants x - mean in memory.
    factor = jax.lax.rsqrt(var + epsilon) * scale
    return Normalised(x * factor + (bias - mean * factor), mean, var)


# ---------------------------------------------------------------------------------------- with relu
def normalised_relu(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float
) -> Normalised:
    """relu((x - mean) / sqrt(var + epsilon) * scale + bias), mean and var those of `x` itself.

    `near` [C] is about where the mean is expected, for `by_moments` of x - near.
    """
    if PLAIN or not _suits_onednn(x) or not onednn.available():
        return _relu_by_moments(x, scale, bias, near, epsilon)
    return Normalised(*_by_platform(x, scale, bias, near, epsilon))


@partial(jax.jit, static_argnums=4)
def _by_platform(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float
) -> Normalised:
    return jax.lax.platform_dependent(
        x,
        scale,
        bias,
        near,
        cpu=partial(_by_onednn, epsilon=epsilon),
        default=partial(_relu_by_moments, epsilon=epsilon),
    )


def _suits_onednn(x: jax.Array) -> bool:
    """Whether it is faster."""
    if x.ndim != 4 or x.dtype != jnp.float32 or explicitly_sharded(x):
        return False
    known = isinstance(x.shape[0], int)  # a program for any batch has a symbol there
    return known and x.shape[-1] % 16 == 0


def _by_onednn(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float
) -> Normalised:
    del near  # the library finds the mean first
    return Normalised(*onednn_norm.normalised_relu(x, scale, bias, epsilon))


def _relu_by_moments(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float
) -> Normalised:
    x = x - near
    y, mean, var = by_moments(x, moments(x), scale, bias, epsilon)
    return Normalised(jax.nn.relu(y), mean + near, var)
