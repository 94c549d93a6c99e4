"""What batch norm does in training, and the activation behind it where there is one.

XLA:CPU goes over the arrays more often than that needs, so that oneDNN does it there
(`onednn_norm`): in float32 of maps with a multiple of eight channels, and of sixteen in bfloat16
where it computes that. Other platforms compute the same primitives (`norm_primitives`) by their
formulas. Of other maps, in statistics that devices share, and with `FLAXCNN_PLAIN_CONVOLUTION=1`,
it is `moments`, of which JAX takes the derivatives. In a `jax.jit` that spreads a batch over
several CPU devices the library's call gathers it.

The gradient of another activation than ReLU wants the norm's output. On a CPU XLA would keep that,
and what it made of it on the way, SiLU for one a sigmoid; `activated` computes both again.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from flaxcnn.convolution import PLAIN
from flaxcnn.cpu import norm_primitives, onednn
from flaxcnn.operators.moments import Normalised, by_statistics, normalised_plainly
from flaxcnn.operators.primitives import explicitly_sharded


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

    y is in the type of x, mean and variance are in at least float32. `near` [C] is about what the
    mean is; only how exact the variance is depends on it.
    """
    operands = (x, scale, bias, near)
    if PLAIN or not _suits_onednn(*operands):
        return normalised_plainly(*operands, epsilon, relu)
    return norm_primitives.normalised(*operands, float(epsilon), relu)


# Of each value on its own; no closure over arrays that are being differentiated.
Activation = Callable[[jax.Array], jax.Array]


def activated(
    activation: Activation,
    y: jax.Array,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    *,
    epsilon: float,
) -> jax.Array:
    """`activation(y)`, where y is (x - mean) / sqrt(var + epsilon) * scale + bias.

    On a CPU the gradient computes y again, of x, which the norm's keeps anyway. Both ways with
    SiLU, norm included, ms, before / so, on 2 cores of an AMD EPYC: 8x112x112x32 11.4 / 6.5,
    8x112x112x96 27.6 / 21.1, 8x56x56x144 11.6 / 8.2.
    """
    if PLAIN:
        return activation(y)
    return _computed_again(activation, epsilon, y, x, scale, bias, mean, var)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _computed_again(
    activation: Activation, epsilon: float, y: jax.Array, *made_of: jax.Array
) -> jax.Array:
    """Of y; on a CPU its derivative is a function of what y was made of, and the same."""
    del epsilon, made_of
    return activation(y)


@_computed_again.defjvp
def _computed_again_jvp(
    activation: Activation,
    epsilon: float,
    primals: tuple[jax.Array, ...],
    tangents: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    again = jax.lax.platform_dependent(
        *primals, cpu=partial(_again, epsilon=epsilon), default=lambda y, *_: y
    )
    return activation(primals[0]), jax.jvp(activation, (again,), (tangents[0],))[1]


def _again(y: jax.Array, *made_of: jax.Array, epsilon: float) -> jax.Array:
    x, scale, bias, mean, var = made_of
    # XLA would see that it is y once more, and keep that, or x - mean, of which the variance is.
    scale, bias, mean = jax.lax.optimization_barrier((scale, bias, mean))
    return by_statistics(x, scale, bias, mean, var, epsilon).astype(y.dtype)


def _suits_onednn(x: jax.Array, *channels: jax.Array) -> bool:
    """Whether it can do it, and is faster.

    Both ways with ReLU, ms, XLA / oneDNN, on 2 cores of a Xeon (model 167): 8x112x112x64 8.0 / 5.3,
    8x56x56x64 2.4 / 1.2, 8x56x56x256 8.0 / 7.3, 8x56x56x24 1.1 / 0.8, 8x14x14x256 1.0 / 0.35,
    8x14x14x1024 3.7 / 1.3, 8x7x7x1152 1.2 / 0.4, 128x32x32x16 3.7 / 1.6, 128x8x8x64 1.2 / 0.5;
    8x112x112x96 16.8 / 17.9. In bfloat16, on 2 cores of an EPYC (family 25, model 17): 8x112x112x64
    37 / 7, 8x56x56x256 39 / 11, 8x14x14x1024 4 / 1.2, 8x28x28x240 4 / 1.2, 8x14x14x80 0.8 / 0.3;
    8x56x56x24 2.2 / 12.
    """
    single = all(a.dtype == jnp.float32 for a in channels)
    if x.ndim != 4 or not single or explicitly_sharded(x, *channels):
        return False
    # A program for any size has a symbol there; of nothing the library makes no statistics; and it
    # has no fast code for other numbers of channels.
    known = all(isinstance(size, int) for size in x.shape)
    at_a_time = 8 if x.dtype == jnp.float32 else 16
    return known and x.size > 0 and x.shape[-1] % at_a_time == 0 and onednn.computes(x.dtype)
