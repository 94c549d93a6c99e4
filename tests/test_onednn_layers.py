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
from processor import skip_unless_computed

from flaxcnn.cpu import onednn, onednn_layers
from flaxcnn.cpu.geometry import Geometry
from flaxcnn.cpu.onednn_convolution import NHWC_HWIO
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_values(name: str, dtype: Any) -> None:
    """Every combination of bias, residual and activation; the residual is used again."""
    skip_unless_computed(dtype)
    rng = np.random.default_rng(0)
    for bias, residual, activation in itertools.product([False, True], [False, True], Activation):
        layer = LAYERS[name]._replace(
            bias=bias, residual=residual, activation=activation, dtype=np.dtype(dtype)
        )

        def normal(shape: Any, of: Any = layer.dtype) -> np.ndarray:
            """Numbers that the type has."""
            return np.asarray(rng.normal(size=shape).astype(of), np.float64)

        arrays = [
            normal(layer.inputs),
            normal(layer.kernel),
            3 * normal(layer.kernel[-1], np.float32) * bias,
            4 * normal(layer.outputs) * residual,
        ]
        with jax.enable_x64(True):
            double = [jnp.asarray(a) for a in arrays]
            wanted = np.asarray(as_jax_has_it(layer, *double))
            sums = np.asarray(as_jax_has_it(LAYERS[name], *double))  # which are what is rounded
        x, kernel, b, r = (
            jnp.asarray(a, of)
            for a, of in zip(arrays, (dtype, dtype, "float32", dtype), strict=True)
        )
        operands = [x, jnp.asarray(onednn_layers.pack(layer, np.asarray(kernel)))]
        operands += [b] * bias + [r] * residual

        def program(*operands: jax.Array, layer: Layer = layer) -> Any:
            return onednn_layers.primitive.bind(*operands, layer=layer), operands[-1] + 1

        found, last = jax.jit(program)(*operands)
        assert found.dtype == dtype
        rounding = 0 if dtype == jnp.float32 else 2**-8  # once: half of the last of eight bits
        np.testing.assert_allclose(
            np.asarray(found, np.float64), wanted, rtol=rounding, atol=1e-6 * np.abs(sums).max()
        )
        np.testing.assert_array_equal(last, operands[-1] + 1)


@pytest.mark.parametrize("name", LAYERS)
def test_all_of_a_layer_is_in_its_numbers(name: str) -> None:
    layer = LAYERS[name]._replace(bias=True, activation=Activation.SILU)
    numbers = [int(n) for n in layer.as_numbers()]
    assert Layer.from_numbers(numbers, layer.inputs, layer.outputs, layer.dtype) == layer


def test_an_error_is_the_programs_error() -> None:
    wrong = LAYERS["3x3"]._replace(outputs=(2, 5, 5, 33))
    with pytest.raises(RuntimeError, match="oneDNN: dnnl_convolution_forward"):
        onednn_layers.pack(wrong, np.zeros(wrong.kernel, np.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="dnnl_convolution_forward"):
        run(wrong, jnp.zeros(wrong.inputs), jnp.zeros(9 * 16 * 48))


def test_arrays_that_are_not_the_librarys_are_refused() -> None:
    """Before the library reads or writes behind their ends."""
    layer = LAYERS["1x1"]._replace(bias=True, residual=True)
    x, kernel = jnp.zeros(layer.inputs), jnp.asarray(onednn_layers.pack(layer, np.zeros((40, 24))))
    bias, residual = jnp.zeros(24), jnp.zeros(layer.outputs)
    run(layer, x, kernel, bias, residual)
    numbers = np.array(layer.as_numbers(), np.int64)
    like = jax.ShapeDtypeStruct(layer.outputs, jnp.float32)
    call = partial(jax.ffi.ffi_call(onednn_layers._TARGET, like), numbers=numbers)
    for wrong in (
        (x, kernel[:7], bias, residual),
        (x, kernel, bias[:7], residual),
        (x, kernel, bias, residual[:1]),
        (x, kernel.astype("bfloat16"), bias, residual),
        (x, kernel, bias.astype("bfloat16"), residual),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
            jax.block_until_ready(call(*wrong))
    with pytest.raises(jax.errors.JaxRuntimeError, match="not where the sum goes"):
        jax.block_until_ready(call(x, kernel, bias, residual))
    with pytest.raises(TypeError, match="of float32, its bias of float32, not of"):
        run(layer, x.astype("bfloat16"), kernel, bias, residual)
    with pytest.raises(TypeError, match="its bias of float32"):
        run(layer, x, kernel, bias.astype("bfloat16"), residual)
