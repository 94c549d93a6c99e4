"""Layers as inference needs them, each in one call of oneDNN on a CPU.

A convolution or a dense layer with its bias, the sum with a residual branch, and the activation,
which otherwise go over the outputs in memory once each. The kernel comes in the order in which the
library wants it, made once by `pack`: with few images in a batch to do that takes as long as to
multiply. In float32 or bfloat16, where the bias is in float32 all the same and what a layer makes
is rounded once.
"""

import ctypes
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from flaxcnn.cpu import onednn, onednn_choice, winograd, xla_handlers
from flaxcnn.cpu.geometry import Geometry
from flaxcnn.cpu.onednn import Argument, Made, Query, Type
from flaxcnn.cpu.onednn_convolution import describe_forward, image_layout, kernel_layout
from flaxcnn.cpu.plans import (
    Addresses,
    Call,
    Check,
    Computation,
    Condition,
    Function,
    Plan,
    Reorder,
)
from flaxcnn.cpu.xla_handlers import Array
from flaxcnn.operators.bilinear import Kind, Shape
from flaxcnn.operators.kernel_groups import merge_groups

_TARGET = "flaxcnn_onednn_layer"


class Activation(IntEnum):
    """What a layer may end with (dnnl_alg_kind_t)."""

    NONE = 0
    RELU = 0x20
    SILU = 0x2C  # "swish"
    RELU6 = 0x2E  # "clip"

    @property
    def parameters(self) -> tuple[float, float]:
        """The library's alpha and beta."""
        return {Activation.SILU: (1.0, 0.0), Activation.RELU6: (0.0, 6.0)}.get(self, (0.0, 0.0))


class Layer(NamedTuple):
    """One layer, but for the values of its arrays."""

    inputs: Shape  # [N, H, W, C], of a dense layer [N, C]
    kernel: Shape  # [h, w, C / groups, O], of a dense layer [C, O]
    outputs: Shape  # [N, H', W', O], of a dense layer [N, O]
    geometry: Geometry | None  # of a convolution
    bias: bool = False  # [O]
    residual: bool = False  # an array of the outputs' shape, added before the activation
    activation: Activation = Activation.NONE
    dtype: np.dtype = np.dtype(np.float32)  # of all but the bias

    def as_numbers(self) -> tuple[int, ...]:
        """All but what XLA tells: the shapes of inputs and outputs, and their type."""
        geometry = self.geometry.as_numbers() if self.geometry else ()
        return (self.bias, self.residual, self.activation, *self.kernel, *geometry)

    @classmethod
    def from_numbers(
        cls, numbers: Sequence[int], inputs: Shape, outputs: Shape, dtype: np.dtype
    ) -> "Layer":
        """Of `as_numbers`."""
        bias, residual, activation, *more = numbers
        kernel, geometry = tuple(more[: len(inputs)]), more[len(inputs) :]
        return cls(
            inputs,
            kernel,
            outputs,
            Geometry.from_numbers(geometry) if geometry else None,
            bool(bias),
            bool(residual),
            Activation(activation),
            dtype,
        )


# ---------------------------------------------------------------------------------------- for JAX
def _abstract(inputs: Any, kernel: Any, *others: Any, layer: Layer) -> Any:
    bias, residual = others[: layer.bias], others[layer.bias :]
    types = {a.dtype for a in (inputs, kernel, *residual)}
    if types != {layer.dtype} or any(a.dtype != np.float32 for a in bias):
        raise TypeError(f"a layer by oneDNN of {layer.dtype}, its bias of float32, not of {types}")
    return inputs.update(shape=layer.outputs, weak_type=False)


def _lower(ctx: Any, *operands: Any, layer: Layer) -> Any:
    # The residual branch's array becomes the outputs; XLA copies it if it is used again.
    aliases = {len(operands) - 1: 0} if layer.residual else {}
    lower = jax.ffi.ffi_lowering(_TARGET, operand_output_aliases=aliases)
    return lower(ctx, *operands, numbers=np.array(layer.as_numbers(), np.int64))


def _prepare(arguments: Sequence[Array], results: Sequence[Array], numbers: Sequence[int]) -> Plan:
    inputs, kernel, *others = arguments
    (result,) = results
    layer = Layer.from_numbers(numbers, inputs.shape, result.shape, inputs.dtype)
    with onednn.lock:
        primitive = _primitive(layer)
    kernel.check((primitive.kernel_size,), layer.dtype)
    for array in others[: layer.bias]:
        array.check(result.shape[-1:], np.float32)
    residual = others[layer.bias :]
    for array in (result, *residual):
        array.check(result.shape, layer.dtype)
    operands, outputs_at = range(2 + layer.bias), len(arguments)
    call = Call(primitive.computation, (*operands, outputs_at))
    if not layer.residual:
        return Plan([call])
    residual_at = outputs_at - 1

    def in_one_place(addresses: Addresses) -> bool:
        return addresses[residual_at] == addresses[outputs_at]

    in_place = Check(Condition.SAME, residual_at, outputs_at, 0, in_one_place)
    return Plan([call], before=[in_place], otherwise=_refuse)


def _refuse(_: Addresses) -> None:
    raise ValueError("what is added is not where the sum goes; compile the program here")


# Of inputs, the packed kernel, and as the layer has them bias and residual. No derivatives.
primitive = Primitive("onednn_layer")
primitive.def_abstract_eval(_abstract)
primitive.def_impl(jax.jit(primitive.bind, static_argnames="layer"))
mlir.register_lowering(primitive, _lower, platform="cpu")
xla_handlers.register(_TARGET, _prepare)


