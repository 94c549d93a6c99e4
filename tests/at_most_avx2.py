"""What computes with AVX2 and no AVX-512, as JSON: `python tests/at_most_avx2.py`.

To be run with ONEDNN_MAX_CPU_ISA=AVX2, so that a processor that has more computes as such a one.
`compared`, by name of a convolution: the implementations that computed its value and gradients, and
how far they are from XLA's in float64, relative to the largest element. `refused`: what is said of
a program made where there is bfloat16. `pooled`: of a max pool's gradient.
"""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxcnn import pooling
from flaxcnn.convolution import conv_general_dilated
from flaxcnn.cpu import (
    onednn,
    onednn_choice,
    onednn_convolution,
    onednn_layers,
    onednn_norm,
    onednn_pool,
    winograd,
)
from flaxcnn.cpu.geometry import Geometry
from flaxcnn.cpu.onednn_convolution import NHWC_HWIO
from flaxcnn.cpu.onednn_layers import Layer
from flaxcnn.operators.bilinear import Kind


class Case(NamedTuple):
    """One convolution, padded as for outputs of the images' size."""

    images: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]
    stride: int = 1
    groups: int = 1


CASES = {
    "1x1": Case((2, 24, 24, 40), (1, 1, 40, 24)),
    "1x1, many channels": Case((5, 15, 14, 520), (1, 1, 520, 1016)),
    "1x1, stride 2": Case((3, 48, 46, 16), (1, 1, 16, 24), 2),
    "1x1, stride 2, odd": Case((3, 48, 47, 16), (1, 1, 16, 24), 2),
    "1x1, groups": Case((2, 24, 24, 32), (1, 1, 16, 32), groups=2),
    "depthwise": Case((2, 9, 8, 24), (5, 5, 1, 24), groups=24),
    "groups of 8": Case((2, 9, 8, 32), (3, 3, 8, 32), 2, groups=4),
    "groups of 4": Case((2, 9, 8, 32), (3, 3, 4, 32), groups=8),
    "groups of 2": Case((2, 9, 9, 16), (3, 3, 2, 16), 2, groups=8),
    "3 groups of 4": Case((2, 9, 9, 12), (3, 3, 4, 12), groups=3),  # which are not twos
    "groups of 4 and 8": Case((2, 9, 9, 16), (3, 3, 4, 32), groups=4),
    "3x3, few channels": Case((2, 9, 8, 20), (3, 3, 20, 32)),
    "3x3, channels of 16": Case((2, 9, 8, 32), (3, 3, 32, 48)),
    "3x3, channels of 8": Case((2, 9, 8, 24), (3, 3, 24, 32)),
    "3x3, many channels": Case((2, 9, 8, 80), (3, 3, 80, 104), 2),
    "3x3, large map": Case((1, 190, 183, 3), (3, 3, 3, 8)),
}


def compared(case: Case) -> dict[str, Any]:
    """The value and both gradients."""
    side = case.kernel[0] // 2
    how = {
        "window_strides": (case.stride, case.stride),
        "padding": [(side, side)] * 2,
        "dimension_numbers": NHWC_HWIO,
        "feature_group_count": case.groups,
    }
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=case.images), rng.normal(size=case.kernel)

    def all_of_it(convolve: Any, x: Any, kernel: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, **how), x, kernel)
        return y, *pull(dy)

    shape = jax.eval_shape(lambda x, k: lax.conv_general_dilated(x, k, **how), x, kernel).shape
    dy = rng.normal(size=shape)
    names.clear()
    found = jax.jit(all_of_it, static_argnums=0)(
        conv_general_dilated, *(jnp.asarray(a, jnp.float32) for a in (x, kernel, dy))
    )
    found = jax.block_until_ready(found)
    with jax.enable_x64(True):
        operands = [jnp.asarray(a) for a in (x, kernel, dy)]
        wanted = all_of_it(lax.conv_general_dilated, *operands)
    pairs = zip(found, wanted, strict=True)
    return {"implementations": dict(names), "apart": [apart(*pair) for pair in pairs]}


