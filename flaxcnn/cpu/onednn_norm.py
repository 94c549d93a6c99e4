"""Batch norm in training as oneDNN computes it on a CPU, value and gradient.

With the ReLU that comes behind it, or without one; `norm_primitives` makes JAX's primitives of it.
Of maps in float32 or bfloat16, by statistics and scales in float32.
"""

import ctypes
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
from flaxcnn.operators.moments import by_statistics, statistics

_VALUE, _GRADIENT = "flaxcnn_onednn_norm", "flaxcnn_onednn_norm_gradient"


# --------------------------------------------------------------------------------------- for JAX
# Of so many values per channel, at most, the library sums up the statistics. It adds one after the
# other: of 8192 values the variance is wrong by 1e-6 of itself, of 100 000 by 1e-5, of a million by
# 2e-4. XLA's sums are exact to 1e-7. The gradients of scale and bias are the library's sums of any
# number: of 800 000 values they are wrong by 1e-5 of themselves, as torch's are.
_FEW = 8192


def value(
    x: jax.Array, scale: jax.Array, bias: jax.Array, _: jax.Array, *, epsilon: float, relu: bool
) -> Any:
    """y, mean, var, and with a ReLU signs: whether each y is above zero, in the library's own form.

    What the mean is about, which comes last, only the plain form needs.
    """
    signs = [jax.ShapeDtypeStruct(signs_shape(x, epsilon), jnp.uint8)] if relu else []
    if math.prod(x.shape[:3]) <= _FEW:
        results = [x, scale, scale, *signs]
        return _call(_VALUE, results, x, scale, bias, epsilon=epsilon, relu=relu)
    wide = x.astype(scale.dtype)
    mean, var = statistics(wide)
    if not relu:  # XLA computes it together with what follows
        # It would write x - mean, for this and for the variance.
        again = jax.lax.optimization_barrier(mean)
        return by_statistics(wide, scale, bias, again, var, epsilon).astype(x.dtype), mean, var
    operands = (x, scale, bias, mean, var)
    y, of_y = _call(_VALUE, [x, *signs], *operands, epsilon=epsilon, relu=relu)
    return y, mean, var, of_y


def gradient(
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    *of_relu: jax.Array,
    epsilon: float,
) -> Any:
    """Of x, scale and bias; `of_relu` is bias and signs, if there is a ReLU."""
    operands = (dy, x, scale, mean, var, *of_relu[1:])
    results = [x, scale, scale]
    return _call(_GRADIENT, results, *operands, epsilon=epsilon, relu=bool(of_relu))


def _call(
    target: str, results: Sequence[Any], *operands: jax.Array, epsilon: float, relu: bool
) -> Any:
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results]
    numbers = np.array([np.float32(epsilon).view(np.int32), relu], np.int64)
    return jax.ffi.ffi_call(target, like)(*operands, numbers=numbers)


def _norm_of(arguments: Sequence[Array], numbers: Sequence[int]) -> "_Norm":
    bits, relu = numbers
    images = arguments[0]
    return _norm(images.shape, images.dtype, float(np.int32(bits).view(np.float32)), bool(relu))


def _prepare_value(
    arguments: Sequence[Array], results: Sequence[Array], numbers: Sequence[int]
) -> Plan:
    norm = _norm_of(arguments, numbers)
    x, scale, bias, *given = arguments
    y, *found = results
    mean, var = given or found[:2]
    norm.check([x, y], [scale, bias, mean, var], results[1 if given else 3 :])
    y_at, channels_at = (5, (1, 2, 3, 4)) if given else (3, (1, 2, 4, 5))

    def spread(addresses: Addresses) -> None:
        _spread_nan(y.at(addresses[y_at]), [scale.at(addresses[at]) for at in channels_at])

    return Plan(
        [norm.by_statistics if given else norm.value],
        after=[_finite(channels_at[:2], scale), _finite(channels_at[2:], scale)],
        otherwise=spread,
    )


def _finite(places: Sequence[int], like: Array) -> Check:
    """That all of both are, if no product of two of them is too large; else it does not hold."""
    first, second = places

    def holds(addresses: Addresses) -> bool:
        with np.errstate(all="ignore"):
            return math.isfinite(np.dot(like.at(addresses[first]), like.at(addresses[second])))

    return Check(Condition.FINITE, first, second, math.prod(like.shape), holds)


