"""Max pools and the place of each maximum in its window, in JAX's own functions.

A gradient that goes by the places need not find the maxima again, nor scatter.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Pads = tuple[tuple[int, int], tuple[int, int]]  # before and after, of rows and of columns
Begin = tuple[int, int]  # a row and a column of the padded image


class Windows(NamedTuple):
    """The windows of a pool: squares, `stride` apart."""

    size: int
    stride: int
    pads: Pads

    def along(self, rows: int, columns: int) -> tuple[int, int]:
        """How many there are in such an image, one below the other and side by side."""
        down, across = (
            (length + before + after - self.size) // self.stride + 1
            for length, (before, after) in zip((rows, columns), self.pads, strict=True)
        )
        return down, across

    @property
    def places(self) -> list[tuple[int, int]]:
        """Rows and columns in a window, in the order in which its places are numbered."""
        return [(i, j) for i in range(self.size) for j in range(self.size)]

    @property
    def place_type(self) -> DTypeLike:
        """Of the number of a place: row * size + column."""
        return np.uint8 if self.size < 16 else np.uint16


def maxima(x: jax.Array, windows: Windows) -> jax.Array:
    """[N, H, W, C] -> [N, H', W', C]: of all elements at the same place, place after place."""
    if x.dtype.itemsize < 4:
        # XLA:CPU pads slices of a narrow type slowly: 8x112x112x64 in bfloat16 takes 35 ms more.
        return maxima_and_places(x, windows)[0]
    return reduce(jnp.maximum, (_at_place(x, place, windows) for place in windows.places))


def _at_place(x: jax.Array, place: tuple[int, int], windows: Windows) -> jax.Array:
    """What each window has at that row and column of it; -inf where that is padding.

    Each such slice is padded by itself, in passing; to pad the whole image takes XLA:CPU longer
    than the maxima (8x112x112x64 3x3 stride 2: 4.3 ms together, so 0.8).
    """
    stride = windows.stride
    inside: list[slice] = [slice(None)] * 4
    around = [(0, 0, 0)] * 4
    counts = windows.along(*x.shape[1:3])
    for axis, offset, (before, _), count in zip((1, 2), place, windows.pads, counts, strict=True):
        shift = offset - before  # window n sees element n * stride + shift
        first = max(0, -(shift // stride))
        stop = min(count, (x.shape[axis] - 1 - shift) // stride + 1)
        if stop <= first:  # all of it is padding
            inside[axis], around[axis] = slice(0, 0), (count, 0, 0)
        else:
            begin, end = first * stride + shift, (stop - 1) * stride + shift + 1
            inside[axis], around[axis] = slice(begin, end, stride), (first, count - stop, 0)
    seen = x[tuple(inside)]
    if not any(low or high for low, high, _ in around):
        return seen
    return jax.lax.pad(seen, jnp.array(-jnp.inf, x.dtype), around)


def maxima_and_places(x: jax.Array, windows: Windows) -> tuple[jax.Array, jax.Array]:
    """The maximum of each window, and where in it the first one is, as `Windows.places` has it."""
    # All at once: with slices that are padded by themselves XLA:CPU takes three times as long here.
    around = [(0, 0, 0), *((*pad, 0) for pad in windows.pads), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), around)
    stride = windows.stride
    height, width = ((size - windows.size) // stride * stride + 1 for size in x.shape[1:3])
    found, *others = (
        x[:, i : i + height : stride, j : j + width : stride] for i, j in windows.places
    )
    place = jnp.zeros(found.shape, windows.place_type)
    for number, other in enumerate(others, 1):
        keep = (other <= found) | jnp.isnan(found)  # as a maximum does, a NaN wins
        found = jnp.where(keep, found, other)
        place = jnp.where(keep, place, jnp.asarray(number, place.dtype))
    return found, place


# ------------------------------------------------------------------------- back to where they were
def at_places(
    place: jax.Array,
    y: jax.Array,
    windows: Windows,
    image: tuple[int, int],
    begin: Begin = (0, 0),
) -> jax.Array:
    """Images of so many rows and columns, of zeros, with each window's `y` added at its place.

    Where windows overlap they are woven, from element `begin` of the padded image on.
    """
    shape = (y.shape[0], *image, y.shape[3])
    if windows.size == windows.stride and windows.pads[0][0] == windows.pads[1][0] == 0:
        return _at_places_apart(place, y, windows.size, shape)
    return _at_places_woven(place, y, windows, begin, shape)


def of_places(place: jax.Array, x: jax.Array, windows: Windows, begin: Begin = (0, 0)) -> jax.Array:
    """What [N, H, W, C] has at each window's place: the transpose of `at_places`."""
    _, height, width, _ = x.shape
    spread = partial(at_places, place, windows=windows, image=(height, width), begin=begin)
    y = jax.typeof(x).update(shape=place.shape, weak_type=False)
    (seen,) = jax.linear_transpose(spread, y)(x)
    return seen


def _at_places_woven(
    place: jax.Array, y: jax.Array, windows: Windows, begin: Begin, shape: tuple[int, ...]
) -> jax.Array:
    """Rows (and columns) `stride` apart are seen by the same rows of windows: they are gathered,
    and then woven together, from `begin` on; what lies before the image is cut off.
    """
    batch, height, width, channels = shape
    window, stride, ((top, _), (left, _)) = windows
    first_row, first_column = begin
    above, before = top - first_row, left - first_column  # what is cut off
    rows, columns = -(-(height + above) // stride), -(-(width + before) // stride)
    reach = (window - 1) // stride  # of windows before that see the same row

    def edges(first: int, lines: int, count: int) -> tuple[int, int, int]:
        """So that every gathering finds `reach` + `lines` windows."""
        return reach, (first + stride - 1) // stride + lines - count, 0

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
    """Where windows lie side by side, each element in one of them or in none."""
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
