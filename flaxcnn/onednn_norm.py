"""Batch norm in training as oneDNN computes it on a CPU, as JAX calls it and takes its derivatives.

With the ReLU that comes behind it, of which the library keeps the signs, or without one. On arrays
[N, H, W, C], scale and bias [C]; in float32.

Three primitives, as `normalised`'s derivative is one function of the changes of x, scale and bias
in which it is linear, and its gradient that function's transpose. oneDNN computes the value and the
gradient; the rest, which is forward-mode and second derivatives and a further axis by `jax.vmap`,
is written in JAX's own functions.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flaxcnn import onednn, xla_handlers
from flaxcnn.bilinear import Shape, varying_alike
from flaxcnn.onednn import Argument, Made, Query
from flaxcnn.onednn_convolution import image_layout

_AXES = (0, 1, 2)
_FORWARD, _GRADIENT = "flaxcnn_onednn_norm", "flaxcnn_onednn_norm_gradient"


# ---------------------------------------------------------------------------------------- for JAX
def normalised_relu(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """relu of x normalised by its own statistics, times scale, plus bias; mean; biased variance."""
    return _normalised_relu(x, scale, bias, epsilon)[:3]


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _normalised_relu(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> Any:
    """And of each y whether it is above zero, in the library's own form."""
    return tuple(_value.bind(*varying_alike(x, scale, bias), epsilon=epsilon))


@_normalised_relu.defjvp
def _normalised_relu_jvp(epsilon: float, primals: Any, tangents: Any) -> Any:
    x, scale, bias = primals
    y, mean, var, signs = _normalised_relu(x, scale, bias, epsilon)
    dx = tangents[0]
    operands = varying_alike(*tangents, x, scale, mean, var, y, signs)
    dy = _tangent.bind(*operands, epsilon=epsilon)
    dmean = jnp.mean(dx, _AXES)
    dvar = 2 * jnp.mean((x - mean) * dx, _AXES)
    no_change = np.zeros(signs.shape, jax.dtypes.float0)
    return (y, mean, var, signs), (dy, dmean, dvar, no_change)


def _value_plainly(x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float) -> Any:
    mean = jnp.mean(x, _AXES)
    var = jnp.mean(jnp.square(x - mean), _AXES)
    y = jax.nn.relu((x - mean) * (jax.lax.rsqrt(var + epsilon) * scale) + bias)
    # Signs that nothing reads: where this is used the gradient is plain too, and goes by y.
    return y, mean, var, jnp.zeros_like(scale, jnp.uint8, shape=_signs(x.shape, epsilon))


def _tangent_plainly(
    dx: jax.Array,
    dscale: jax.Array,
    dbias: jax.Array,
    x: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    y: jax.Array,
    *_signs: jax.Array,
    epsilon: float,
) -> jax.Array:
    """How y changes with x, scale and bias."""
    deviations = jax.lax.rsqrt(var + epsilon)
    normal = (x - mean) * deviations
    along = jnp.mean(dx, _AXES) + normal * jnp.mean(dx * normal, _AXES)
    change = scale * deviations * (dx - along) + dscale * normal + dbias
    return jnp.where(y > 0, change, 0)


def _gradient_plainly(
    dy: jax.Array, x: jax.Array, scale: jax.Array, *others: jax.Array, epsilon: float
) -> list[jax.Array]:
    """The transpose of `_tangent_plainly`."""
    changes = [jax.typeof(a).update(weak_type=False) for a in (x, scale, scale)]

    def tangent(*changes: jax.Array) -> jax.Array:
        return _tangent_plainly(*changes, x, scale, *others, epsilon=epsilon)

    return list(jax.linear_transpose(tangent, *changes)(dy))


# Of x, scale and bias: y, mean, var and signs. `_normalised_relu` says what its derivative is.
_value = Primitive("onednn_norm")
_value.multiple_results = True
# Of changes of x, scale and bias, and of x, scale, mean, var, y and signs.
_tangent = Primitive("onednn_norm_tangent")
# Of the gradient of y, and of x, scale, mean, var, y and signs: gradients of x, scale and bias.
_gradient = Primitive("onednn_norm_gradient")
_gradient.multiple_results = True


