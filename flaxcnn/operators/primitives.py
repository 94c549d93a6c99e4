"""What JAX primitives of our own have in common: how they are evaluated, derived and batched.

Each is given by a plain form, in JAX's own functions or of simpler primitives. That is what every
platform computes that has nothing of its own. `jax.lax.platform_dependent` could choose too, but
JAX derives all its branches: GoogLeNet's loss and gradients, on 2 cores of an AMD EPYC (family 25,
model 1), took 7 to 8 s to trace, so 2.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_plain_forms: dict[Primitive, Callable[..., Any]] = {}


def give_plain_form(
    primitive: Primitive, plainly: Callable[..., Any], parameters: tuple[str, ...]
) -> None:
    """Has `plainly`, with the primitive's parameters, be what it computes.

    Wherever a platform has nothing of its own, also in a program of several platforms; outside of
    `jax.jit`; with a further axis of `jax.vmap`; and to those who ask what it is, by `written_out`.
    """
    _plain_forms[primitive] = plainly
    primitive.def_impl(_evaluation(primitive, plainly, parameters))
    batching.primitive_batchers[primitive] = _batched(plainly)
    lowering = mlir.lower_fun(plainly, multiple_results=primitive.multiple_results)
    mlir.register_lowering(primitive, lowering)


def written_out(equation: Any) -> Any:
    """The function that an equation of a trace computes; None if its primitive is not of ours."""
    if (plainly := _plain_forms.get(equation.primitive)) is None:
        return None
    operands = (variable.aval for variable in equation.invars)
    return jax.make_jaxpr(partial(plainly, **equation.params))(*operands)


def _evaluation(
    primitive: Primitive, plainly: Callable[..., Any], parameters: tuple[str, ...]
) -> Callable[..., Any]:
    """How a primitive is evaluated outside of `jax.jit`: in one, or plainly where that is disabled.

    A compiled `bind` would then come back here, for ever.
    """
    compiled = jax.jit(primitive.bind, static_argnames=parameters)

    def evaluate(*operands: Any, **options: Any) -> Any:
        disabled = jax.config.jax_disable_jit  # type: ignore[attr-defined]  # JAX adds it at import
        return (plainly if disabled else compiled)(*operands, **options)

    return evaluate


def _batched(plainly: Callable[..., Any]) -> Callable[..., Any]:
    """How a primitive takes a further axis of `jax.vmap`: plainly."""

    def rule(arguments: Any, axes: Any, **parameters: Any) -> Any:
        results = jax.vmap(partial(plainly, **parameters), in_axes=axes)(*arguments)
        return results, jax.tree.map(lambda _: 0, results)

    return rule


def derived(plainly: Callable[..., Any]) -> Callable[..., Any]:
    """The derivative of a primitive: that of its plain form, along what changes."""

    def rule(primals: Any, tangents: Any, **parameters: Any) -> Any:
        changing = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]
        along = of_some(partial(plainly, **parameters), primals, changing)
        points, directions = ([them[i] for i in changing] for them in (primals, tangents))
        return jax.jvp(along, points, directions)

    return rule


def transposed(plainly: Callable[..., Any], cotangents: Any, operands: Sequence[Any]) -> list[Any]:
    """Of a function that is linear in those operands that are undefined; None of the others."""
    unknown = [i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand)]
    linear = of_some(plainly, operands, unknown)
    found = jax.linear_transpose(linear, *(operands[i].aval for i in unknown))(cotangents)
    results: list[Any] = [None] * len(operands)
    for i, cotangent in zip(unknown, found, strict=True):
        results[i] = cotangent
    return results


def of_some(
    function: Callable[..., Any], operands: Sequence[Any], places: Sequence[int]
) -> Callable[..., Any]:
    """The function of the operands in those places alone, with the others as they are."""

    def of_those(*values: Any) -> Any:
        everything = list(operands)
        for place, value in zip(places, values, strict=True):
            everything[place] = value
        return function(*everything)

    return of_those


def explicitly_sharded(*arrays: jax.Array) -> bool:
    """Whether their types say how they are spread over a mesh, as these primitives' cannot."""
    return any(jax.typeof(array).sharding.mesh.explicit_axes for array in arrays)


def varying_alike(*arrays: Any) -> list[Any]:
    """All varying over the axes of `jax.shard_map` that any varies over, as JAX's own do."""
    axes: list[frozenset[Any]] = [
        getattr(getattr(jax.typeof(x), "mat", None), "varying", frozenset()) for x in arrays
    ]
    everywhere = frozenset[Any]().union(*axes)
    missing = [tuple(everywhere - over) for over in axes]
    return [
        lax.pcast(x, over, to="varying") if over else x
        for x, over in zip(arrays, missing, strict=True)
    ]
