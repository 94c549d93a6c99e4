"""Functions of two arrays that are linear in each, as JAX primitives, computed as suits a platform.

Each has three kinds: its value and its two gradients. All three are again linear in the two arrays
that they are made of, so that each is the derivative of the others, and a gradient of a gradient, a
`jax.jvp` or a `jax.linearize` stays among them. So one formulation for each of three kinds is all
that a platform needs to be given.

Training asks for both gradients. They are one primitive, the transpose of how the value changes
with both arrays, and may be given a formulation too, to be computed together.
"""

from collections.abc import Callable, Hashable, Sequence
from enum import IntEnum
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from flaxcnn.operators.primitives import derived, give_plain_form, transposed, varying_alike


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
        give_plain_form(primitive, self._plainly, ("kind", "how", "shapes"))
        ad.defbilinear(primitive, partial(self._transposed, 0), partial(self._transposed, 1))
        self._derived_by_one = ad.primitive_jvps[primitive]
        ad.primitive_jvps[primitive] = self._derived

        # Of the changes of first and second, and of those themselves: how the value changes.
        self._change = Primitive(f"{name}_change")
        self._change.def_abstract_eval(_change_abstract)
        ad.primitive_transposes[self._change] = self._change_transposed
        # Of first, second and the value's gradient: their gradients.
        self._gradients = Primitive(f"{name}_gradients")
        self._gradients.multiple_results = True
        self._gradients.def_abstract_eval(_gradients_abstract)
        ad.primitive_transposes[self._gradients] = self._gradients_transposed
        for both, by_one in (
            (self._change, self._change_by_one),
            (self._gradients, self._gradients_by_one),
        ):
            give_plain_form(both, by_one, ("how", "shapes"))
            ad.primitive_jvps[both] = derived(by_one)

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

    def _derived(self, primals: Any, tangents: Any, *, kind: Kind, how: Any, shapes: Shapes) -> Any:
        """Of the value along both arrays in one; else, and of gradients, along each by itself."""
        one = any(type(tangent) is ad.Zero for tangent in tangents)
        if one or kind is not Kind.FORWARD:
            return self._derived_by_one(primals, tangents, kind=kind, how=how, shapes=shapes)
        value = self._bind(*primals, kind=kind, how=how, shapes=shapes)
        operands = varying_alike(*tangents, *primals)
        return value, self._change.bind(*operands, how=how, shapes=shapes)

    def _change_transposed(self, dvalue: Any, *operands: Any, **parameters: Any) -> list[Any]:
        wanted = [ad.is_undefined_primal(operand) for operand in operands]
        if type(dvalue) is ad.Zero:
            return [None] * 4
        if wanted != [True, True, False, False]:
            return transposed(partial(self._change_by_one, **parameters), dvalue, operands)
        known = varying_alike(*operands[2:], dvalue)
        return [*self._gradients.bind(*known, **parameters), None, None]

    def _gradients_transposed(self, changes: Any, *operands: Any, **parameters: Any) -> list[Any]:
        changes = [ad.instantiate_zeros(change) for change in changes]
        return transposed(partial(self._gradients_by_one, **parameters), changes, operands)

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
