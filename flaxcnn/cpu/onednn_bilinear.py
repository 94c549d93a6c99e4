"""XLA's calls for functions of two arrays (`bilinear`) that oneDNN computes on a CPU.

All of them are calls of one target, whose attribute says of what: the kind, or both gradients, and
then what the function is made with, in integers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from flaxcnn.cpu import onednn, xla_handlers
from flaxcnn.cpu.plans import Plan
from flaxcnn.cpu.xla_handlers import Array
from flaxcnn.operators.bilinear import PLACES, Kind, Shapes

BOTH_GRADIENTS = 3  # beside what `Kind` has; programs in files say so

# Makes what computes one kind, of both operands and the result, for the function's integers, the
# shapes of first, second and value, and their type. Under `lock`.
Make = Callable[[Kind, Sequence[int], Shapes, np.dtype], Plan]


def lowerings(target: str, integers: Callable[[Any], Sequence[int]]) -> tuple[Any, Any]:
    """For `Bilinear.on_cpu`: one kind, and both gradients in one call, by `integers` of `how`."""

    def call(ctx: Any, operands: Sequence[Any], *numbers: int) -> Any:
        attribute = np.array(numbers, np.int64)
        return jax.ffi.ffi_lowering(target)(ctx, *operands, numbers=attribute)

    def of_one(ctx: Any, a: Any, b: Any, *, kind: Kind, how: Any, shapes: Shapes) -> Any:
        del shapes
        return call(ctx, (a, b), kind, *integers(how))

    def of_gradients(ctx: Any, *operands: Any, how: Any, shapes: Shapes) -> Any:
        del shapes
        return call(ctx, operands, BOTH_GRADIENTS, *integers(how))

    return of_one, of_gradients


def register(target: str, make: Make) -> None:
    """Has XLA compute what `lowerings` call by what `make` makes.

    When a module is imported, not with its first call: a program that is read from a file comes
    without one.
    """

    def prepare(
        arguments: Sequence[Array], results: Sequence[Array], numbers: Sequence[int]
    ) -> Plan:
        if numbers[0] == BOTH_GRADIENTS:
            return _gradients(make, arguments, results, numbers[1:])
        return _one(make, Kind(numbers[0]), [*arguments, *results], numbers[1:])

    xla_handlers.register(target, prepare)


def _one(make: Make, kind: Kind, arrays: Sequence[Array], numbers: Sequence[int]) -> Plan:
    """Computes one kind, of both operands and the result.

    Raises:
        ValueError: there are more or fewer, or they are not of one type.
    """
    of = dict(zip(PLACES[kind], arrays, strict=True))
    (plan,) = _made(make, [kind], [of[place] for place in range(3)], numbers)
    return plan


def _gradients(
    make: Make, arguments: Sequence[Array], results: Sequence[Array], numbers: Sequence[int]
) -> Plan:
    """Computes both, of first, second and the value's gradient.

    Raises:
        ValueError: the results are not like first and second, or they are not of one type.
    """
    for gradient, array in zip(results, arguments[:2], strict=True):
        gradient.check(*array)
    kinds = [Kind.FIRST_GRADIENT, Kind.SECOND_GRADIENT]
    of_first, of_second = _made(make, kinds, arguments, numbers)
    first, second, dvalue, dfirst, dsecond = range(5)
    calls = [call.of((first, dvalue, dsecond)) for call in of_second.calls]
    # Last, for the caches: what comes next reads it.
    calls += [call.of((second, dvalue, dfirst)) for call in of_first.calls]
    return Plan(calls, max(of_first.working, of_second.working))


def _made(
    make: Make, kinds: Sequence[Kind], arrays: Sequence[Array], numbers: Sequence[int]
) -> list[Plan]:
    """What computes each kind, for first, second and value; takes `lock`."""
    dtype = arrays[0].dtype
    for array in arrays:
        array.check(array.shape, dtype)
    first, second, value = (array.shape for array in arrays)
    with onednn.lock:
        return [make(kind, numbers, (first, second, value), dtype) for kind in kinds]
