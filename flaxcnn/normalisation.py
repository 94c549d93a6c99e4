"""What batch norm does in training, and the ReLU behind it where there is one.

On a CPU, in float32, oneDNN does it (`onednn_norm`), as XLA goes over the arrays more often than
that needs. On other platforms, and with `FLAXCNN_PLAIN_CONVOLUTION=1`, it is `moments`, of which
JAX takes the derivatives.
"""

from functools import partial

import jax
import jax.numpy as jnp

from flaxcnn import norm_primitives, onednn
from flaxcnn.bilinear import explicitly_sharded
from flaxcnn.convolution import PLAIN
from flaxcnn.moments import Normalised, by_moments, moments


def normalised(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    near: jax.Array,
    *,
    epsilon: float,
    relu: bool,
) -> Normalised:
    """(x - mean) / sqrt(var + epsilon) * scale + bias of [..., C], and with `relu` the ReLU of it.

    `near` [C] is about what the mean is; only how exact the variance is depends on it.
    """
    if PLAIN or not _suits_onednn(x) or not onednn.available():
        return _plainly(x, scale, bias, near, epsilon, relu)
    return _by_platform(x, scale, bias, near, epsilon, relu)


# `jax.jit` so that outside of one it is compiled once.
@partial(jax.jit, static_argnums=(4, 5), inline=True)
def _by_platform(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float, relu: bool
) -> Normalised:
    return jax.lax.platform_dependent(
        x,
        scale,
        bias,
        near,
        cpu=partial(norm_primitives.normalised, epsilon=epsilon, relu=relu),
        default=partial(_plainly, epsilon=epsilon, relu=relu),
    )


def _suits_onednn(x: jax.Array) -> bool:
    """Whether it can do it, and is faster.

    Both ways with ReLU, ms, XLA / oneDNN, on 2 cores of a Xeon (model 207): 8x112x112x64 8.0 / 5.3,
    8x56x56x64 2.4 / 1.2, 8x56x56x256 8.0 / 7.3, 8x56x56x24 1.1 / 0.8, 8x14x14x256 1.0 / 0.35,
    8x14x14x1024 3.7 / 1.3, 8x7x7x1152 1.2 / 0.4, 128x32x32x16 3.7 / 1.6, 128x8x8x64 1.2 / 0.5;
    8x112x112x96 16.8 / 17.9.
    """
    if x.ndim != 4 or x.dtype != jnp.float32 or explicitly_sharded(x):
        return False
    known = isinstance(x.shape[0], int)  # a program for any batch has a symbol there
    return known and x.shape[-1] % 8 == 0  # for other numbers the library has no fast code


def _plainly(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    near: jax.Array,
    epsilon: float,
    relu: bool,
) -> Normalised:
    x = x - near
    y, mean, var = by_moments(x, moments(x), scale, bias, epsilon)
    return Normalised(jax.nn.relu(y) if relu else y, mean + near, var)
