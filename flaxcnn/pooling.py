"""Pooling with torch's geometry: explicit padding, ceil_mode, adaptive averages of any size."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxcnn.bilinear import explicitly_sharded
from flaxcnn.blocks import at_least_float32
from flaxcnn.convolution import PLAIN

Pads = tuple[tuple[int, int], tuple[int, int]]  # before and after, of rows and of columns
Begin = tuple[int, int]  # a row and a column of the padded image


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
    # A program for images of any size has symbols there.
    known = all(isinstance(size, int) for size in x.shape[1:3])
    plain = PLAIN or not known or explicitly_sharded(x)
    pool = _max_by_windows if plain else _max_by_platform
    return pool(x, window, stride, (rows, columns))


@partial(jax.jit, static_argnums=(1, 2, 3))  # so that outside a jit it is compiled once
def _max_by_platform(x: jax.Array, window: int, stride: int, pads: Pads) -> jax.Array:
    """XLA's gradient of a max pool, a scatter, is slow on a CPU and on a GPU.

    Forward and gradient, ms, by windows / places. On 2 cores of a Xeon (model 167), jaxlib 0.10.2,
    float32: 8x112x112x64 3x3 stride 2 62 / 6, 8x28x28x192 3x3 31 / 3, 8x224x224x64 2x2 167 / 16.
    On an H100, jaxlib 0.11.2, bfloat16: 128x112x112x64 3x3 stride 2 1.4 / 0.6, 2x2 0.9 / 0.4, 3x3
    7.1 / 1.1.
    """
    (top, _), (left, _) = pads
    # On a CPU XLA cuts padding off in passing, which saves 6 ms of 365 of a step of resnet18, batch
    # 8, on 2 cores; on a GPU in a pass of its own, 0.4 ms of 25 of resnet50, batch 128, on an H100.
    on_cpu = partial(_max_by_places, window=window, stride=stride, pads=pads, begin=(0, 0))
    on_gpu = partial(_max_by_places, window=window, stride=stride, pads=pads, begin=(top, left))
    plain = partial(_max_by_windows, window=window, stride=stride, pads=pads)
    return jax.lax.platform_dependent(x, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=plain)


def _max_by_windows(x: jax.Array, window: int, stride: int, pads: Pads) -> jax.Array:
    return nn.max_pool(x, (window, window), (stride, stride), pads)


def _max_by_slices(x: jax.Array, window: int, stride: int, pads: Pads) -> jax.Array:
    """The maximum of all elements at the same place in their windows, place after place."""
    if x.dtype != at_least_float32(x.dtype):
        # XLA:CPU pads slices of a narrow type slowly: 8x112x112x64 in bfloat16 takes 35 ms more.
        return _max_and_place(x, window, stride, pads)[0]
    places = [(i, j) for i in range(window) for j in range(window)]
    return reduce(jnp.maximum, (_at_place(x, place, window, stride, pads) for place in places))


def _at_place(
    x: jax.Array, place: tuple[int, int], window: int, stride: int, pads: Pads
) -> jax.Array:
    """What each window has at that row and column of it; -inf where that is padding.

    Each such slice is padded by itself, in passing; to pad the whole image takes XLA:CPU longer
    than the maxima (8x112x112x64 3x3 stride 2: 4.3 ms together, so 0.8).
    """
    inside: list[slice] = [slice(None)] * 4
    around = [(0, 0, 0)] * 4
    for axis, offset, (before, after) in zip((1, 2), place, pads, strict=True):
        size = x.shape[axis]
        windows = (size + before + after - window) // stride + 1
        shift = offset - before  # window n sees element n * stride + shift
        first = max(0, -(shift // stride))
        stop = min(windows, (size - 1 - shift) // stride + 1)
        if stop <= first:  # all of it is padding
            inside[axis], around[axis] = slice(0, 0), (windows, 0, 0)
        else:
            begin, end = first * stride + shift, (stop - 1) * stride + shift + 1
            inside[axis], around[axis] = slice(begin, end, stride), (first, windows - stop, 0)
    seen = x[tuple(inside)]
    if not any(low or high for low, high, _ in around):
        return seen
    return jax.lax.pad(seen, jnp.array(-jnp.inf, x.dtype), around)


def _max_and_place(
    x: jax.Array, window: int, stride: int, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """The maximum of each window, and where in it the first one is: row * window + column."""
    # All at once: with slices that are padded by themselves XLA:CPU takes three times as long here.
    x = jax.lax.pad(
        x, jnp.array(-jnp.inf, x.dtype), [(0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)]
    )
    height, width = ((size - window) // stride * stride + 1 for size in x.shape[1:3])
    places = [(i, j) for i in range(window) for j in range(window)]
    found, *others = (x[:, i : i + height : stride, j : j + width : stride] for i, j in places)
    number_type = jnp.uint8 if window < 16 else jnp.uint16
    place = jnp.zeros(found.shape, number_type)
    for number, other in enumerate(others, 1):
        keep = (other <= found) | jnp.isnan(found)  # as a maximum does, a NaN wins
        found = jnp.where(keep, found, other)
        place = jnp.where(keep, place, number_type(number))
    return found, place


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _max_by_places(x: jax.Array, window: int, stride: int, pads: Pads, begin: Begin) -> jax.Array:
    """`_max_by_slices`, with a gradient that keeps the places instead of finding them again.

    Where it weaves the gradient (`_at_places`) it begins with that element of the padded image.
    """
    return _max_by_slices(x, window, stride, pads)


@_max_by_places.defjvp
def _max_by_places_jvp(
    window: int,
    stride: int,
    pads: Pads,
    begin: Begin,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """What changes is the element at each place: the transpose of `_at_places`.

    Its own transpose, the gradient, is `_at_places` again.
    """
    (x,), (dx,) = primals, tangents
    y, place = _max_and_place(x, window, stride, pads)
    y, place = jax.lax.optimization_barrier((y, place))  # to be kept, not found again in each use
    if window == stride and pads[0][0] == pads[1][0] == 0:
        spread = partial(_at_places_apart, place, window=window, shape=x.shape)
    else:
        spread = partial(
            _at_places,
            place,
            window=window,
            stride=stride,
            pads=pads,
            begin=begin,
            shape=x.shape,
        )
    (dy,) = jax.linear_transpose(spread, y)(dx)
    return y, dy


def _at_places(
    place: jax.Array,
    y: jax.Array,
    window: int,
    stride: int,
    pads: Pads,
    begin: Begin,
    shape: tuple[int, ...],
) -> jax.Array:
    """An image [N, H, W, C] of zeros, with each window's `y` added at its place.

    Rows (and columns) `stride` apart are seen by the same rows of windows: they are gathered, and
    then woven together, from `begin` on; what lies before the image is cut off.
    """
    batch, height, width, channels = shape
    (top, _), (left, _) = pads
    first_row, first_column = begin
    above, before = top - first_row, left - first_column  # what is cut off
    rows, columns = -(-(height + above) // stride), -(-(width + before) // stride)
    reach = (window - 1) // stride  # of windows before that see the same row

    def edges(first: int, lines: int, windows: int) -> tuple[int, int, int]:
        """So that every gathering finds `reach` + `lines` windows."""
        return reach, (first + stride - 1) // stride + lines - windows, 0

    around = [
        (0, 0, 0),
        edges(first_row, rows, y.shape[1]),
        edges(first_column, columns, y.shape[2]),
        (0, 0, 0),
    ]
    # No place has this number. The barrier: XLA would test at each element whether it is padding.
    place = jax.lax.pad(place, jnp.array(jnp.iinfo(place.dtype).max, place.dtype), around)
    y = jax.lax.optimization_barrier(jax.lax.pad(y, jnp.zeros((), y.dtype), around))

    def gathered(row: int, column: int) -> jax.Array:
        """The rows `row`, `row` + stride and so on of the padded image, and such columns."""
        total = jnp.zeros((batch, rows, columns, channels), y.dtype)
        window_row, in_window = divmod(row, stride)
        window_column, beside = divmod(column, stride)
        for i in range(in_window, window, stride):
            for j in range(beside, window, stride):
                begin_row = window_row + reach - i // stride
                begin_column = window_column + reach - j // stride
                seen = (
                    slice(None),
                    slice(begin_row, begin_row + rows),
                    slice(begin_column, begin_column + columns),
                )
                total += jnp.where(place[seen] == i * window + j, y[seen], 0)
        return total

    woven = jnp.stack(
        [
            jnp.stack([gathered(first_row + i, first_column + j) for j in range(stride)], 3)
            for i in range(stride)
        ],
        2,
    )
    image = woven.reshape(batch, rows * stride, columns * stride, channels)
    return image[:, above : above + height, before : before + width]


def _at_places_apart(
    place: jax.Array, y: jax.Array, window: int, shape: tuple[int, ...]
) -> jax.Array:
    """`_at_places` where windows lie side by side, each element in one of them or in none."""
    batch, height, width, channels = shape
    rows, columns = -(-height // window), -(-width // window)
    around = [(0, 0, 0), (0, rows - y.shape[1], 0), (0, columns - y.shape[2], 0), (0, 0, 0)]
    place = jax.lax.pad(place, jnp.array(jnp.iinfo(place.dtype).max, place.dtype), around)
    y = jax.lax.pad(y, jnp.zeros((), y.dtype), around)
    places = jnp.arange(window * window, dtype=place.dtype).reshape(window, 1, window, 1)
    in_windows = (slice(None), slice(None), None, slice(None), None)
    image = jnp.where(place[in_windows] == places, y[in_windows], 0)
    image = image.reshape(batch, rows * window, columns * window, channels)
    return image[:, :height, :width]


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
