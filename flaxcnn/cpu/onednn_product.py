"""The product of two matrices as oneDNN computes it on a CPU, as JAX calls it.

In bfloat16, by the processor's instructions for it; XLA:CPU has none, and writes a dense layer's
kernel, and its gradient, in float32 first. Each sum is rounded once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxcnn.cpu import onednn_bilinear
from flaxcnn.cpu.onednn import Argument, Made, Type
from flaxcnn.cpu.plans import Plan, in_order
from flaxcnn.operators.bilinear import PLACES, Bilinear, Kind, Shape, Shapes

TARGET = "flaxcnn_onednn_product"


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[N, C] and [C, F] -> [N, F], all bfloat16."""
    return _product(x, kernel, (x.shape[0], kernel.shape[1]), None)


def _by_xla(x: jax.Array, kernel: jax.Array, _: None) -> jax.Array:
    return x @ kernel


# Of rows, kernel and product: the left factor, the right one and the result; and which is turned.
_FACTORS = {
    Kind.FORWARD: ((0, 1, 2), None),
    Kind.FIRST_GRADIENT: ((2, 1, 0), 1),
    Kind.SECOND_GRADIENT: ((0, 2, 1), 0),
}


def _plan(kind: Kind, numbers: Sequence[int], shapes: Shapes, dtype: Any) -> Plan:
    if numbers:
        raise ValueError(f"a product is made with no numbers, not {len(numbers)}")
    factors, turned = _FACTORS[kind]
    made = Made()
    layouts = [
        made.layout(*_layout(shape, place == turned), Type.of(dtype))
        for place, shape in enumerate(shapes)
    ]
    left, right, result = (layouts[place] for place in factors)
    description = made(
        "primitive_desc",
        "matmul_primitive_desc_create",
        *(made.library.engine, left, right, None, result, made.attributes()),
    )
    names = (Argument.SOURCE, Argument.WEIGHTS, Argument.TARGET)
    arguments = dict(zip(factors, names, strict=True))
    parts = [(arguments[place], layouts[place]) for place in PLACES[kind]]
    return Plan([in_order(made, description, parts)])


def _layout(shape: Shape, turned: bool) -> tuple[Shape, Shape]:
    """Of a matrix in row-major order: sizes and strides, in elements."""
    rows, columns = shape
    return ((columns, rows), (1, columns)) if turned else ((rows, columns), (columns, 1))


_product = Bilinear("onednn_product", _by_xla, (jnp.bfloat16,))
_product.on_cpu(*onednn_bilinear.lowerings(TARGET, integers=lambda _: ()))
onednn_bilinear.register(TARGET, _plan)
