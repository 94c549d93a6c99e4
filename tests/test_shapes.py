"""The helper that counts multiply-adds, against arithmetic by hand."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from shapes import macs_of, traced

from flaxcnn import blocks


class Small(nn.Module):
    """A strided convolution of two groups, a plain one with a bias, and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = blocks.conv(8, 3, strides=2, padding=1, groups=2, dtype=jnp.float32, name="grouped")(x)
        x = blocks.conv(4, 1, use_bias=True, dtype=jnp.float32, name="pointwise")(x)
        x = x.reshape(len(x), -1)
        init = nn.initializers.zeros
        return blocks.dense(5, kernel_init=init, dtype=jnp.float32, name="dense")(x)


def test_macs_are_those_of_arithmetic_by_hand() -> None:
    images = (1, 7, 5, 6)  # which stride 2 makes 4x3
    assert traced(Small(), images).modules == {
        "grouped": (4, 3, 8),
        "pointwise": (4, 3, 4),
        "dense": (5,),
        "": (5,),
    }
    assert macs_of(Small(), images) == {
        "grouped": 4 * 3 * 8 * (3 * 3 * 6 // 2),
        "pointwise": 4 * 3 * 4 * 8,
        "dense": 4 * 3 * 4 * 5,
    }
