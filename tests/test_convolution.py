"""The CPU's formulations of convolution against `jax.lax.conv_general_dilated`.

Without oneDNN, which `test_onednn.py` is about.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from flaxcnn import convolution
from flaxcnn.convolution import conv_general_dilated
from flaxcnn.cpu import onednn

PADS = tuple[tuple[int, int], tuple[int, int]]


@pytest.fixture(scope="module", autouse=True)
def _without_onednn() -> Iterator[None]:
    jax.clear_caches()  # an earlier trace of the same case would not ask again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "available", lambda: False)
        yield
    jax.clear_caches()


class Case(NamedTuple):
    """One convolution and the name of the formulation that it should take on a CPU."""

    formulation: str
    image: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]
    strides: tuple[int, int] = (1, 1)
    padding: PADS | str = ((1, 1), (1, 1))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.formulation}-{self.image}-{self.kernel}-{self.strides}-{self.padding}"


NONE: PADS = ((0, 0), (0, 0))
TWO: PADS = ((2, 2), (2, 2))
CASES = [
    # Maps smaller than the kernel, as deep networks reach at 32 pixels.
    Case("_dot_per_output", (2, 1, 1, 6), (3, 3, 6, 5)),
    Case("_dot_per_output", (1, 2, 2, 6), (3, 3, 6, 8)),
    Case("_dot_per_output", (2, 1, 2, 5), (3, 3, 5, 7)),
    Case("_dot_per_output", (2, 4, 4, 6), (3, 3, 6, 5), (2, 2)),
    Case("_dot_per_output", (2, 3, 4, 6), (3, 3, 6, 5), (2, 2)),
    Case("_dot_per_output", (2, 4, 3, 6), (5, 5, 6, 3), padding=TWO),
    Case("_dot_per_output", (2, 5, 5, 6), (5, 5, 6, 4), padding=NONE),
    Case("_dot_per_output", (2, 4, 4, 6), (3, 3, 6, 5), padding=((0, 1), (1, 0)), strides=(2, 2)),
    Case("_dot_per_output", (2, 4, 3, 5), (3, 3, 5, 2), (2, 2), "SAME"),
    Case("_im2col", (1, 2, 2, 5), (3, 3, 5, 40)),
    Case("_im2col", (1, 5, 6, 5), (7, 7, 5, 3), padding=((3, 3), (3, 3))),
    # Small strided maps.
    Case("_im2col", (2, 8, 8, 6), (3, 3, 6, 5), (2, 2)),
    Case("_im2col", (2, 7, 9, 5), (3, 3, 5, 4), (2, 2)),
    Case("_im2col", (2, 9, 7, 5), (3, 3, 5, 4), (2, 1), ((0, 2), (1, 0))),
    Case("_im2col", (2, 9, 8, 5), (5, 5, 5, 4), (2, 2), TWO),
    Case("_im2col", (1, 23, 25, 5), (11, 11, 5, 4), (4, 4), TWO),
    Case("_im2col", (2, 9, 9, 5), (2, 2, 5, 4), (4, 4), NONE),  # steps over some of the image
    Case("_im2col", (2, 8, 8, 5), (3, 3, 5, 4), (2, 2), "SAME"),
    # 1x1.
    Case("_matrix_product", (2, 5, 6, 3), (1, 1, 3, 7), padding=NONE),
    Case("_matrix_product", (2, 7, 8, 6), (1, 1, 6, 5), (2, 2), NONE),
    Case("_matrix_product", (2, 9, 9, 6), (1, 1, 6, 5), (4, 2), NONE),
    # Grouped; the parts are plain, im2col, dots per output and products in turn.
    Case("_grouped", (2, 7, 7, 16), (3, 3, 4, 24), groups=4),
    Case("_grouped", (1, 6, 6, 96), (3, 3, 4, 48), groups=24),
    Case("_grouped", (2, 8, 8, 80), (3, 3, 40, 6), (2, 2), groups=2),
    Case("_grouped", (2, 2, 2, 64), (3, 3, 8, 16), groups=8),
    Case("_grouped", (2, 5, 5, 12), (1, 1, 4, 6), padding=NONE, groups=3),
    Case("_grouped", (2, 9, 9, 8), (3, 3, 4, 6), padding=TWO, dilation=(2, 2), groups=2),
    Case("_grouped", (2, 6, 6, 10), (5, 5, 1, 20), padding=TWO, groups=10),  # depth multiplier 2
    Case("_grouped", (2, 6, 6, 6), (3, 3, 2, 3), groups=3),
    # Depthwise.
    Case("_depthwise", (2, 7, 6, 5), (3, 3, 1, 5), groups=5),
    Case("_depthwise", (2, 8, 7, 5), (3, 3, 1, 5), (2, 2), groups=5),
    Case("_depthwise", (2, 9, 9, 5), (5, 5, 1, 5), (2, 1), ((2, 1), (0, 2)), groups=5),
    Case("_depthwise", (2, 9, 9, 5), (3, 3, 1, 5), padding=TWO, dilation=(2, 2), groups=5),
    Case("_depthwise", (2, 1, 1, 5), (5, 5, 1, 5), padding=TWO, groups=5),
    Case("_depthwise", (2, 2, 2, 5), (7, 7, 1, 5), padding=((3, 3), (3, 3)), groups=5),
    # Where nothing is gained, or the case is unusual.
    Case("_plain", (2, 9, 9, 5), (3, 3, 5, 4)),
    Case("_plain", (2, 3, 3, 5), (3, 3, 5, 4)),
    Case("_plain", (2, 16, 16, 3), (7, 7, 3, 4), (2, 2), ((3, 3), (3, 3))),
    Case("_plain", (1, 32, 32, 5), (3, 3, 5, 4), (2, 2)),
    Case("_plain", (2, 4, 4, 5), (3, 3, 5, 4), padding=TWO, dilation=(2, 2)),
]
UNUSUAL = [
    Case("", (2, 2, 2, 5), (3, 3, 5, 4), padding=((4, 0), (0, 4))),  # rows of padding alone
    Case("", (2, 6, 6, 5), (3, 3, 5, 4), padding=((-1, 1), (0, 1)), strides=(2, 2)),
]
REFORMULATED = [case for case in CASES if case.formulation != "_plain"]


# The tests are of the formulations, not of XLA's code generator: compile faster.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def both(case: Case) -> tuple[Any, Any]:
    """The library's convolution of (image, kernel), and the plain one."""
    settings: dict[str, Any] = {
        "window_strides": case.strides,
        "padding": case.padding,
        "rhs_dilation": case.dilation,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": case.groups,
    }
    return partial(conv_general_dilated, **settings), partial(lax.conv_general_dilated, **settings)


