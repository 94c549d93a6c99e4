"""The product of a dense layer, as a CPU is fast at it.

XLA:CPU multiplies a few rows with a large kernel at half the speed that it can. With the rows
turned into columns first, in memory, it takes its faster way; and the kernel's gradient, which JAX
takes as [F, C] and turns, is [C, F] so: in bfloat16 the optimiser took four times its time to read
it across. Products in bfloat16 are oneDNN's, where the processor has instructions for them. On
accelerators, in other types, for single rows or small kernels, and for many rows that are not
oneDNN's it is `jax.lax.dot_general`, as it is everywhere with `FLAXCNN_PLAIN_CONVOLUTION=1`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir

from flaxcnn.convolution import PLAIN
from flaxcnn.cpu import onednn, onednn_product
from flaxcnn.operators.bilinear import Bilinear, Kind, Shapes
from flaxcnn.operators.primitives import explicitly_sharded

_ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))

_Product = Callable[[jax.Array, jax.Array], jax.Array]


def dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None, **others: Any
) -> jax.Array:
    """`jax.lax.dot_general`; what it does differently is of [N, C] and [C, F]."""
    usual = dimension_numbers == _ROWS_BY_COLUMNS and x.ndim == kernel.ndim == 2
    options = [precision, *others.values()]
    plain = PLAIN or not usual or any(v is not None for v in options)
    product = None if plain else _faster_on_cpu(x, kernel)
    if product is None:
        return lax.dot_general(x, kernel, dimension_numbers, precision=precision, **others)
    return product(x, kernel)


def _faster_on_cpu(x: jax.Array, kernel: jax.Array) -> _Product | None:
    """What is faster than it is written, if anything.

    Value, gradient of rows, of kernel, ms, as written / turned, on 2 cores of a Xeon (model 167):
    9216x4096, 2 rows 9.5, 15.9, 18.6 / 8.7, 5.9, 7.2; 8 rows 18, 14, 11 / 14, 6.6, 8.4; 32 rows
    39, 18, 13 / 19, 12, 12; 128 rows 46, 41, 41 / 43, 40, 39. 4096x1000, 8 rows 1.4, 1.0, 1.2 /
    0.8, 0.6, 0.8. 1280x1000, 16 rows 0.4, 0.8, 1.1 / 0.7, 0.4, 0.7. One row, gradient of rows 57 /
    57: there a row and a column are the same.

    In bfloat16 all three and a momentum's update, as written / turned / by oneDNN, on 2 cores of an
    AMD EPYC (family 25, model 17): 9216x4096, 1 row 34 / 34 / 39; 8 rows 177 / 36 / 36; 128 rows
    293 / 169 / 100. 4096x1000, 8 rows 13 / 4.5 / 5.0; 256 rows 42 / 39 / 19. In a network oneDNN
    gains more: alexnet's step, batch 8, 174 / 161, googlenet's 295 / 280.
    """
    known = isinstance(x.shape[0], int)  # a program for any batch has a symbol there
    if not known or x.dtype != kernel.dtype or explicitly_sharded(x, kernel):
        return None
    if x.shape[0] < 2 or kernel.size < 1 << 21:
        return None
    if x.dtype == jnp.bfloat16 and onednn.computes(x.dtype):
        return onednn_product.product
    most = {"float32": 64, "bfloat16": 128}.get(x.dtype.name, 0)
    return _turned_product if x.shape[0] <= most else None


def _turned_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _product(x, kernel, (x.shape[0], kernel.shape[1]), None)


def _as_written(x: jax.Array, kernel: jax.Array, how: None = None) -> jax.Array:
    del how
    return lax.dot_general(x, kernel, _ROWS_BY_COLUMNS)


def _turned(a: jax.Array, b: jax.Array, *, kind: Kind, how: None, shapes: Shapes) -> jax.Array:
    """`_as_written`, or one of its gradients: x or kernel, and the gradient of the product."""
    del how, shapes
    if kind is Kind.FORWARD:
        return _dot(_as_columns(a), b, 0, 0)
    if kind is Kind.FIRST_GRADIENT:
        return lax.optimization_barrier(_dot(a, _as_columns(b), 1, 0)).T
    return _dot(_as_columns(a), _as_columns(b), 1, 1)


def _as_columns(rows: jax.Array) -> jax.Array:
    """Transposed in memory: without the barrier XLA would fold it into the product."""
    return lax.optimization_barrier(rows.T)


def _dot(a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int) -> jax.Array:
    return lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())))


_product = Bilinear("dense_product", _as_written, (jnp.float32, jnp.bfloat16))
_product.on_cpu(mlir.lower_fun(_turned, multiple_results=False))