@_value.def_abstract_eval
def _value_abstract(x: Any, scale: Any, bias: Any, *, epsilon: float) -> Any:
    if not x.dtype == scale.dtype == bias.dtype == np.float32:
        raise TypeError(f"a norm by oneDNN is of float32 alone, not {x.dtype} and {scale.dtype}")
    channel = scale.update(weak_type=False)
    signs = scale.update(shape=_signs(x.shape, epsilon), dtype=np.dtype(np.uint8), weak_type=False)
    return x.update(weak_type=False), channel, channel, signs


@_tangent.def_abstract_eval
def _tangent_abstract(dx: Any, *_: Any, epsilon: float) -> Any:
    del epsilon
    return dx.update(weak_type=False)


@_gradient.def_abstract_eval
def _gradient_abstract(dy: Any, _x: Any, scale: Any, *_: Any, epsilon: float) -> Any:
    del epsilon
    channel = scale.update(weak_type=False)
    return dy.update(weak_type=False), channel, channel


def _transposed(dy: Any, *operands: Any, epsilon: float) -> list[Any]:
    changes, known = operands[:3], operands[3:]
    results: list[Any] = [None] * len(operands)
    if type(dy) is not ad.Zero:
        gradients = _gradient.bind(*varying_alike(dy, *known), epsilon=epsilon)
        for i, gradient in enumerate(gradients):
            if ad.is_undefined_primal(changes[i]):
                results[i] = gradient
    return results


def _derived(plainly: Any) -> Any:
    """The derivative of a primitive by that of its plain form."""

    def rule(primals: Any, tangents: Any, **parameters: Any) -> Any:
        changes = [
            np.zeros(a.shape, jax.dtypes.float0)
            if a.dtype == np.uint8
            else ad.instantiate_zeros(tangent)
            for a, tangent in zip(primals, tangents, strict=True)
        ]
        return jax.jvp(partial(plainly, **parameters), tuple(primals), tuple(changes))

    return rule


def _batched(plainly: Any) -> Any:
    def rule(arguments: Any, axes: Any, **parameters: Any) -> Any:
        results = jax.vmap(partial(plainly, **parameters), in_axes=axes)(*arguments)
        return results, jax.tree.map(lambda _: 0, results)

    return rule


for _primitive, _plainly in (
    (_value, _value_plainly),
    (_tangent, _tangent_plainly),
    (_gradient, _gradient_plainly),
):
    _primitive.def_impl(jax.jit(_primitive.bind, static_argnames="epsilon"))
    batching.primitive_batchers[_primitive] = _batched(_plainly)
    # Also for a program of several platforms, as `bilinear` has it.
    mlir.register_lowering(
        _primitive, mlir.lower_fun(_plainly, multiple_results=_primitive.multiple_results)
    )
ad.primitive_jvps[_tangent] = _derived(_tangent_plainly)
ad.primitive_jvps[_gradient] = _derived(_gradient_plainly)
ad.primitive_transposes[_tangent] = _transposed


# --------------------------------------------------------------------------------------- for XLA
def _lower_value(ctx: Any, *operands: Any, epsilon: float) -> Any:
    return jax.ffi.ffi_lowering(_FORWARD)(ctx, *operands, numbers=_numbers(epsilon))


def _lower_gradient(ctx: Any, *operands: Any, epsilon: float) -> Any:
    *needed, _y, signs = range(len(operands))  # y is for the plain form
    chosen = (*needed, signs)
    ctx = ctx.replace(avals_in=[ctx.avals_in[i] for i in chosen])
    operands = tuple(operands[i] for i in chosen)
    return jax.ffi.ffi_lowering(_GRADIENT)(ctx, *operands, numbers=_numbers(epsilon))


def _numbers(epsilon: float) -> np.ndarray:
    return np.array([np.float32(epsilon).view(np.int32)], np.int64)


def _epsilon(numbers: tuple[int, ...]) -> float:
    return float(np.int32(numbers[0]).view(np.float32))


def _handle_value(
    arguments: list[xla_handlers.Buffer],
    results: list[xla_handlers.Buffer],
    numbers: tuple[int, ...],
) -> None:
    norm = _norm(arguments[0].shape, _epsilon(numbers))
    with onednn.lock:
        norm.forward.run([buffer.address for buffer in (*arguments, *results)])


