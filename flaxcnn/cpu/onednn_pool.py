"""Max pools as oneDNN computes them on a CPU: the maxima and their places, and back.

In float32 and bfloat16. The library numbers the places of a window as `max_places` does; what it
makes of NaN and of -inf is its own, so that images with any are left to NumPy.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcnn.cpu import onednn, xla_handlers
from flaxcnn.cpu.onednn import Argument, Made, Query, Type
from flaxcnn.cpu.onednn_convolution import image_layout
from flaxcnn.cpu.plans import Addresses, Check, Condition, Plan, in_order
from flaxcnn.cpu.xla_handlers import Array
from flaxcnn.operators.bilinear import Shape
from flaxcnn.operators.max_places import Windows

_MAXIMA, _AT_PLACES = "flaxcnn_onednn_max_pool", "flaxcnn_onednn_at_places"


# ---------------------------------------------------------------------------------------- for JAX
def suits(shape: Shape, windows: Windows) -> bool:
    """Whether the library has such a pool: places below 256, and no window of padding alone."""
    # A program for any batch has a symbol there.
    known = all(isinstance(size, int) for size in shape)
    if not known or math.prod(shape) == 0 or windows.place_type != np.uint8:
        return False
    padding = max(max(pads) for pads in windows.pads)
    return min(windows.along(*shape[1:3])) > 0 and padding < windows.size


def maxima_and_places(x: jax.Array, *, windows: Windows) -> list[jax.Array]:
    """As `max_places.maxima_and_places`."""
    shape = (x.shape[0], *windows.along(*x.shape[1:3]), x.shape[3])
    results = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (x.dtype, np.uint8)]
    return list(jax.ffi.ffi_call(_MAXIMA, results)(x, numbers=_numbers(windows)))


def at_places(
    place: jax.Array, y: jax.Array, *, windows: Windows, image: tuple[int, int]
) -> jax.Array:
    """As `max_places.at_places`; in bfloat16 sums are rounded with each addition."""
    result = jax.ShapeDtypeStruct((y.shape[0], *image, y.shape[3]), y.dtype)
    called: jax.Array = jax.ffi.ffi_call(_AT_PLACES, result)(place, y, numbers=_numbers(windows))
    return called


def _numbers(windows: Windows) -> np.ndarray:
    (top, bottom), (left, right) = windows.pads
    return np.array((windows.size, windows.stride, top, bottom, left, right), np.int64)


def _windows(numbers: Sequence[int]) -> Windows:
    size, stride, top, bottom, left, right = numbers
    return Windows(size, stride, ((top, bottom), (left, right)))


def _prepare_maxima(
    arguments: Sequence[Array], results: Sequence[Array], numbers: Sequence[int]
) -> Plan:
    (x,), (y, place) = arguments, results
    pool = _pool_of(x, y, place, numbers)

    def by_numpy(addresses: Addresses) -> None:
        image_at, y_at, place_at = addresses
        _by_numpy(x.at(image_at), y.at(y_at), place.at(place_at), pool.windows)

    condition = Condition.USUAL_FLOAT32 if x.dtype == np.float32 else Condition.USUAL_BFLOAT16
    usual = Check(condition, 0, 0, math.prod(x.shape), lambda addresses: _usual(x.at(addresses[0])))
    return Plan([pool.maxima], before=[usual], otherwise=by_numpy)


def _prepare_at_places(
    arguments: Sequence[Array], results: Sequence[Array], numbers: Sequence[int]
) -> Plan:
    (place, y), (image,) = arguments, results
    return Plan([_pool_of(image, y, place, numbers).at_places])


def _pool_of(image: Array, y: Array, place: Array, numbers: Sequence[int]) -> "_Pool":
    y.check(y.shape, image.dtype)
    place.check(y.shape, np.uint8)
    return _pool(image.shape, y.shape, image.dtype, _windows(numbers))


xla_handlers.register(_MAXIMA, _prepare_maxima)
xla_handlers.register(_AT_PLACES, _prepare_at_places)


def _usual(x: np.ndarray) -> bool:
    """No NaN, and all above the least number, with which the library begins: padding, to it."""
    if x.dtype == np.float32:
        with np.errstate(invalid="ignore"):
            return bool(x.min() > np.finfo(np.float32).min)
    # NumPy has no fast minimum of bfloat16. As integers negative numbers come last, in the order of
    # their size, and NaN behind infinity in both halves.
    least, infinity = np.array([jnp.finfo(x.dtype).min, np.inf], x.dtype).view(np.uint16)
    bits = x.view(np.uint16)
    return bool(bits.max() < least and bits.view(np.int16).max() <= infinity)


def _by_numpy(x: np.ndarray, found: np.ndarray, at: np.ndarray, windows: Windows) -> None:
    """As `max_places.maxima_and_places`."""
    around = ((0, 0), *windows.pads, (0, 0))
    padded = np.pad(x, around, constant_values=-np.inf)
    down, across = ((count - 1) * windows.stride + 1 for count in found.shape[1:3])
    for number, (i, j) in enumerate(windows.places):
        seen = padded[:, i : i + down : windows.stride, j : j + across : windows.stride]
        with np.errstate(invalid="ignore"):
            better = ~((seen <= found) | np.isnan(found)) if number else True  # a NaN wins
        np.copyto(found, seen, where=better)
        np.copyto(at, np.uint8(number), where=better)


# ------------------------------------------------------------------------------------- by oneDNN
_TRAINING = 64  # dnnl_prop_kind_t
_MAX = 0x1FF  # dnnl_pooling_max


class _Pool:
    """The primitives of one kind of images and of their maxima."""

    def __init__(self, shape: Shape, pooled: Shape, dtype: Any, windows: Windows) -> None:
        self.windows = windows
        low, high = zip(*windows.pads, strict=True)
        square = ((windows.stride,) * 2, (windows.size,) * 2)
        geometry = [onednn.integers(values) for values in (*square, (0, 0), low, high)]
        made = Made()
        x, y = (made.layout(*image_layout(of), Type.of(dtype)) for of in (shape, pooled))
        engine, attributes = made.library.engine, made.attributes()

        training = made(
            "primitive_desc",
            "pooling_forward_primitive_desc_create",
            *(engine, _TRAINING, _MAX, x, y, *geometry, attributes),
        )
        gradient = made(
            "primitive_desc",
            "pooling_backward_primitive_desc_create",
            *(engine, _MAX, x, y, *geometry, training, attributes),
        )
        places = made.library.chosen_layout(training, Query.WORKSPACE)
        if made.library.size(places) != math.prod(pooled):
            raise RuntimeError("oneDNN keeps the places of a max pool otherwise than in bytes")
        # In the order in which JAX has operands and results.
        self.maxima = in_order(
            made,
            training,
            [(Argument.SOURCE, x), (Argument.TARGET, y), (Argument.WORKSPACE, places)],
        )
        self.at_places = in_order(
            made,
            gradient,
            [
                (Argument.WORKSPACE, places),
                (Argument.TARGET_GRADIENT, y),
                (Argument.SOURCE_GRADIENT, x),
            ],
        )


@lru_cache(maxsize=2048)
def _pool(shape: Shape, pooled: Shape, dtype: Any, windows: Windows) -> _Pool:
    with onednn.lock:
        return _Pool(shape, pooled, dtype, windows)
