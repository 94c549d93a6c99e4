"""Pooling with torch's geometry: explicit padding, ceil_mode, adaptive averages of any size."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxcnn.blocks import at_least_float32


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
    """torch.nn.MaxPool2d on [N, H, W, C]; what is padded is -inf and never wins."""
    pads = [_pad_for(size, window, stride, padding, ceil_mode) for size in x.shape[1:3]]
    return nn.max_pool(x, (window, window), (stride, stride), pads)


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
    height, width = x.shape[1:3]
    if height == width == size:
        return x
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