def operands(case: Case, dtype: Any = np.float32, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in (case.image, case.kernel))  # type: ignore[return-value]


def assert_close(actual: Any, desired: Any, relative: float) -> None:
    """Compares with the size of the largest element: single elements may cancel."""
    assert actual.shape == desired.shape
    assert actual.dtype == desired.dtype
    scale = float(jnp.abs(desired).max())
    np.testing.assert_allclose(actual, desired, rtol=0, atol=relative * scale)


@pytest.mark.parametrize("case", REFORMULATED + UNUSUAL, ids=str)
def test_values_and_gradients_equal_the_plain_convolution(case: Case) -> None:
    def values_and_gradients(convolve: Any, x: Any, kernel: Any) -> Any:
        y, back = jax.vjp(convolve, x, kernel)
        # The cotangent differs at each output, so that misplaced gradients show.
        return y, *back(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    with jax.enable_x64(True):
        compute = jax.jit(
            lambda x, kernel: [values_and_gradients(f, x, kernel) for f in both(case)],
            compiler_options=COMPILER_OPTIONS,
        )
        for a, b in zip(*compute(*operands(case, np.float64)), strict=True):
            assert_close(a, b, 1e-12)


def equations(jaxpr: Any) -> list[Any]:
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                found += equations(getattr(inner, "jaxpr", inner))
    return found


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_takes_the_formulation_meant(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in {case.formulation for case in CASES}:
        original = getattr(convolution, name)

        def spy(*args: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            taken.append(name)
            return original(*args, **more)

        monkeypatch.setattr(convolution, name, spy)
    ours, _ = both(case)
    jax.clear_caches()  # an earlier trace of the same case would not call again
    text = jax.jit(ours).lower(*operands(case)).as_text()
    if case.formulation == "_plain":
        assert taken == []  # called directly, without a choice by platform
        assert "cond" not in {
            e.primitive.name for e in equations(jax.make_jaxpr(ours)(*operands(case)))
        }
        assert text.count("stablehlo.convolution") == 1
        return
    assert case.formulation in taken
    if case.formulation != "_grouped":
        assert "stablehlo.convolution" not in text


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_lower_the_plain_convolution_alone(case: Case, platform: str) -> None:
    def operations(convolve: Any) -> dict[str, int]:
        lowered = jax.jit(convolve).trace(*operands(case)).lower(lowering_platforms=(platform,))
        names = re.findall(r"stablehlo\.\w+", lowered.as_text())
        return {name: names.count(name) for name in names}

    ours, plain = (operations(f) for f in both(case))
    for bookkeeping in ("case", "constant", "return"):  # of the choice, which XLA removes
        ours.pop(f"stablehlo.{bookkeeping}", None)
    assert ours == plain


@pytest.mark.parametrize("case", [c for c in REFORMULATED if c.groups == 1][::4], ids=str)
def test_gradients_lower_plain_for_tpu(case: Case) -> None:
    ours, _ = both(case)
    gradients = jax.grad(lambda x, kernel: ours(x, kernel).sum(), argnums=(0, 1))
    lowered = jax.jit(gradients).trace(*operands(case)).lower(lowering_platforms=("tpu",))
    assert "stablehlo.convolution" in lowered.as_text()
    assert "stablehlo.dot_general" not in lowered.as_text()


SAMPLES = [
    next(c for c in CASES if c.formulation == name)
    for name in ("_dot_per_output", "_im2col", "_matrix_product", "_grouped", "_depthwise")
]


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_jvp_float32_and_vmap(case: Case) -> None:
    def everything(convolve: Any, x: Any, kernel: Any) -> Any:
        images, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, 3 * kernel])
        return (
            *jax.jvp(convolve, (x, kernel), (jnp.cos(x), jnp.sin(kernel))),
            jax.vmap(convolve)(images, kernels),
            jax.vmap(convolve, (None, 0))(x, kernels),
        )

    compute = jax.jit(
        lambda *a: [everything(f, *a) for f in both(case)], compiler_options=COMPILER_OPTIONS
    )
    for a, b in zip(*compute(*operands(case)), strict=True):
        assert_close(a, b, 2e-6)  # the order of summation differs


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_checkpoint_and_no_jit(case: Case) -> None:
    ours, plain = both(case)
    x, kernel = operands(case)
    assert_close(ours(x, kernel), plain(x, kernel), 2e-6)

    def loss(convolve: Any, x: Any, kernel: Any) -> Any:
        return jnp.sum(convolve(x, kernel) ** 2)

    gradients = jax.jit(jax.grad(partial(loss, jax.checkpoint(ours)), argnums=(0, 1)))
    compiled = gradients.lower(x, kernel).compile()
    assert " conditional(" not in str(compiled.as_text())  # the branch is chosen before it runs
    wanted = jax.grad(partial(loss, plain), argnums=(0, 1))(x, kernel)
    for a, b in zip(compiled(x, kernel), wanted, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_pmap(case: Case) -> None:
    ours, plain = both(case)
    x, kernel = operands(case)
    assert_close(jax.pmap(ours, in_axes=(0, None))(x[None], kernel)[0], plain(x, kernel), 2e-6)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_bfloat16_accumulates_in_float32(case: Case) -> None:
    ours, plain = both(case)
    x, kernel = operands(case, jnp.bfloat16)

    def values_and_gradients(x: Any, kernel: Any) -> Any:
        y, back = jax.vjp(ours, x, kernel)
        return y, back(jnp.ones_like(y))

    for product in equations(jax.make_jaxpr(ours)(x, kernel)):
        if product.primitive.name == "dot_general":
            assert product.params["preferred_element_type"] == jnp.float32
    compute = jax.jit(values_and_gradients, compiler_options=COMPILER_OPTIONS)
    y, gradients = compute(x, kernel)
    assert {a.dtype for a in (y, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    exact = plain(x.astype(jnp.float32), kernel.astype(jnp.float32))
    # One rounding of the result, so half a unit in the last place of the largest element.
    assert_close(y.astype(jnp.float32), exact, float(jnp.finfo(jnp.bfloat16).eps) / 2)


@pytest.mark.parametrize("case", SAMPLES[:3], ids=str)
def test_precision_is_respected(case: Case) -> None:
    ours, _ = both(case)
    jaxpr = jax.make_jaxpr(partial(ours, precision=lax.Precision.HIGHEST))(*operands(case))
    products = [
        e for e in equations(jaxpr) if e.primitive.name in {"dot_general", "conv_general_dilated"}
    ]
    assert {e.primitive.name for e in products} == {"dot_general", "conv_general_dilated"}
    for product in products:
        assert product.params["precision"] == (lax.Precision.HIGHEST,) * 2


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = both(SAMPLES[0])
    monkeypatch.setattr(convolution, "PLAIN", True)
    x, kernel = operands(SAMPLES[0])
    assert str(jax.make_jaxpr(ours)(x, kernel)) == str(jax.make_jaxpr(plain)(x, kernel))


@pytest.mark.parametrize(
    ("image", "kernel", "settings"),
    [
        ((2, 4, 4, 4), (6, 4, 1, 1), {"dimension_numbers": None}),  # NCHW, OIHW
        (
            (2, 9, 5),
            (1, 5, 4),
            {"dimension_numbers": ("NWC", "WIO", "NWC"), "window_strides": (1,)},
        ),
        ((2, 4, 4, 5), (1, 1, 5, 4), {"lhs_dilation": (2, 2)}),
        ((4, 2, 2, 5), (3, 3, 5, 4), {"batch_group_count": 2}),
    ],
)
def test_other_layouts_and_arguments_pass_through(
    image: Any, kernel: Any, settings: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"window_strides": (1, 1), "padding": "SAME"} | settings
    arguments.setdefault("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    x, weights = (jnp.asarray(np.random.default_rng(0).normal(size=s)) for s in (image, kernel))
    if "lhs_dilation" in settings:
        arguments["padding"] = [(0, 0), (0, 0)]
    ours = jax.make_jaxpr(partial(conv_general_dilated, **arguments))(x, weights)
    plain = jax.make_jaxpr(partial(lax.conv_general_dilated, **arguments))(x, weights)
    assert str(ours) == str(plain)


def test_wrong_shapes_are_refused_as_by_lax() -> None:
    x, kernel = jnp.ones((1, 2, 2, 5)), jnp.ones((3, 3, 4, 4))
    ours, plain = both(SAMPLES[0])
    with pytest.raises(ValueError, match="feature") as expected:
        plain(x, kernel)
    with pytest.raises(ValueError, match="feature") as raised:
        ours(x, kernel)
    assert str(raised.value) == str(expected.value)


def test_pluggable_into_linen() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 6)), jnp.float32)
    ours, plain = (
        nn.Conv(4, (3, 3), padding=1, conv_general_dilated=f) for f in (conv_general_dilated, None)
    )
    variables = plain.init(jax.random.key(0), x)
    assert_close(ours.apply(variables, x), plain.apply(variables, x), 2e-6)
