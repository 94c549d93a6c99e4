"""Functions of two arrays that are linear in each, as JAX primitives, computed as suits a platform.

Each has three kinds: its value and its two gradients. All three are again linear in the two arrays
that they are made of, so that each is the derivative of the others, and a gradient of a gradient, a
`jax.jvp` or a `jax.linearize` stays among them. So one formulation for each of three kinds is all
that a platform needs to be given.

Training asks for both gradients. They are one primitive, the transpose of how the value changes
with both arrays, so that a platform may compute them together.
"""

from collections.abc import Callable, Hashable, Sequence
from enum import IntEnum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class Kind(IntEnum):
    """What is computed, of which two arrays."""

    FORWARD = 0  # the value, of first and second
    FIRST_GRADIENT = 1  # of second and the value's gradient
    SECOND_GRADIENT = 2  # of first and the value's gradient


Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape]  # of first, second and value
# (first, second, how) -> value, in JAX's own functions.
Plain = Callable[[jax.Array, jax.Array, Any], jax.Array]

# Of first, second and value the places of both operands and of the result.
PLACES = {
    Kind.FORWARD: (0, 1, 2),
    Kind.FIRST_GRADIENT: (1, 2, 0),
    Kind.SECOND_GRADIENT: (0, 2, 1),
}
_KIND_OF_RESULT = {places[2]: kind for kind, places in PLACES.items()}


class Bilinear:
    """One such function, of arrays of one of `dtypes`, by `plain` until a platform has its own."""

    def __init__(self, name: str, plain: Plain, dtypes: Sequence[Any] = (np.float32,)) -> None:
        self._plain = plain
        self._dtypes = [np.dtype(dtype) for dtype in dtypes]
        self._primitive = primitive = Primitive(name)
        primitive.def_abstract_eval(self._abstract)
        parameters = ("kind", "how", "shapes")
        primitive.def_impl(evaluation(self._bind, self._plainly, parameters))
        ad.defbilinear(primitive, partial(self._transposed, 0), partial(self._transposed, 1))
        self._derived_of_one = ad.primitive_jvps[primitive]
        ad.primitive_jvps[primitive] = self._derived
        batching.primitive_batchers[primitive] = self._batched
        # Also for a program of several platforms, among which `lax.platform_dependent` chooses when
        # it runs.
        mlir.register_lowering(primitive, mlir.lower_fun(self._plainly, multiple_results=False))

        # Of changes of first and second, and of both: how the value changes.
        self._change = Primitive(f"{name}_change")
        self._change.def_abstract_eval(_change_abstract)
        ad.primitive_transposes[self._change] = self._change_transposed
        # Of first, second and the value's gradient: their gradients.
        self._gradients = Primitive(f"{name}_gradients")
        self._gradients.multiple_results = True
        self._gradients.def_abstract_eval(_gradients_abstract)
        for both, by_one in (
            (self._change, self._change_by_one),
            (self._gradients, self._gradients_by_one),
        ):
            both.def_impl(evaluation(both.bind, by_one, ("how", "shapes")))
            ad.primitive_jvps[both] = derived(by_one)
            batching.primitive_batchers[both] = batched(by_one)
            lowering = mlir.lower_fun(by_one, multiple_results=both.multiple_results)
            mlir.register_lowering(both, lowering)

    def on_cpu(
        self, lowering: Callable[..., Any], of_gradients: Callable[..., Any] | None = None
    ) -> None:
        """How a CPU computes it: a lowering rule with the parameters `kind`, `how`, `shapes`.

        And one for both gradients together, of first, second and the value's gradient, with `how`
        and `shapes`.
        """
        mlir.register_lowering(self._primitive, lowering, platform="cpu")
        if of_gradients is not None:
            mlir.register_lowering(self._gradients, of_gradients, platform="cpu")

    def __call__(
        self, first: jax.Array, second: jax.Array, value: Shape, how: Hashable
    ) -> jax.Array:
        """The value, whose shape is given; `how` is handed on to what computes it."""
        shapes = (first.shape, second.shape, value)
        return self._bind(first, second, kind=Kind.FORWARD, how=how, shapes=shapes)

    def _bind(self, a: Any, b: Any, **parameters: Any) -> jax.Array:
        result: jax.Array = self._primitive.bind(*varying_alike(a, b), **parameters)
        return result

    def _abstract(self, a: Any, b: Any, *, kind: Kind, how: Any, shapes: Shapes) -> Any:
        if a.dtype != b.dtype or a.dtype not in self._dtypes:
            known = " or ".join(str(dtype) for dtype in self._dtypes)
            raise TypeError(f"{self._primitive} is of {known} alone, not {a.dtype} and {b.dtype}")
        return a.update(shape=shapes[PLACES[kind][2]], weak_type=False)

    def _transposed(
        self, operand: int, cotangent: Any, a: Any, b: Any, *, kind: Kind, how: Any, shapes: Shapes
    ) -> Any:
        """The gradient of operand 0 or 1: the kind whose result is in that one's place."""
        places = PLACES[kind]
        known = {places[2]: cotangent, places[1 - operand]: (a, b)[1 - operand]}
        wanted = _KIND_OF_RESULT[places[operand]]
        first, second, _ = PLACES[wanted]
        return self._bind(known[first], known[second], kind=wanted, how=how, shapes=shapes)

    def _derived(self, primals: Any, tangents: Any, **parameters: Any) -> Any:
        one = any(type(tangent) is ad.Zero for tangent in tangents)
        if one or parameters["kind"] is not Kind.FORWARD:
            return self._derived_of_one(primals, tangents, **parameters)
        value = self._bind(*primals, **parameters)
        del parameters["kind"]
        return value, self._change.bind(*tangents, *primals, **parameters)

    def _change_transposed(self, dvalue: Any, *operands: Any, **parameters: Any) -> list[Any]:
        if type(dvalue) is ad.Zero:
            return [None] * 4
        changes, arrays = operands[:2], operands[2:]
        wanted = [ad.is_undefined_primal(change) for change in changes]
        gradients = self._gradients.bind(*varying_alike(*arrays, dvalue), **parameters)
        found = [g if asked else None for g, asked in zip(gradients, wanted, strict=True)]
        return [*found, None, None]

    def _change_by_one(
        self, dfirst: Any, dsecond: Any, first: Any, second: Any, **parameters: Any
    ) -> jax.Array:
        along_first = self._bind(dfirst, second, kind=Kind.FORWARD, **parameters)
        return along_first + self._bind(first, dsecond, kind=Kind.FORWARD, **parameters)

    def _gradients_by_one(
        self, first: Any, second: Any, dvalue: Any, **parameters: Any
    ) -> list[jax.Array]:
        return [
            self._bind(second, dvalue, kind=Kind.FIRST_GRADIENT, **parameters),
            self._bind(first, dvalue, kind=Kind.SECOND_GRADIENT, **parameters),
        ]

    def _batched(self, args: Any, dims: Any, **parameters: Any) -> Any:
        """By `plain`, whose functions know how to take another axis."""
        return jax.vmap(partial(self._plainly, **parameters), in_axes=dims)(*args), 0

    def _plainly(self, a: Any, b: Any, *, kind: Kind, how: Any, shapes: Shapes) -> Any:
        if kind is Kind.FORWARD:
            return self._plain(a, b, how)
        place = PLACES[kind][2]
        wanted = jax.typeof(b).update(shape=shapes[place], weak_type=False)
        if kind is Kind.FIRST_GRADIENT:
            return jax.linear_transpose(lambda first: self._plain(first, a, how), wanted)(b)[0]
        return jax.linear_transpose(lambda second: self._plain(a, second, how), wanted)(b)[0]


