"""A strided convolution of an image's few channels as one without strides, over blocks of pixels.

A TPU multiplies matrices of 128 columns, of which the three channels of an image fill three. At
stride s the same sums are those of a convolution over blocks of s x s pixels, whose channels are
all the block's: 7x7 over 3 channels at stride 2 becomes 4x4 over 12 (one row and column of zeros
more). Google's ResNet-50 for TPUs in MLPerf has its first layer so.

`FLAXCNN_SPACE_TO_DEPTH=1` in the environment, read at import, has TPUs compute so what `suits`.
Without it they compute as written: whether it pays has not been measured here.
"""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

WANTED = os.environ.get("FLAXCNN_SPACE_TO_DEPTH", "") not in ("", "0")

_COLUMNS = 128  # of a TPU's matrix unit


def suits(channels: int, strides: Sequence[int]) -> bool:
    """Whether it is a network's first layer, at a stride, and the blocks are not too deep."""
    return channels <= 4 and min(strides) > 1 and strides[0] * strides[1] * channels <= _COLUMNS


def convolution(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """[N, H, W, C] and [h, w, C, O] -> [N, H', W', O], as `lax.conv_general_dilated` in NHWC."""
    pads, extra = [], []
    for i, (stride, (low, high)) in enumerate(zip(strides, padding, strict=True)):
        size, width = images.shape[1 + i], kernel.shape[i]
        outputs = (size + low + high - width) // stride + 1
        missing = -width % stride  # of the kernel to whole blocks
        length = (outputs - 1) * stride + width + missing
        pads.append((low, length - size - low, 0))  # less than nothing: what no window sees
        extra.append((0, missing))
    images = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    kernel = jnp.pad(kernel, [*extra, (0, 0), (0, 0)])
    return lax.conv_general_dilated(
        _blocks(images, 1, strides),
        _blocks(kernel, 0, strides),
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _blocks(array: jax.Array, axis: int, strides: Sequence[int]) -> jax.Array:
    """[..., H, W, C, ...] -> [..., H / s, W / s, s * s * C, ...], H being that axis."""
    (rows, columns), (high, wide) = array.shape[axis : axis + 2], strides
    before, after = array.shape[:axis], array.shape[axis + 3 :]
    split = (rows // high, high, columns // wide, wide, array.shape[axis + 2])
    places = [0, 2, 1, 3, 4]
    order = [*range(axis), *(axis + p for p in places), *range(axis + 5, axis + 5 + len(after))]
    merged = (rows // high, columns // wide, high * wide * array.shape[axis + 2])
    return array.reshape(*before, *split, *after).transpose(order).reshape(*before, *merged, *after)