# ------------------------------------------------------------------------------------- by oneDNN
_INFERENCE = 96


def pack(layer: Layer, kernel: np.ndarray) -> np.ndarray:
    """The kernel's elements in the order, or the form, in which this machine computes with it.

    That depends on the processor, its library, and the number of threads.

    Raises:
        RuntimeError: the library cannot do this, or is not installed.
    """
    if layer.geometry is not None:
        groups = layer.geometry.groups
        merged = onednn_choice.groups_at_once(layer.kernel, groups)
        with jax.ensure_compile_time_eval():  # also while a function is traced
            kernel = np.asarray(merge_groups(jnp.asarray(kernel), groups, merged))
    ours = np.ascontiguousarray(kernel, layer.dtype)
    with onednn.lock:
        primitive = _primitive(layer)
    return primitive.pack(ours)


class _Primitive(NamedTuple):
    """One layer as it is computed: what, of inputs, kernel, bias and outputs, and its kernel."""

    # Where a residual is added, it lies in the outputs.
    computation: Computation | Function
    kernel_size: int  # elements, packed
    packing: Computation | Function  # of the kernel as JAX has it

    def pack(self, kernel: np.ndarray) -> np.ndarray:
        packed = np.zeros(self.kernel_size, kernel.dtype)
        plan = Plan([Call(self.packing, (0, 1))])
        plan.make_calls((kernel.ctypes.data, packed.ctypes.data))
        return packed


@lru_cache(maxsize=2048)
def _primitive(layer: Layer) -> _Primitive:
    """Under `lock`."""
    return _by_winograd(layer) or _by_library(layer)


def _by_winograd(layer: Layer) -> _Primitive | None:
    """Where that is faster, and has what comes behind the sum."""
    if layer.geometry is None or layer.activation not in (Activation.NONE, Activation.RELU):
        return None
    shapes = (layer.inputs, layer.kernel, layer.outputs)
    if not winograd.suits_inference(layer.geometry, shapes, layer.dtype):
        return None
    behind = {"bias": layer.bias, "residual": layer.residual, "relu": bool(layer.activation)}
    packing, computation = winograd.layer(layer.geometry, shapes, **behind)
    return _Primitive(computation, winograd.kernel_size(layer.kernel), packing)


def _by_library(layer: Layer) -> _Primitive:
    made = Made()
    library = made.library
    describe = _describe_dense if layer.geometry is None else _describe_convolution
    bias = made.layout(layer.kernel[-1:], (1,)) if layer.bias else None
    description, ours, inputs, outputs = describe(made, layer, bias, _attributes(made, layer))
    wanted = library.chosen_layout(description, Query.WEIGHTS)
    parts = [(Argument.SOURCE, inputs), (Argument.WEIGHTS, wanted)]
    if bias is not None:
        parts.append((Argument.BIAS, bias))
    computation = Computation(made, description, [*parts, (Argument.TARGET, outputs)])
    size = library.size(wanted) // layer.dtype.itemsize
    return _Primitive(computation, size, Reorder(made, ours, wanted))


def _attributes(made: Made, layer: Layer) -> ctypes.c_void_p:
    """With what comes behind the product."""
    attributes, steps = made.attributes(), made("post_ops", "post_ops_create")
    append: Callable[..., None] = made.library.do
    if layer.residual:
        append("post_ops_append_sum", steps, ctypes.c_float(1), 0, Type.of(layer.dtype))
    if layer.activation:
        parameters = (ctypes.c_float(value) for value in layer.activation.parameters)
        append("post_ops_append_eltwise", steps, int(layer.activation), *parameters)
    made.library.do("primitive_attr_set_post_ops", attributes, steps)
    return attributes


_Described = tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]


def _describe_convolution(
    made: Made, layer: Layer, bias: ctypes.c_void_p | None, attributes: ctypes.c_void_p
) -> _Described:
    """The description; layouts of the kernel as JAX has it, of inputs and of outputs."""
    assert layer.geometry is not None
    merged = onednn_choice.groups_at_once(layer.kernel, layer.geometry.groups)
    geometry = layer.geometry._replace(groups=layer.geometry.groups // merged)
    height, width, channels, features = layer.kernel
    kernel = (height, width, channels * merged, features)
    of = Type.of(layer.dtype)
    sizes, strides = kernel_layout(kernel, geometry.groups)
    maps = (layer.inputs, layer.outputs)
    inputs, outputs = (made.layout(*image_layout(shape), of) for shape in maps)
    layouts = (inputs, made.any_layout(sizes, of), outputs)
    describe = partial(describe_forward, made, _INFERENCE, geometry, layouts, bias, attributes)
    description = onednn_choice.fastest(
        made.library, describe, Kind.FORWARD, kernel, layer.outputs, geometry.groups
    )
    return description, made.layout(sizes, strides, of), inputs, outputs


def _describe_dense(
    made: Made, layer: Layer, bias: ctypes.c_void_p | None, attributes: ctypes.c_void_p
) -> _Described:
    """As `_describe_convolution`."""
    of = Type.of(layer.dtype)
    channels, features = layer.kernel
    rows = (layer.inputs, layer.outputs)
    inputs, outputs = (made.layout(shape, (shape[1], 1), of) for shape in rows)
    kernel = made.any_layout((features, channels), of)
    description = made(
        "primitive_desc",
        "inner_product_forward_primitive_desc_create",
        *(made.library.engine, _INFERENCE, inputs, kernel, bias, outputs, attributes),
    )
    return description, made.layout((features, channels), (1, features), of), inputs, outputs