def _handle_gradient(
    arguments: list[xla_handlers.Buffer],
    results: list[xla_handlers.Buffer],
    numbers: tuple[int, ...],
) -> None:
    norm = _norm(arguments[0].shape, _epsilon(numbers))
    with onednn.lock:
        norm.gradient.run([buffer.address for buffer in (*arguments, *results)])


mlir.register_lowering(_value, _lower_value, platform="cpu")
mlir.register_lowering(_gradient, _lower_gradient, platform="cpu")
xla_handlers.register(_FORWARD, _handle_value)
xla_handlers.register(_GRADIENT, _handle_gradient)


# ------------------------------------------------------------------------------------- by oneDNN
_TRAINING, _BACKWARD = 64, 128  # dnnl_prop_kind_t
_USE_SCALE, _USE_SHIFT, _FUSE_RELU = 2, 4, 8  # dnnl_normalization_flags_t


class _Norm:
    """Both primitives of one shape, and the size of what the one keeps for the other."""

    def __init__(self, shape: Shape, epsilon: float) -> None:
        made = Made()
        x = made.layout(*image_layout(shape))
        channel = made.layout(shape[-1:], (1,))
        attributes, engine = made.attributes(), made.library.engine
        flags = _USE_SCALE | _USE_SHIFT | _FUSE_RELU
        settings = (ctypes.c_float(epsilon), flags)
        name = "batch_normalization_{}_primitive_desc_create"
        forward = made(
            "primitive_desc",
            name.format("forward"),
            *(engine, _TRAINING, x, x, *settings, attributes),
        )
        gradient = made(
            "primitive_desc",
            name.format("backward"),
            *(engine, _BACKWARD, x, x, x, *settings, forward, attributes),
        )
        signs = made.library.chosen_layout(forward, Query.WORKSPACE)
        self.size_of_signs = made.library.size(signs)
        # In the order of the primitives' operands and results, as JAX calls them.
        self.forward = _Step(
            made,
            forward,
            [
                (Argument.SOURCE, x),
                (Argument.SCALE, channel),
                (Argument.SHIFT, channel),
                (Argument.TARGET, x),
                (Argument.MEAN, channel),
                (Argument.VARIANCE, channel),
                (Argument.WORKSPACE, signs),
            ],
        )
        self.gradient = _Step(
            made,
            gradient,
            [
                (Argument.TARGET_GRADIENT, x),
                (Argument.SOURCE, x),
                (Argument.SCALE, channel),
                (Argument.MEAN, channel),
                (Argument.VARIANCE, channel),
                (Argument.WORKSPACE, signs),
                (Argument.SOURCE_GRADIENT, x),
                (Argument.SCALE_GRADIENT, channel),
                (Argument.SHIFT_GRADIENT, channel),
            ],
        )


class _Step:
    """One primitive, with its memories in the order in which it is called."""

    def __init__(
        self,
        made: Made,
        description: ctypes.c_void_p,
        parts: Sequence[tuple[Argument, ctypes.c_void_p]],
    ) -> None:
        library = made.library
        scratchpad = library.chosen_layout(description, Query.SCRATCHPAD)
        self._library, self._made = library, made
        self._primitive = made.primitive(description)
        self._memories = [made.memory(layout) for _, layout in parts]
        self._scratchpad = made.memory(scratchpad)
        self._scratchpad_size = library.size(scratchpad)
        names = [argument for argument, _ in parts]
        self._arguments = onednn.arguments(
            *zip(names, self._memories, strict=True), (Argument.SCRATCHPAD, self._scratchpad)
        )

    def run(self, addresses: Sequence[int]) -> None:
        place = self._library.place
        for memory, address in zip(self._memories, addresses, strict=True):
            place(memory, address)
        place(self._scratchpad, onednn.workspace(self._scratchpad_size))
        self._library.execute(self._primitive, self._arguments)


@lru_cache(maxsize=1024)
def _norm(shape: Shape, epsilon: float) -> _Norm:
    return _Norm(shape, epsilon)


def _signs(shape: Shape, epsilon: float) -> Shape:
    with onednn.lock:
        return (_norm(tuple(shape), float(np.float32(epsilon))).size_of_signs,)
