"""Batch norm in training as JAX's primitives: the value, and what its derivatives are.

With the ReLU that comes behind it, or without one. On arrays [N, H, W, C], in float32 or bfloat16;
scale and bias [C], and all statistics, in float32.

Three primitives: the value; how it changes with x, scale and bias, which is linear in those
changes; and the gradient, the transpose of that. All are written in JAX's own functions, by which
other platforms compute them: XLA makes programs for a GPU of them that move as many bytes as those
of the formula that JAX derives. On a CPU oneDNN computes value and gradient (`onednn_norm`), and
only forward-mode and second derivatives and a further axis by `jax.vmap` are as they are written.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from flaxcnn.cpu import onednn_norm
from flaxcnn.operators.moments import Normalised, by_statistics, normalised_plainly
from flaxcnn.operators.primitives import derived, give_plain_form, varying_alike

_AXES = (0, 1, 2)
_TYPES = (np.dtype(np.float32), np.dtype(jnp.bfloat16))


def normalised(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float, relu: bool
) -> Normalised:
    """As `flaxcnn.normalisation.normalised`."""
    operands = varying_alike(x, scale, bias, near)
    return Normalised(*_value.bind(*operands, epsilon=epsilon, relu=relu)[:3])


# ------------------------------------------------------------------------------- in JAX's functions
def _value_plainly(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, *, epsilon: float, relu: bool
) -> Any:
    results = normalised_plainly(x, scale, bias, near, epsilon, relu)
    if not relu:
        return results
    # Signs that nothing reads: where this is computed the gradient is plain too.
    signs = jnp.zeros_like(scale, jnp.uint8, shape=onednn_norm.signs_shape(x, epsilon))
    return *results, signs


def _tangent_plainly(
    dx: jax.Array,
    dscale: jax.Array,
    dbias: jax.Array,
    x: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    *of_relu: jax.Array,
    epsilon: float,
) -> jax.Array:
    """How y changes with x, scale and bias; `of_relu` is bias and signs, if there is a ReLU."""
    deviations = jax.lax.rsqrt(var + epsilon)
    normal = (x.astype(mean.dtype) - mean) * deviations
    wide = dx.astype(scale.dtype)
    along = jnp.mean(wide, _AXES) + normal * jnp.mean(wide * normal, _AXES)
    change = scale * deviations * (wide - along) + dscale * normal + dbias
    return _past_relu(change, of_relu, x, scale, mean, var, epsilon).astype(x.dtype)


def _gradient_plainly(
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    *of_relu: jax.Array,
    epsilon: float,
) -> list[jax.Array]:
    """The transpose of `_tangent_plainly`: two sums, and after them the map."""
    deviations = jax.lax.rsqrt(var + epsilon)
    normal = (x.astype(mean.dtype) - mean) * deviations
    wide = _past_relu(dy.astype(scale.dtype), of_relu, x, scale, mean, var, epsilon)
    dbias, dscale = jnp.sum(wide, _AXES), jnp.sum(wide * normal, _AXES)
    along = (dbias + normal * dscale) / math.prod(x.shape[:-1])
    dx = scale * deviations * (wide - along)
    return [dx.astype(dy.dtype), dscale, dbias]


def _past_relu(
    change: jax.Array,
    of_relu: Sequence[jax.Array],
    x: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    epsilon: float,
) -> jax.Array:
    """What comes of a change where y > 0; all of it without a ReLU."""
    if not of_relu:
        return change
    bias, _ = of_relu
    # Computed again: y itself would be one more array to read. As the value is: of what is there
    # already, normal * scale + bias, XLA made a program for an H100 that moves 1 % more (resnet50).
    y = by_statistics(x.astype(mean.dtype), scale, bias, mean, var, epsilon)
    return jnp.where(y > 0, change, 0)


# ----------------------------------------------------------------------------------- the primitives
# Of x, scale, bias and near: y, mean, var, and with a ReLU signs: whether each y is above zero, in
# the library's own form.
_value = Primitive("norm")
_value.multiple_results = True
# Of changes of x, scale and bias, and of x, scale, mean, var, and with a ReLU bias and signs.
_tangent = Primitive("norm_tangent")
# Of the gradient of y, and of the same others: gradients of x, scale and bias.
_gradient = Primitive("norm_gradient")
_gradient.multiple_results = True


@_value.def_abstract_eval
def _value_abstract(x: Any, scale: Any, *others: Any, epsilon: float, relu: bool) -> Any:
    if x.dtype not in _TYPES or any(a.dtype != np.float32 for a in (scale, *others)):
        raise TypeError("a norm by oneDNN is of float32 or bfloat16, by float32 alone")
    channel = scale.update(weak_type=False)
    results = [x.update(weak_type=False), channel, channel]
    if relu:
        signs = onednn_norm.signs_shape(x, epsilon)
        results.append(channel.update(shape=signs, dtype=np.dtype(np.uint8)))
    return results


@_tangent.def_abstract_eval
def _tangent_abstract(dx: Any, *_: Any, epsilon: float) -> Any:
    del epsilon
    return dx.update(weak_type=False)


@_gradient.def_abstract_eval
def _gradient_abstract(dy: Any, _x: Any, scale: Any, *_: Any, epsilon: float) -> Any:
    del epsilon
    channel = scale.update(weak_type=False)
    return dy.update(weak_type=False), channel, channel


def _value_derived(primals: Any, tangents: Any, *, epsilon: float, relu: bool) -> Any:
    """Of mean and variance the derivatives are written out: mostly nobody asks for them."""
    x, scale, bias, _ = primals
    dx, dscale, dbias = (ad.instantiate_zeros(tangent) for tangent in tangents[:3])
    results = _, mean, var, *signs = _value.bind(*primals, epsilon=epsilon, relu=relu)
    of_relu = (bias, *signs) if relu else ()
    operands = varying_alike(dx, dscale, dbias, x, scale, mean, var, *of_relu)
    dy = _tangent.bind(*operands, epsilon=epsilon)
    wide = dx.astype(mean.dtype)
    dmean = jnp.mean(wide, _AXES)
    dvar = 2 * jnp.mean((x.astype(mean.dtype) - mean) * wide, _AXES)
    return results, [dy, dmean, dvar, *(ad.Zero(jax.typeof(a).to_tangent_aval()) for a in signs)]


def _transposed(dy: Any, *operands: Any, epsilon: float) -> list[Any]:
    changes, known = operands[:3], operands[3:]
    results: list[Any] = [None] * len(operands)
    if type(dy) is not ad.Zero:
        gradients = _gradient.bind(*varying_alike(dy, *known), epsilon=epsilon)
        for i, gradient in enumerate(gradients):
            if ad.is_undefined_primal(changes[i]):
                results[i] = gradient
    return results


for _primitive, _plainly in (
    (_value, _value_plainly),
    (_tangent, _tangent_plainly),
    (_gradient, _gradient_plainly),
):
    give_plain_form(_primitive, _plainly, ("epsilon", "relu"))
ad.primitive_jvps[_value] = _value_derived
ad.primitive_jvps[_tangent] = derived(_tangent_plainly)
ad.primitive_jvps[_gradient] = derived(_gradient_plainly)
ad.primitive_transposes[_tangent] = _transposed
for _primitive, _on_cpu in ((_value, onednn_norm.value), (_gradient, onednn_norm.gradient)):
    mlir.register_lowering(
        _primitive, mlir.lower_fun(_on_cpu, multiple_results=True), platform="cpu"
    )
