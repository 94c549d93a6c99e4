"""Pooling with torch's geometry: explicit padding, ceil_mode, adaptive averages of any size.

On a CPU oneDNN computes max pools in training, in bfloat16 always, where it computes that type
(`onednn_pool`); on a GPU, and on a CPU otherwise, they are maxima of slices, with their places for
the gradient (`max_places`). On a TPU, and with `FLAXCNN_PLAIN_CONVOLUTION=1`, they are XLA's
windows. In a `jax.jit` that spreads a batch over several CPU devices the library's call gathers it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxcnn.blocks import at_least_float32
from flaxcnn.convolution import PLAIN
from flaxcnn.cpu import onednn, onednn_pool, pool_primitives
from flaxcnn.operators.max_places import Windows
from flaxcnn.operators.primitives import explicitly_sharded


def _pad_for(size: int, window: int, stride: int, padding: int, ceil_mode: bool) -> tuple[int, int]:
    """Padding before and after one axis.

    With `ceil_mode` a last window that runs off the right edge counts too, unless it would start in
    the padding (torch: "sliding windows that would start in the right padded region are ignored").
    """
    if not ceil_mode:
        return padding, padding
    out = -((size + 2 * padding - window) // -stride) + 1
    if (out - 1) * stride >= size + padding:
        out -= 1
    return padding, max(padding, (out - 1) * stride + window - size - padding)


def max_pool(
    x: jax.Array, window: int, stride: int, padding: int = 0, ceil_mode: bool = False
) -> jax.Array:
    """torch.nn.MaxPool2d on [N, H, W, C]; what is padded is -inf and never wins.

    Of equal values in a window the first gets the gradient, as in torch.
    """
    rows, columns = (_pad_for(size, window, stride, padding, ceil_mode) for size in x.shape[1:3])
    windows = Windows(window, stride, (rows, columns))
    # A program for images of any size has symbols there.
    known = all(isinstance(size, int) for size in x.shape[1:3])
    plain = PLAIN or not known or explicitly_sharded(x)
    return (_max_by_windows if plain else _max_by_platform)(x, windows)


@partial(jax.jit, static_argnums=1)  # so that outside a jit it is compiled once
def _max_by_platform(x: jax.Array, windows: Windows) -> jax.Array:
    """XLA's gradient of a max pool, a scatter, is slow on a CPU and on a GPU.

    Forward and gradient, ms, by windows / places. On 2 cores of a Xeon (model 167), jaxlib 0.10.2,
    float32: 8x112x112x64 3x3 stride 2 62 / 6, 8x28x28x192 3x3 31 / 3, 8x224x224x64 2x2 167 / 16.
    On an H100, jaxlib 0.11.2, bfloat16: 128x112x112x64 3x3 stride 2 1.4 / 0.6, 2x2 0.9 / 0.4, 3x3
    7.1 / 1.1. By places / by oneDNN, on 2 cores of an EPYC (family 25, model 17), float32:
    8x112x112x64 3x3 stride 2 13 / 4.6, 8x56x56x192 3x3 stride 2 11 / 5.4, 8x14x14x512 3x3
    2.9 / 1.3; in bfloat16 35 / 3.5, 21 / 2.4, 4.5 / 0.8.
    """
    (top, _), (left, _) = windows.pads
    library = onednn.computes(x.dtype) and onednn_pool.suits(x.shape, windows)
    # By places on a CPU XLA cuts padding off in passing, which saves 6 ms of 365 of a step of
    # resnet18, batch 8, on 2 cores; on a GPU in a pass of its own, 0.4 ms of 25 of resnet50, batch
    # 128, on an H100.
    by_places = partial(pool_primitives.max_pool, windows=windows)
    on_cpu = partial(by_places, how=None if library else (0, 0))
    on_gpu = partial(by_places, how=(top, left))
    plain = partial(_max_by_windows, windows=windows)
    return jax.lax.platform_dependent(x, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=plain)


def _max_by_windows(x: jax.Array, windows: Windows) -> jax.Array:
    square = (windows.size,) * 2, (windows.stride,) * 2
    return nn.max_pool(x, *square, windows.pads)


def _bin_averages(size: int, bins: int) -> np.ndarray:
    """[bins, size]: the matrix that averages each of torch's adaptive bins.

    Bin i spans floor(i * size / bins) to ceil((i + 1) * size / bins): bins overlap where `size` is
    no multiple of `bins`, and repeat where it is smaller.
    """
    matrix = np.zeros((bins, size))
    for i in range(bins):
        start, stop = i * size // bins, -((i + 1) * size // -bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """torch.nn.AdaptiveAvgPool2d(size): [N, H, W, C] -> [N, size, size, C], for any H and W."""
    if x.shape[1] == x.shape[2] == size:
        return x
    return adaptive_averages(x, size)


@partial(jax.jit, static_argnums=1)  # so that the trace of a network shows it as one layer
def adaptive_averages(x: jax.Array, size: int) -> jax.Array:
    """Each row and column of bins averaged by a constant matrix."""
    height, width = x.shape[1:3]
    wide = at_least_float32(x.dtype)
    rows = jnp.asarray(_bin_averages(height, size), wide)
    columns = jnp.asarray(_bin_averages(width, size), wide)
    y = jnp.einsum(
        "nhwc,ih,jw->nijc", x.astype(wide), rows, columns, precision=jax.lax.Precision.HIGHEST
    )
    return y.astype(x.dtype)


def global_avg_pool(x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, C], the mean over each map, summed in at least float32."""
    return jnp.mean(x, axis=(1, 2), dtype=at_least_float32(x.dtype)).astype(x.dtype)
