"""Layers by oneDNN, with all that they can take in, against JAX's own functions in float64."""

import itertools
import platform
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flaxcnn.cpu import onednn, onednn_layers
from flaxcnn.cpu.onednn_convolution import NHWC_HWIO, Geometry
from flaxcnn.cpu.onednn_layers import Activation, Layer

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip(f"{onednn.PACKAGE} is for x86-64 Linux", allow_module_level=True)

FUNCTIONS = {
    Activation.NONE: lambda x: x,
    Activation.RELU: jax.nn.relu,
    Activation.SILU: jax.nn.silu,
    Activation.RELU6: jax.nn.relu6,
}
ONE = (1, 1)
LAYERS = {
    "3x3": Layer((2, 9, 7, 16), (3, 3, 16, 33), (2, 9, 7, 33), Geometry(ONE, ONE, ONE, ONE, 1)),
    "7x7, stride 2, 3 channels": Layer(
        (1, 17, 18, 3), (7, 7, 3, 16), (1, 9, 9, 16), Geometry((2, 2), ONE, (3, 3), (3, 3), 1)
    ),
    "1x1": Layer(
        (3, 7, 7, 40), (1, 1, 40, 24), (3, 7, 7, 24), Geometry(ONE, ONE, (0, 0), (0, 0), 1)
    ),
    "depthwise 5x5, stride 2": Layer(
        (2, 9, 9, 24), (5, 5, 1, 24), (2, 5, 5, 24), Geometry((2, 2), ONE, (2, 2), (2, 2), 24)
    ),
    "4 groups": Layer((2, 6, 5, 32), (3, 3, 8, 64), (2, 6, 5, 64), Geometry(ONE, ONE, ONE, ONE, 4)),
    "dense": Layer((5, 70), (70, 33), (5, 33), None),
    "dense, one image": Layer((1, 512), (512, 1000), (1, 1000), None),
}


def as_jax_has_it(layer: Layer, x: Any, kernel: Any, bias: Any, residual: Any) -> Any:
    """In the type of its arrays."""
    if layer.geometry is None:
        y = x @ kernel
    else:
        geometry = layer.geometry
        y = lax.conv_general_dilated(
            x,
            kernel,
            geometry.strides,
            list(zip(geometry.low, geometry.high, strict=True)),
            rhs_dilation=geometry.dilation,
            dimension_numbers=NHWC_HWIO,
            feature_group_count=geometry.groups,
        )
    return FUNCTIONS[layer.activation](y + bias + residual)


def run(layer: Layer, *operands: jax.Array) -> jax.Array:
    program = jax.jit(partial(onednn_layers.primitive.bind, layer=layer))
    return jax.block_until_ready(program(*operands))


@pytest.mark.parametrize("name", LAYERS)
def test_values(name: str) -> None:
    """Every combination of bias, residual and activation; the residual is used again."""
    rng = np.random.default_rng(0)
    for bias, residual, activation in itertools.product([False, True], [False, True], Activation):
        layer = LAYERS[name]._replace(bias=bias, residual=residual, activation=activation)
        arrays = [
            rng.normal(size=layer.inputs),
            rng.normal(size=layer.kernel),
            3 * rng.normal(size=layer.kernel[-1]) * bias,
            5 * rng.normal(size=layer.outputs) * residual,
        ]
        with jax.enable_x64(True):
            double = [jnp.asarray(a) for a in arrays]
            wanted = np.asarray(as_jax_has_it(layer, *double))
            sums = np.asarray(as_jax_has_it(LAYERS[name], *double))  # which are what is rounded
        x, kernel, b, r = (jnp.asarray(a, jnp.float32) for a in arrays)
        operands = [x, jnp.asarray(onednn_layers.pack(layer, np.asarray(kernel)))]
        operands += [b] * bias + [r] * residual

        def program(*operands: jax.Array, layer: Layer = layer) -> Any:
            return onednn_layers.primitive.bind(*operands, layer=layer), operands[-1] + 1

        found, last = jax.jit(program)(*operands)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(sums).max())
        np.testing.assert_array_equal(last, operands[-1] + 1)


@pytest.mark.parametrize("name", LAYERS)
def test_all_of_a_layer_is_in_its_numbers(name: str) -> None:
    layer = LAYERS[name]._replace(bias=True, activation=Activation.SILU)
    numbers = [int(n) for n in layer.as_numbers()]
    assert Layer.from_numbers(numbers, layer.inputs, layer.outputs) == layer


def test_an_error_is_the_programs_error() -> None:
    wrong = LAYERS["3x3"]._replace(outputs=(2, 5, 5, 33))
    with pytest.raises(RuntimeError, match="oneDNN: dnnl_convolution_forward"):
        onednn_layers.pack(wrong, np.zeros(wrong.kernel, np.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="dnnl_convolution_forward"):
        run(wrong, jnp.zeros(wrong.inputs), jnp.zeros(9 * 16 * 48))


def test_a_packed_kernel_of_another_size_is_refused() -> None:
    """Before the library reads behind its end."""
    layer = LAYERS["3x3"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="packed kernel of 7 elements, not"):
        run(layer, jnp.zeros(layer.inputs), jnp.zeros(7))