def _spread_nan(y: np.ndarray, channels: Sequence[np.ndarray]) -> None:
    """Over all of a channel in which something is not finite.

    The library's ReLU makes zeros of NaN, and where a variance is too large it gives the bias; a
    training that has gone wrong must be seen to.
    """
    y[..., ~np.logical_and.reduce([np.isfinite(channel) for channel in channels])] = np.nan


def _prepare_gradient(
    arguments: Sequence[Array], results: Sequence[Array], numbers: Sequence[int]
) -> Plan:
    norm = _norm_of(arguments, numbers)
    dy, x, scale, mean, var, *signs = arguments
    norm.check([dy, x, results[0]], [scale, mean, var, *results[1:]], signs)
    return Plan([norm.gradient])


xla_handlers.register(_VALUE, _prepare_value)
xla_handlers.register(_GRADIENT, _prepare_gradient)


# ------------------------------------------------------------------------------------- by oneDNN
_TRAINING, _BACKWARD = 64, 128  # dnnl_prop_kind_t
_GLOBAL, _USE_SCALE, _USE_SHIFT, _FUSE_RELU = 1, 2, 4, 8  # dnnl_normalization_flags_t


class _Norm:
    """The primitives of one kind of maps, and the size of what a value keeps for its gradient."""

    def __init__(self, shape: Shape, dtype: np.dtype, epsilon: float, relu: bool) -> None:
        self._shape, self._dtype = shape, dtype
        made = Made()
        x = made.layout(*image_layout(shape), Type.of(dtype))
        channel = made.layout(shape[-1:], (1,))
        flags = _USE_SCALE | _USE_SHIFT | (_FUSE_RELU if relu else 0)
        engine, settings = made.library.engine, (ctypes.c_float(epsilon), flags)
        forward = made(
            "primitive_desc",
            "batch_normalization_forward_primitive_desc_create",
            *(engine, _TRAINING, x, x, *settings, made.attributes()),
        )
        given = made(
            "primitive_desc",
            "batch_normalization_forward_primitive_desc_create",
            *(engine, _TRAINING, x, x, settings[0], flags | _GLOBAL, made.attributes()),
        )
        gradient = made(
            "primitive_desc",
            "batch_normalization_backward_primitive_desc_create",
            *(engine, _BACKWARD, x, x, x, *settings, forward, made.attributes()),
        )
        workspace = made.library.chosen_layout(forward, Query.WORKSPACE)
        same = made.library.equal(workspace, made.library.chosen_layout(given, Query.WORKSPACE))
        if relu and not same:
            raise RuntimeError("oneDNN keeps signs in two ways")
        self.size_of_signs = made.library.size(workspace) if relu else 0
        signs = [(Argument.WORKSPACE, workspace)] if relu else []
        statistics = [(Argument.MEAN, channel), (Argument.VARIANCE, channel)]
        operands = [(Argument.SOURCE, x), (Argument.SCALE, channel), (Argument.SHIFT, channel)]
        target = (Argument.TARGET, x)
        # In the order in which JAX has operands and results.
        self.value = in_order(made, forward, [*operands, target, *statistics, *signs])
        self.by_statistics = in_order(made, given, [*operands, *statistics, target, *signs])
        self.gradient = in_order(
            made,
            gradient,
            [
                (Argument.TARGET_GRADIENT, x),
                (Argument.SOURCE, x),
                (Argument.SCALE, channel),
                *statistics,
                *signs,
                (Argument.SOURCE_GRADIENT, x),
                (Argument.SCALE_GRADIENT, channel),
                (Argument.SHIFT_GRADIENT, channel),
            ],
        )

    def check(
        self,
        maps: Sequence[Array],
        channels: Sequence[Array],
        signs: Sequence[Array],
    ) -> None:
        """That they are what the primitives were made for, as `Array.check` does."""
        for arrays, shape, dtype in (
            (maps, self._shape, self._dtype),
            (channels, self._shape[-1:], np.float32),
            (signs, (self.size_of_signs,), np.uint8),
        ):
            for array in arrays:
                array.check(shape, dtype)


@lru_cache(maxsize=2048)
def _norm(shape: Shape, dtype: np.dtype, epsilon: float, relu: bool) -> _Norm:
    with onednn.lock:
        return _Norm(shape, dtype, epsilon, relu)


def signs_shape(x: Any, epsilon: float) -> Shape:
    """[bytes] of the signs of maps of such a shape and type."""
    return (_norm(tuple(x.shape), x.dtype, float(np.float32(epsilon)), True).size_of_signs,)