def layer(case: Case) -> dict[str, Any]:
    """As inference has it."""
    side, stride = case.kernel[0] // 2, case.stride
    geometry = Geometry((stride, stride), (1, 1), (side, side), (side, side), case.groups)
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=case.images), rng.normal(size=case.kernel)
    with jax.enable_x64(True):
        wanted = lax.conv_general_dilated(
            jnp.asarray(x),
            jnp.asarray(kernel),
            (stride, stride),
            [(side, side)] * 2,
            dimension_numbers=NHWC_HWIO,
            feature_group_count=case.groups,
        )
    names.clear()
    of = Layer(case.images, case.kernel, wanted.shape, geometry)
    packed = onednn_layers.pack(of, kernel.astype(np.float32))
    found = onednn_layers.primitive.bind(jnp.asarray(x, jnp.float32), packed, layer=of)
    return {"implementations": dict(names), "apart": [apart(found, wanted)]}


def refused() -> list[str]:
    """A convolution and a norm in bfloat16."""
    x, kernel = jnp.ones((1, 8, 8, 16), jnp.bfloat16), jnp.ones((3, 3, 16, 16), jnp.bfloat16)
    geometry = Geometry((1, 1), (1, 1), (1, 1), (1, 1), 1)
    ones, signs = jnp.ones(16), jnp.ones(128, jnp.uint8)
    said = []
    for call in (
        lambda: onednn_convolution.convolution(x, kernel, geometry, (8, 8)),
        lambda: onednn_norm.gradient(x, x, ones, ones, ones, x, signs, epsilon=1e-5),
    ):
        try:
            jax.block_until_ready(call())
        except jax.errors.JaxRuntimeError as error:
            said.append(str(error))
    return said


def pooled() -> dict[str, Any]:
    """A max pool's gradient: whether the library is called for it, and how far it is off."""
    rng = np.random.default_rng(2)
    x, dy = rng.normal(size=(2, 9, 8, 16)), rng.normal(size=(2, 5, 4, 16))

    def gradient(x: Any, dy: Any) -> Any:
        return jax.vjp(lambda x: pooling.max_pool(x, 3, 2, 1), x)[1](dy)[0]

    single = [jnp.asarray(a, jnp.float32) for a in (x, dy)]
    program = jax.jit(gradient).lower(*single).compile()
    with jax.enable_x64(True):
        wanted = gradient(jnp.asarray(x), jnp.asarray(dy))
    calls = [call in program.as_text() for call in (onednn_pool._MAXIMA, onednn_pool._AT_PLACES)]
    return {"calls": calls, "apart": apart(program(*single), wanted)}


def apart(found: Any, wanted: Any) -> float:
    """The largest difference."""
    return float(np.abs(np.asarray(found) - np.asarray(wanted)).max() / np.abs(wanted).max())


names: dict[str, str] = {}
choose, plan, make_layer = onednn_choice.fastest, winograd.plan, winograd.layer


def noted(library: onednn.Library, describe: Any, kind: Any, *shape: Any) -> Any:
    """`onednn_choice.fastest`, of which `names` keeps what it chose."""
    description = choose(library, describe, kind, *shape)
    names[kind.name] = library.implementation(description)
    return description


def noted_plan(kind: Kind, *of: Any) -> Any:
    """`winograd.plan`, kept there too."""
    names[kind.name] = "winograd"
    return plan(kind, *of)


def noted_layer(*of: Any, **behind: Any) -> Any:
    """`winograd.layer`."""
    names["FORWARD"] = "winograd"
    return make_layer(*of, **behind)


def main() -> None:
    """Prints all of it."""
    onednn_choice.fastest = noted
    winograd.plan, winograd.layer = noted_plan, noted_layer
    of_cases = {name: compared(case) for name, case in CASES.items()}
    of_layers = {f"{name}, layer": layer(case) for name, case in CASES.items()}
    onednn_choice._MOST = 0
    without_memory = {"no memory": compared(Case((2, 9, 8, 88), (3, 3, 88, 104)))}
    everything = of_cases | of_layers | without_memory
    print(json.dumps({"compared": everything, "refused": refused(), "pooled": pooled()}))


if __name__ == "__main__":
    main()
