"""The convolution that oneDNN computes on a CPU, as JAX calls it and takes its derivatives."""

from typing import Any

import jax
import numpy as np
from jax import lax

from flaxcnn import onednn, xla_handlers
from flaxcnn.bilinear import PLACES, Bilinear, Kind, Shapes
from flaxcnn.onednn import Geometry

_TARGET = "flaxcnn_onednn_convolution"
NHWC_HWIO = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolution(
    images: jax.Array, kernel: jax.Array, geometry: Geometry, outputs: tuple[int, int]
) -> jax.Array:
    """[N, H, W, C] and [h, w, C / groups, O] -> [N, *outputs, O], float32."""
    return _convolution(images, kernel, (images.shape[0], *outputs, kernel.shape[3]), geometry)


def _by_xla(images: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=geometry.strides,
        padding=list(zip(geometry.low, geometry.high, strict=True)),
        rhs_dilation=geometry.dilation,
        dimension_numbers=NHWC_HWIO,
        feature_group_count=geometry.groups,
    )


def _lower(ctx: Any, a: Any, b: Any, *, kind: Kind, how: Geometry, shapes: Shapes) -> Any:
    numbers = np.array((kind, *how.as_numbers()), np.int64)
    return jax.ffi.ffi_lowering(_TARGET)(ctx, a, b, numbers=numbers)


def _handle(
    arguments: list[xla_handlers.Buffer], result: xla_handlers.Buffer, numbers: tuple[int, ...]
) -> None:
    kind = Kind(numbers[0])
    first, second, third = PLACES[kind]
    buffers = {first: arguments[0], second: arguments[1], third: result}
    images, kernel, outputs = (buffers[place] for place in range(3))
    shapes = (images.shape, kernel.shape, outputs.shape)
    addresses = (images.address, kernel.address, outputs.address)
    onednn.convolve(kind, Geometry.from_numbers(numbers[1:]), shapes, addresses)


_convolution = Bilinear("onednn_convolution", _by_xla)
_convolution.on_cpu(_lower)
# Now, and not with the first convolution: a program read from a file comes without one.
xla_handlers.register(_TARGET, _handle)
