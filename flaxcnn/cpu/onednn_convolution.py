"""The convolution that oneDNN computes on a CPU, as JAX calls it and takes its derivatives.

On arrays in the order of JAX: images [N, H, W, C], kernel [h, w, C / groups, O]. A primitive of the
library (machine code for one case) is made at its first call and kept. What `winograd` computes
faster is called and derived in the same way.
"""

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxcnn.cpu import onednn, onednn_bilinear, onednn_choice, winograd
from flaxcnn.cpu.geometry import Geometry
from flaxcnn.cpu.onednn import Argument, Made, Query, Type
from flaxcnn.cpu.plans import Call, Computation, Plan, Reorder, rounded
from flaxcnn.operators.bilinear import PLACES, Bilinear, Kind, Shape, Shapes

TARGET = "flaxcnn_onednn_convolution"

NHWC_HWIO = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


# ---------------------------------------------------------------------------------------- for JAX
def convolution(
    images: jax.Array, kernel: jax.Array, geometry: Geometry, outputs: tuple[int, int]
) -> jax.Array:
    """[N, H, W, C] and [h, w, C / groups, O] -> [N, *outputs, O], all float32 or all bfloat16.

    Sums are in float32 at least; a gradient in bfloat16 is rounded once.
    """
    depthwise = geometry.groups == images.shape[3] == kernel.shape[3]
    function = _depthwise if depthwise else _convolution
    return function(images, kernel, (images.shape[0], *outputs, kernel.shape[3]), geometry)


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


_of_one, _of_gradients = onednn_bilinear.lowerings(TARGET, Geometry.as_numbers)
_TYPES = (jnp.float32, jnp.bfloat16)
_convolution = Bilinear("onednn_convolution", _by_xla, _TYPES)
_convolution.on_cpu(_of_one, _of_gradients)
# Of which each gradient is a call: XLA has more to compute beside the kernel's than a call costs.
# efficientnet_b0's step, batch 8, in one call: 1.04 to 1.06 of the time.
_depthwise = Bilinear("onednn_convolution_depthwise", _by_xla, _TYPES)
_depthwise.on_cpu(_of_one)


# ------------------------------------------------------------------------------------- by oneDNN
_DIRECT, _TRAINING = 1, 64
_ARGUMENTS = {
    Kind.FORWARD: (Argument.SOURCE, Argument.WEIGHTS, Argument.TARGET),
    Kind.FIRST_GRADIENT: (Argument.SOURCE_GRADIENT, Argument.WEIGHTS, Argument.TARGET_GRADIENT),
    Kind.SECOND_GRADIENT: (Argument.SOURCE, Argument.WEIGHTS_GRADIENT, Argument.TARGET_GRADIENT),
}

Layouts = tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]  # images, kernel, outputs


def _plan(kind: Kind, numbers: Sequence[int], shapes: Shapes, dtype: Any) -> Plan:
    """One convolution, and the kernel's way to the layout that the library wants or back from it.

    Raises:
        RuntimeError: the library cannot do this.
    """
    geometry = Geometry.from_numbers(numbers)
    if winograd.suits(kind, geometry, shapes, dtype):
        return winograd.plan(kind, geometry, shapes)
    images, kernel, outputs = shapes
    of = Type.of(dtype)
    made = Made()
    library = made.library
    ours = made.layout(*kernel_layout(kernel, geometry.groups), of)
    layouts = (
        made.layout(*image_layout(images), of),
        made.any_layout(kernel_layout(kernel, geometry.groups)[0], of),
        made.layout(*image_layout(outputs), of),
    )
    describe = partial(_describe, made, kind, geometry, layouts)
    description = onednn_choice.fastest(library, describe, kind, kernel, outputs, geometry.groups)
    of_gradient = kind is Kind.SECOND_GRADIENT
    wanted = library.chosen_layout(
        description, Query.WEIGHTS_GRADIENT if of_gradient else Query.WEIGHTS
    )
    parts = list(zip(_ARGUMENTS[kind], (layouts[0], wanted, layouts[2]), strict=True))
    order = PLACES[kind]
    convolution = Computation(made, description, [parts[place] for place in order])
    if library.equal(wanted, ours):
        return Plan([Call(convolution, (0, 1, 2))])
    behind = rounded(convolution.working)  # its memory for work
    kernel_at = order.index(1)
    call = Call(convolution, [~behind if at == kernel_at else at for at in range(3)])
    if of_gradient:
        calls = [call, Call(Reorder(made, wanted, ours), (~behind, kernel_at))]
    else:
        calls = [Call(Reorder(made, ours, wanted), (kernel_at, ~behind)), call]
    return Plan(calls, behind + library.size(wanted))


onednn_bilinear.register(TARGET, _plan)


def _describe(made: Made, kind: Kind, geometry: Geometry, layouts: Layouts) -> ctypes.c_void_p:
    images, kernel, outputs = layouts
    attributes, engine, no_bias = made.attributes(), made.library.engine, None
    forward = describe_forward(made, _TRAINING, geometry, layouts, no_bias, attributes)
    if kind is Kind.FORWARD:
        return forward
    arrays: list[ctypes.c_void_p | None]
    if kind is Kind.FIRST_GRADIENT:
        name, arrays = "data", [images, kernel, outputs]
    else:
        name, arrays = "weights", [images, kernel, no_bias, outputs]
    return made(
        "primitive_desc",
        f"convolution_backward_{name}_primitive_desc_create",
        *(engine, _DIRECT, *arrays, *_steps(geometry), forward, attributes),
    )


def describe_forward(
    made: Made,
    purpose: int,
    geometry: Geometry,
    layouts: Layouts,
    bias: ctypes.c_void_p | None,
    attributes: ctypes.c_void_p,
) -> ctypes.c_void_p:
    """The description of a primitive; `purpose` is one of dnnl_prop_kind_t."""
    images, kernel, outputs = layouts
    arrays = (images, kernel, bias, outputs)
    return made(
        "primitive_desc",
        "convolution_forward_primitive_desc_create",
        *(made.library.engine, purpose, _DIRECT, *arrays, *_steps(geometry), attributes),
    )


def _steps(geometry: Geometry) -> list[Any]:
    dilation = tuple(d - 1 for d in geometry.dilation)  # here 0 is none
    steps = (geometry.strides, dilation, geometry.low, geometry.high)
    return [onednn.integers(step) for step in steps]


def image_layout(shape: Shape) -> tuple[Shape, Shape]:
    """Shape as N, C, H, W with the strides of N, H, W, C, in elements."""
    batch, height, width, channels = shape
    strides = (height * width * channels, 1, width * channels, channels)
    return (batch, channels, height, width), strides


def kernel_layout(shape: Shape, groups: int) -> tuple[Shape, Shape]:
    """Shape as [groups,] O, C, h, w with the strides of h, w, C, O, in elements."""
    height, width, channels, outputs = shape
    strides = (1, outputs, width * channels * outputs, channels * outputs)
    if groups == 1:
        return (outputs, channels, height, width), strides
    within = outputs // groups
    return (groups, within, channels, height, width), (within, *strides)
