"""Max pools as JAX's primitives: the maxima, and what their derivatives are.

On arrays [N, H, W, C]. Three primitives: the maxima with the place of each in its window; what an
image has at those places, which is how the maxima change with it; and the transpose of that, an
image with values at those places, which is the gradient. They are written in JAX's own functions
(`max_places`). On a CPU oneDNN computes the first, and the last if it has AVX-512 (`onednn_pool`),
where that is asked for: in float32 or bfloat16.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from flaxcnn.cpu import onednn, onednn_pool
from flaxcnn.operators import max_places
from flaxcnn.operators.max_places import Begin, Windows
from flaxcnn.operators.primitives import give_plain_form, varying_alike

# From which element of the padded image on a gradient is woven; None: by oneDNN.
How = Begin | None


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def max_pool(x: jax.Array, windows: Windows, how: How = None) -> jax.Array:
    """[N, H, W, C] -> [N, H', W', C]; of equal values in a window the first has the gradient.

    Without derivatives in float32 by XLA, which finds maxima as fast, and beside the convolutions
    of other branches: of googlenet's prediction, batch 8, that is 6 %. In bfloat16 it does not.
    """
    if x.dtype == jnp.bfloat16:
        y: jax.Array = _maxima.bind(x, windows=windows, how=how)[0]
        return y
    return max_places.maxima(x, windows)


@max_pool.defjvp
def _max_pool_jvp(
    windows: Windows, how: How, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y, place = _maxima.bind(*primals, windows=windows, how=how)
    return y, _of_places.bind(*varying_alike(place, *tangents), windows=windows, how=how)


# ------------------------------------------------------------------------------- in JAX's functions
def _maxima_plainly(x: jax.Array, *, windows: Windows, how: How) -> list[jax.Array]:
    del how
    # The barrier: to be kept, not found again in each use.
    return list(jax.lax.optimization_barrier(max_places.maxima_and_places(x, windows)))


def _of_places_plainly(place: jax.Array, x: jax.Array, *, windows: Windows, how: How) -> jax.Array:
    return max_places.of_places(place, x, windows, how or (0, 0))


def _at_places_plainly(
    place: jax.Array, y: jax.Array, *, windows: Windows, image: tuple[int, int], how: How
) -> jax.Array:
    return max_places.at_places(place, y, windows, image, how or (0, 0))


# ---------------------------------------------------------------------------------------- on a CPU
def _maxima_on_cpu(x: jax.Array, *, windows: Windows, how: How) -> list[jax.Array]:
    if how is None:
        return onednn_pool.maxima_and_places(x, windows=windows)
    return _maxima_plainly(x, windows=windows, how=how)


def _at_places_on_cpu(
    place: jax.Array, y: jax.Array, *, windows: Windows, image: tuple[int, int], how: How
) -> jax.Array:
    """By oneDNN, but for its code for AVX2, than which XLA is faster.

    That / XLA, ms, float32, on 2 cores of an AMD EPYC (family 25, model 1): 112x112x64 3x3 stride 2
    in batches of 8 8.9 / 4.0, of 32 35 / 15, 28x28x192 3x3 3.4 / 1.7 and 19 / 5, 14x14x512 3x3
    4.2 / 2.1 and 12 / 4, 112x112x128 2x2 8.4 / 3.9 and 37 / 14.
    """
    if how is None and not onednn.at_most_avx2():
        return onednn_pool.at_places(place, y, windows=windows, image=image)
    return _at_places_plainly(place, y, windows=windows, image=image, how=how)


# ----------------------------------------------------------------------------------- the primitives
_maxima = Primitive("max_pool")  # of x: y and places
_maxima.multiple_results = True
_of_places = Primitive("of_places")  # of places and x
_at_places = Primitive("at_places")  # of places and y


@_maxima.def_abstract_eval
def _maxima_abstract(x: Any, *, windows: Windows, how: How) -> Any:
    if how is None and x.dtype not in (np.float32, jnp.bfloat16):
        raise TypeError(f"a max pool by oneDNN is of float32 or bfloat16, not {x.dtype}")
    if how is None and windows.place_type != np.uint8:
        raise ValueError(f"a max pool by oneDNN has windows below 16, not {windows.size}")
    shape = (x.shape[0], *windows.along(*x.shape[1:3]), x.shape[3])
    y = x.update(shape=shape, weak_type=False)
    return [y, y.update(dtype=np.dtype(windows.place_type))]


@_of_places.def_abstract_eval
def _of_places_abstract(place: Any, x: Any, *, windows: Windows, how: How) -> Any:
    del windows, how
    return x.update(shape=place.shape, weak_type=False)


@_at_places.def_abstract_eval
def _at_places_abstract(
    place: Any, y: Any, *, windows: Windows, image: tuple[int, int], how: How
) -> Any:
    del windows, how
    return y.update(shape=(place.shape[0], *image, place.shape[3]), weak_type=False)


def _maxima_derived(primals: Any, tangents: Any, *, windows: Windows, how: How) -> Any:
    y, place = _maxima.bind(*primals, windows=windows, how=how)
    dx = ad.instantiate_zeros(tangents[0])
    dy = _of_places.bind(*varying_alike(place, dx), windows=windows, how=how)
    return [y, place], [dy, ad.Zero(jax.typeof(place).to_tangent_aval())]


def _linear(primitive: Primitive) -> Any:
    """The derivative of a primitive by its second operand."""

    def rule(primals: Any, tangents: Any, **parameters: Any) -> Any:
        place, values = primals
        change = ad.instantiate_zeros(tangents[1])
        changed = primitive.bind(*varying_alike(place, change), **parameters)
        return primitive.bind(place, values, **parameters), changed

    return rule


def _of_places_transposed(dy: Any, place: Any, x: Any, *, windows: Windows, how: How) -> list[Any]:
    if type(dy) is ad.Zero:
        return [None, None]
    operands = varying_alike(place, dy)
    return [None, _at_places.bind(*operands, windows=windows, image=x.aval.shape[1:3], how=how)]


def _at_places_transposed(
    dx: Any, place: Any, _y: Any, *, windows: Windows, image: tuple[int, int], how: How
) -> list[Any]:
    del image
    if type(dx) is ad.Zero:
        return [None, None]
    return [None, _of_places.bind(*varying_alike(place, dx), windows=windows, how=how)]


for _primitive, _plainly in (
    (_maxima, _maxima_plainly),
    (_of_places, _of_places_plainly),
    (_at_places, _at_places_plainly),
):
    give_plain_form(_primitive, _plainly, ("windows", "image", "how"))
ad.primitive_jvps[_maxima] = _maxima_derived
ad.primitive_jvps[_of_places] = _linear(_of_places)
ad.primitive_jvps[_at_places] = _linear(_at_places)
ad.primitive_transposes[_of_places] = _of_places_transposed
ad.primitive_transposes[_at_places] = _at_places_transposed
for _primitive, _on_cpu in (
    (_maxima, _maxima_on_cpu),
    (_at_places, _at_places_on_cpu),
):
    _lowering = mlir.lower_fun(_on_cpu, multiple_results=_primitive.multiple_results)
    mlir.register_lowering(_primitive, _lowering, platform="cpu")
