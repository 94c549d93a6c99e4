"""A convolution by oneDNN as a JAX primitive with its derivatives, forward and backward.

A convolution is linear in the images and in the kernel, and so is each of its two gradients in what
it is made of. So each of the three is the derivative of the others, and a gradient of a gradient, a
`jax.jvp` or a `jax.linearize` stays among them.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flaxcnn import onednn, xla_handlers
from flaxcnn.onednn import Geometry, Kind

_TARGET = "flaxcnn_onednn_convolution"
_NHWC_HWIO = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolution(
    images: jax.Array, kernel: jax.Array, geometry: Geometry, outputs: tuple[int, int]
) -> jax.Array:
    """[N, H, W, C] and [h, w, C / groups, O] -> [N, *outputs, O], float32, on a CPU alone."""
    shapes = (images.shape, kernel.shape, (images.shape[0], *outputs, kernel.shape[3]))
    return _bind(images, kernel, Kind.FORWARD, geometry, shapes)


def _bind(a: Any, b: Any, kind: Kind, geometry: Geometry, shapes: Any) -> jax.Array:
    a, b = _varying_alike(a, b)
    result: jax.Array = _primitive.bind(a, b, kind=kind, geometry=geometry, shapes=shapes)
    return result


def _varying_alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Both varying over the axes of `jax.shard_map` that either varies over, as JAX's own do."""
    axes: list[frozenset[Any]] = [
        getattr(getattr(jax.typeof(x), "mat", None), "varying", frozenset()) for x in (a, b)
    ]
    missing = [tuple(axes[1] - axes[0]), tuple(axes[0] - axes[1])]
    a, b = (lax.pcast(x, m, to="varying") if m else x for x, m in zip((a, b), missing, strict=True))
    return a, b


# Of the three arrays (images, kernel, outputs) the places of both operands and of the result.
_PLACES = {
    Kind.FORWARD: (0, 1, 2),
    Kind.IMAGE_GRADIENT: (1, 2, 0),
    Kind.KERNEL_GRADIENT: (0, 2, 1),
}
_KIND_OF_RESULT = {places[2]: kind for kind, places in _PLACES.items()}


def _transposed(operand: int) -> Any:
    """The rule for the gradient of operand 0 or 1: the kind whose result is in that place."""

    def rule(cotangent: Any, a: Any, b: Any, *, kind: Kind, geometry: Geometry, shapes: Any) -> Any:
        places = _PLACES[kind]
        known = {places[2]: cotangent, places[1 - operand]: (a, b)[1 - operand]}
        wanted = _KIND_OF_RESULT[places[operand]]
        first, second, _ = _PLACES[wanted]
        return _bind(known[first], known[second], wanted, geometry, shapes)

    return rule


def _abstract(a: Any, b: Any, *, kind: Kind, geometry: Geometry, shapes: Any) -> Any:
    if not a.dtype == b.dtype == np.float32:
        raise TypeError(f"oneDNN is called with float32 alone, not {a.dtype} and {b.dtype}")
    return a.update(shape=shapes[_PLACES[kind][2]], weak_type=False)


def _lower(ctx: Any, a: Any, b: Any, *, kind: Kind, geometry: Geometry, shapes: Any) -> Any:
    numbers = np.array((kind, *geometry.as_numbers()), np.int64)
    return jax.ffi.ffi_lowering(_TARGET)(ctx, a, b, numbers=numbers)


def _handle(
    arguments: list[xla_handlers.Buffer], result: xla_handlers.Buffer, numbers: tuple[int, ...]
) -> None:
    kind = Kind(numbers[0])
    first, second, third = _PLACES[kind]
    buffers = {first: arguments[0], second: arguments[1], third: result}
    images, kernel, outputs = (buffers[place] for place in range(3))
    shapes = (images.shape, kernel.shape, outputs.shape)
    addresses = (images.address, kernel.address, outputs.address)
    onednn.convolve(kind, Geometry.from_numbers(numbers[1:]), shapes, addresses)


def _batched(args: Any, dims: Any, *, kind: Kind, geometry: Geometry, shapes: Any) -> Any:
    """By XLA's convolution, which knows how to take another axis."""
    function = partial(_by_xla, kind=kind, geometry=geometry, shapes=shapes)
    return jax.vmap(function, in_axes=dims)(*args), 0


def _by_xla(a: jax.Array, b: jax.Array, *, kind: Kind, geometry: Geometry, shapes: Any) -> Any:
    def forward(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            images,
            kernel,
            window_strides=geometry.strides,
            padding=list(zip(geometry.low, geometry.high, strict=True)),
            rhs_dilation=geometry.dilation,
            dimension_numbers=_NHWC_HWIO,
            feature_group_count=geometry.groups,
        )

    if kind is Kind.FORWARD:
        return forward(a, b)
    if kind is Kind.IMAGE_GRADIENT:
        images = jax.ShapeDtypeStruct(shapes[0], a.dtype)
        return jax.linear_transpose(lambda x: forward(x, a), images)(b)[0]
    kernel = jax.ShapeDtypeStruct(shapes[1], a.dtype)
    return jax.linear_transpose(lambda k: forward(a, k), kernel)(b)[0]


@partial(jax.jit, static_argnames=("kind", "geometry", "shapes"))
def _compiled(a: jax.Array, b: jax.Array, *, kind: Kind, geometry: Geometry, shapes: Any) -> Any:
    return _bind(a, b, kind, geometry, shapes)


_primitive = Primitive("onednn_convolution")
_primitive.def_abstract_eval(_abstract)
_primitive.def_impl(_compiled)
ad.defbilinear(_primitive, _transposed(0), _transposed(1))
batching.primitive_batchers[_primitive] = _batched
mlir.register_lowering(_primitive, _lower, platform="cpu")
# For a program of several platforms, of which `lax.platform_dependent` chooses when it runs.
mlir.register_lowering(_primitive, mlir.lower_fun(_by_xla, multiple_results=False))
# Now, and not with the first convolution: a program read from a file comes without one.
xla_handlers.register(_TARGET, _handle)