def _change_abstract(
    _dfirst: Any, _dsecond: Any, first: Any, _second: Any, *, how: Any, shapes: Shapes
) -> Any:
    del how
    return first.update(shape=shapes[2], weak_type=False)


def _gradients_abstract(first: Any, second: Any, _dvalue: Any, *, how: Any, shapes: Shapes) -> Any:
    del how, shapes
    return [array.update(weak_type=False) for array in (first, second)]


# -------------------------------------------------------------------------------- of any primitive
def evaluation(
    bind: Callable[..., Any], plainly: Callable[..., Any], parameters: tuple[str, ...]
) -> Callable[..., Any]:
    """How a primitive is evaluated outside of `jax.jit`: in one, or plainly where that is disabled.

    A compiled `bind` would then come back here, for ever.
    """
    compiled = jax.jit(bind, static_argnames=parameters)

    def evaluate(*operands: Any, **options: Any) -> Any:
        disabled = jax.config.jax_disable_jit  # type: ignore[attr-defined]  # JAX adds it at import
        return (plainly if disabled else compiled)(*operands, **options)

    return evaluate


def derived(plainly: Callable[..., Any]) -> Callable[..., Any]:
    """The derivative of a primitive: that of its plain form."""

    def rule(primals: Any, tangents: Any, **parameters: Any) -> Any:
        changes = [
            ad.instantiate_zeros(tangent)
            if jnp.issubdtype(a.dtype, np.inexact)
            else np.zeros(a.shape, jax.dtypes.float0)
            for a, tangent in zip(primals, tangents, strict=True)
        ]
        return jax.jvp(partial(plainly, **parameters), tuple(primals), tuple(changes))

    return rule


def batched(plainly: Callable[..., Any]) -> Callable[..., Any]:
    """How a primitive takes a further axis of `jax.vmap`: plainly."""

    def rule(arguments: Any, axes: Any, **parameters: Any) -> Any:
        results = jax.vmap(partial(plainly, **parameters), in_axes=axes)(*arguments)
        return results, jax.tree.map(lambda _: 0, results)

    return rule


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
