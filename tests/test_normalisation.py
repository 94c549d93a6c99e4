"""Batch norm in training by oneDNN against its formula in float64, with all its derivatives."""

import math
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from processor import skip_unless_computed

from flaxcnn import blocks, normalisation
from flaxcnn.cpu import norm_primitives, onednn, onednn_norm
from flaxcnn.normalisation import normalised
from flaxcnn.operators.moments import normalised_plainly

# Where the package is built for, it is a dependency: that it cannot be loaded there is a failure.
if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip(f"{onednn.PACKAGE} is for x86-64 Linux", allow_module_level=True)

EPSILON = 1e-3
PLAIN = normalised_plainly


class Case(NamedTuple):
    """One norm; more than 8192 values per channel are summed up by XLA."""

    shape: tuple[int, ...]
    relu: bool


CASES = [
    Case(shape, relu)
    for shape in ((2, 5, 7, 16), (3, 9, 4, 24), (2, 1, 1, 16), (2, 65, 67, 16))
    for relu in (True, False)
]
NARROW = [case for case in CASES if case.shape[-1] % 16 == 0]  # in bfloat16 of sixteens alone


def operands(case: Case) -> tuple[np.ndarray, ...]:
    """x, scale, bias and about what the mean is; float64."""
    rng = np.random.default_rng(sum(case.shape))
    channels = case.shape[-1]
    mean = rng.normal(0.7, 1.0, channels)
    x = rng.normal(mean, rng.uniform(0.5, 3.0, channels), case.shape)
    near = mean + rng.normal(0, 0.1, channels)
    return x, rng.uniform(-1, 2, channels), rng.normal(0, 1, channels), near


def changes(case: Case) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(1)
    return tuple(rng.normal(size=a.shape) for a in operands(case)[:3])


Function = Callable[..., tuple[jax.Array, ...]]  # of x, scale and bias


def function(how: Any, case: Case, near: Any) -> Function:
    return lambda *of: tuple(how(*of, near, epsilon=EPSILON, relu=case.relu))


def loss(f: Function) -> Callable[..., jax.Array]:
    """Which wants a gradient of y, of the mean and of the variance."""
    return lambda *of: sum((jnp.sum(a * jnp.cos(a)) for a in f(*of)), jnp.zeros(()))


def assert_equal_to_float64(
    case: Case, quantity: Callable[[Function, Any, Any], Any], relative: float
) -> None:
    """`quantity` of a function, its arguments and changes of them; by oneDNN, and exactly."""
    of, by = operands(case), changes(case)
    single = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), (of, by))
    found = quantity(function(normalised, case, single[0][3]), single[0][:3], single[1])
    with jax.enable_x64(True):
        double = jax.tree.map(jnp.asarray, (of, by))
        wanted = quantity(function(PLAIN, case, double[0][3]), double[0][:3], double[1])
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == jnp.float32
        largest = np.abs(b).max()
        assert largest > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * largest)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case) -> None:
    def quantity(f: Function, of: Any, by: Any) -> Any:
        y, gradients = jax.vjp(f, *of)
        return y, gradients((by[0], 0 * y[1], 0 * y[2])), jax.grad(loss(f), (0, 1, 2))(*of)

    assert_equal_to_float64(case, jax.jit(quantity, static_argnums=0), 5e-6)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_derivatives_forward_and_of_derivatives(case: Case) -> None:
    def forward(f: Function, of: Any, by: Any) -> Any:
        return jax.jvp(f, of, by)

    def forward_of_gradient(f: Function, of: Any, by: Any) -> Any:
        return jax.jvp(jax.grad(loss(f), (0, 1, 2)), of, by)[1]

    def gradient_of_gradient(f: Function, of: Any, by: Any) -> Any:
        def total(*of: Any) -> Any:
            return jnp.vdot(jax.grad(loss(f))(*of), by[0])

        return jax.grad(total, (0, 1, 2))(*of)

    assert_equal_to_float64(case, forward, 2e-6)
    assert_equal_to_float64(case, forward_of_gradient, 1e-5)
    assert_equal_to_float64(case, gradient_of_gradient, 3e-5)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_vmap_and_checkpoint(case: Case) -> None:
    def several(f: Function, of: Any, by: Any) -> Any:
        x = jnp.stack([of[0], of[0] + by[0]])
        return jax.vmap(jax.grad(loss(f), (0, 1, 2)), (0, None, None))(x, *of[1:])

    def kept(f: Function, of: Any, by: Any) -> Any:
        return jax.jit(jax.grad(jax.checkpoint(loss(f)), (0, 1, 2)))(*of)

    def of_scale_alone(f: Function, of: Any, by: Any) -> Any:
        return jax.grad(loss(f), 1)(*of)

    for quantity in (several, kept, of_scale_alone):
        assert_equal_to_float64(case, quantity, 5e-6)


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_in_bfloat16(case: Case) -> None:
    """Of arrays that are rounded already: maps are rounded once, statistics stay in float32."""
    skip_unless_computed(jnp.bfloat16)
    x, scale, bias, near = operands(case)
    dx = changes(case)[0]
    x, dx, dy = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, dx, dx[::-1]))
    scale, bias, near = (np.asarray(a, np.float32) for a in (scale, bias, near))

    def quantity(how: Any, narrow: Any, wide: Any) -> Any:
        f = function(how, case, jnp.asarray(near, wide))
        of = [jnp.asarray(x, narrow), jnp.asarray(scale, wide), jnp.asarray(bias, wide)]
        y, pull = jax.vjp(lambda *of: f(*of), *of)
        zero = jnp.zeros(case.shape[-1:], wide)
        changed = jax.jvp(lambda x: f(x, *of[1:]), (of[0],), (jnp.asarray(dx, narrow),))[1]
        return y, pull((jnp.asarray(dy, narrow), zero, zero)), changed

    found = quantity(normalised, jnp.bfloat16, jnp.float32)
    with jax.enable_x64(True):
        wanted = quantity(PLAIN, jnp.float64, jnp.float64)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        narrow = b.ndim == 4
        assert a.dtype == (jnp.bfloat16 if narrow else jnp.float32)
        largest = np.abs(b).max()
        assert largest > 0
        rounding = 2**-8 if narrow else 0  # half of the last of eight bits
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rounding, atol=5e-6 * largest)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7, 16), (2, 65, 67, 16)])
def test_other_derivatives_in_bfloat16(shape: tuple[int, ...], relu: bool) -> None:
    """Of all results, forward, of derivatives, with vmap and checkpoint, and not compiled."""
    skip_unless_computed(jnp.bfloat16)
    case = Case(shape, relu)
    of, by = operands(case), changes(case)
    x, dx = (jnp.asarray(a, jnp.bfloat16) for a in (of[0], by[0]))
    scale, bias, near, dscale, dbias = (jnp.asarray(a, jnp.float32) for a in (*of[1:], *by[1:]))
    point, change = (x, scale, bias), (dx, dscale, dbias)

    def wide(how: Any) -> Function:
        return lambda *of: tuple(a.astype("float32") for a in function(how, case, near)(*of))

    def derivatives(how: Any) -> Any:
        gradient = jax.grad(loss(wide(how)), (0, 1, 2))
        return (
            gradient(*point),
            jax.jvp(wide(how), point, change),
            jax.jvp(gradient, point, change),
            jax.vmap(gradient, (0, None, None))(jnp.stack([x, x + dx]), scale, bias),
            jax.grad(jax.checkpoint(loss(wide(how))), (0, 1, 2))(*point),
        )

    found, wanted = (jax.jit(derivatives, static_argnums=0)(how) for how in (normalised, PLAIN))
    with jax.disable_jit():
        found, wanted = (
            (of, jax.grad(loss(wide(how)), (0, 1, 2))(*point))
            for of, how in ((found, normalised), (wanted, PLAIN))
        )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        # Both are rounded in up to three steps.
        np.testing.assert_allclose(a, b, rtol=0, atol=2**-6 * np.abs(b).max())


def test_where_a_relu_is_at_zero_it_passes_no_gradient() -> None:
    """As `jax.nn.relu`; a scale of zero makes all y the bias."""
    case = CASES[0]
    x, _, _, near = (jnp.asarray(a, jnp.float32) for a in operands(case))
    zeros = jnp.zeros(case.shape[-1])
    gradients = jax.grad(lambda *of: jnp.sum(function(normalised, case, near)(*of)[0]), (0, 1, 2))
    for gradient in gradients(x, zeros, zeros):
        np.testing.assert_array_equal(gradient, 0)


def test_gradients_of_many_values() -> None:
    """The library's sums of 800 000 values: 1e-5 of them, as torch's."""
    case = Case((16, 224, 224, 8), True)

    def quantity(f: Function, of: Any, by: Any) -> Any:
        return jax.grad(lambda *of: jnp.vdot(f(*of)[0], by[0] + 0.5), (1, 2))(*of)

    assert_equal_to_float64(case, jax.jit(quantity, static_argnums=0), 3e-5)


def test_the_variance_of_many_values_is_exact() -> None:
    """Added one after the other they would cost 1e-5 of it."""
    rng = np.random.default_rng(0)
    x = rng.normal(5.0, 2.0, (2, 224, 224, 8)).astype(np.float32)
    ones = jnp.ones(8)
    _, mean, var = normalised(jnp.asarray(x), ones, ones, 5 * ones, epsilon=EPSILON, relu=True)
    np.testing.assert_allclose(mean, x.mean((0, 1, 2), np.float64), rtol=3e-7)
    np.testing.assert_allclose(var, x.var((0, 1, 2), np.float64), rtol=1e-6)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("about", [1.0, 0.9, 0.0])
def test_of_many_values_far_from_zero(relu: bool, about: float) -> None:
    """Thirty deviations, and what the mean is said to be about is right, a tenth off, or zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(30.0, 1.0, (2, 224, 224, 8)).astype(np.float32)
    ones = jnp.ones(8)
    near = 30 * about * ones
    y, _, var = normalised(jnp.asarray(x), ones, ones, near, epsilon=EPSILON, relu=relu)
    exact = x.astype(np.float64)
    exact_var = exact.var((0, 1, 2))
    wanted = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact_var + EPSILON) + 1
    np.testing.assert_allclose(var, exact_var, rtol=1e-6)
    # The mean is near 30, where float32 has steps of 2e-6: a few of them.
    np.testing.assert_allclose(y, np.maximum(wanted, 0) if relu else wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, jnp.float32) for case in CASES), *((case, jnp.bfloat16) for case in NARROW)],
    ids=str,
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(case: Case, dtype: Any, value: float) -> None:
    """The library's ReLU makes zeros of NaN; a training that diverged would go on, unseen."""
    skip_unless_computed(dtype)
    x, scale, bias, near = (jnp.asarray(a, jnp.float32) for a in operands(case))
    x = x.at[0, 0, 0, 3].set(value).astype(dtype)
    scale = scale.at[5].set(np.nan).at[6].set(np.inf)
    bias = bias.at[6].set(-np.inf)
    found = function(normalised, case, near)(x, scale, bias)
    wanted = function(PLAIN, case, near)(x, scale, bias)
    assert not np.isfinite(found[0][..., 3]).any()
    assert not np.isfinite(found[0][..., 5:7]).any()
    others = [c for c in range(case.shape[-1]) if c != 6]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.isfinite(a[..., others]), np.isfinite(b[..., others]))


# Of large maps without a ReLU all is XLA's: the formula, by which such a channel is its bias.
BY_LIBRARY = [case for case in CASES if case.relu or math.prod(case.shape[:3]) <= 8192]


@pytest.mark.parametrize("case", BY_LIBRARY, ids=str)
def test_a_variance_that_is_too_large_is_seen(case: Case) -> None:
    """The library would give the bias, and no gradient: a network that goes on without a branch."""
    x, scale, bias, near = (jnp.asarray(a, jnp.float32) for a in operands(case))
    x = x.at[..., 3].multiply(1e20)
    y, _, var = function(normalised, case, near)(x, scale, bias)
    assert np.isinf(var[3])
    finite = np.isfinite(y).all((0, 1, 2))
    assert finite.tolist() == [channel != 3 for channel in range(case.shape[-1])]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("scale_of", "bias_of"), [(np.inf, 0.0), (0.0, np.inf), (3e38, 3e38)])
def test_scales_that_are_not_finite_or_large(case: Case, scale_of: float, bias_of: float) -> None:
    """Without a warning, which would be an error here; what is large and finite is no NaN."""
    x, scale, bias, near = (jnp.asarray(a, jnp.float32) for a in operands(case))
    at = 3
    y, _, _ = function(normalised, case, near)(
        x, scale.at[at].set(scale_of), bias.at[at].set(bias_of)
    )
    others = [channel for channel in range(case.shape[-1]) if channel != at]
    assert np.isfinite(y[..., others]).all()
    if scale_of == 3e38:
        assert not np.isnan(y).any()
    else:
        assert not np.isfinite(y[..., at]).any()


# ------------------------------------------------------------------------------ where it is used
def program(case: Case, dtype: Any = jnp.float32, maps: Any = None) -> Any:
    """The gradient of a norm, traced; `maps` is their type if it is not `dtype`."""
    of = [jnp.asarray(a, dtype) for a in operands(case)]
    of[0] = of[0].astype(maps or dtype)
    return jax.jit(jax.grad(loss(function(normalised, case, of[3])), (0, 1, 2))).trace(*of[:3])


CALLED = onednn_norm._VALUE
CALL = f"custom_call @{CALLED}"


def calls(case: Case, **options: Any) -> int:
    return int(program(case, **options).lower().as_text().count(CALL))


def test_maps_of_eights_of_channels_alone() -> None:
    assert calls(Case((2, 5, 7, 16), True)) == 2
    assert calls(Case((2, 65, 67, 8), False)) == 1  # the value by XLA
    assert calls(Case((2, 5, 7, 12), True)) == 0
    assert calls(Case((5, 16), True)) == 0
    assert calls(Case((2, 5, 7, 16), True), dtype=jnp.bfloat16) == 0
    assert calls(Case((2, 5, 7, 16), True), maps=jnp.float16) == 0
    narrow = 2 if onednn.computes(jnp.bfloat16) else 0
    assert calls(Case((2, 5, 7, 16), True), maps=jnp.bfloat16) == narrow
    assert calls(Case((2, 5, 7, 24), True)) == 2
    assert calls(Case((2, 5, 7, 24), True), maps=jnp.bfloat16) == 0  # of sixteens in bfloat16


@pytest.mark.parametrize("relu", [True, False])
def test_other_platforms_lower_without(relu: bool) -> None:
    traced = program(Case((2, 5, 7, 16), relu))
    assert "onednn" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "onednn" in traced.lower(lowering_platforms=("cpu", "tpu")).as_text()


@pytest.mark.parametrize("relu", [True, False])
def test_elsewhere_gradients_are_those_of_the_formula(relu: bool) -> None:
    """In float64, of what a program for another platform computes; signs are nothing there."""
    case = Case((2, 5, 7, 16), relu)
    with jax.enable_x64(True):
        *of, near = map(jnp.asarray, operands(case))
        by = [jnp.asarray(a) for a in changes(case)]
        dy = by[0][::-1]
        (_, mean, var), pullback = jax.vjp(function(PLAIN, case, near), *of)
        wanted = pullback((dy, 0 * mean, 0 * var))
        of_relu = (of[2], jnp.zeros(1, jnp.uint8)) if relu else ()
        kept = (of[0], of[1], mean, var, *of_relu)
        # 1e-12: float64 rounds at 1e-16, and these are sums of 70 values, in another order.
        found = norm_primitives._gradient_plainly(dy, *kept, epsilon=EPSILON)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())
        # And how y changes with all three, of which the gradient is the transpose: <Jv, dy> is
        # <v, J'dy>, to the same rounding.
        changed = norm_primitives._tangent_plainly(*by, *kept, epsilon=EPSILON)
        products = [jnp.vdot(a, b) for a, b in zip(by, wanted, strict=True)]
        np.testing.assert_allclose(jnp.vdot(changed, dy), sum(products), rtol=1e-12)


@pytest.mark.parametrize("relu", [True, False])
def test_it_is_traced_once_for_all_platforms(relu: bool) -> None:
    """JAX would derive a choice by platform in all its branches, at twice the time to trace."""
    assert "platform_index" not in str(program(Case((2, 5, 7, 16), relu)).jaxpr)


def test_switched_off_and_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    with monkeypatch.context() as patch:
        patch.setattr(normalisation, "PLAIN", True)
        assert calls(case) == 0
    with monkeypatch.context() as patch:
        patch.setattr(onednn, "available", lambda: False)
        assert calls(case) == 0
    assert calls(case) == 2


def test_other_types_are_refused() -> None:
    ones = jnp.ones(8, jnp.bfloat16)
    with pytest.raises(TypeError, match="float32 alone"):
        norm_primitives.normalised(jnp.ones((2, 3, 3, 8)), ones, ones, ones, 1e-5, True)
    ones = ones.astype(jnp.float32)
    with pytest.raises(TypeError, match="of float32 or bfloat16"):
        norm_primitives.normalised(
            jnp.ones((2, 3, 3, 8), jnp.float16), ones, ones, ones, 1e-5, True
        )


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_shard_map(case: Case) -> None:
    """Each device its own statistics; of replicated scales the gradient is summed over them."""
    x, scale, bias, near = (jnp.asarray(a, jnp.float32) for a in operands(case))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def gradient(how: Any) -> Any:
        def total(*of: Any) -> Any:
            return jax.lax.psum(loss(function(how, case, near))(*of), "data")

        return jax.jit(
            jax.shard_map(
                jax.grad(total, (0, 1, 2)),
                mesh=mesh,
                in_specs=(split, whole, whole),
                out_specs=(split, whole, whole),
            )
        )(x, scale, bias)

    for found, wanted in zip(gradient(normalised), gradient(PLAIN), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6 * np.abs(wanted).max())


def test_scales_that_differ_between_devices() -> None:
    """And images that do not: what comes of both differs."""
    x, scale, bias, near = (jnp.asarray(a, jnp.float32) for a in operands(CASES[0]))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def total(how: Any) -> Any:
        def of_one(x: Any, scales: Any) -> Any:
            return loss(function(how, CASES[0], near))(x, scales[0], bias)[None]

        spread = jax.shard_map(of_one, mesh=mesh, in_specs=(whole, split), out_specs=split)
        return jax.jit(spread)(x, jnp.stack([scale, 2 * scale]))

    np.testing.assert_allclose(total(normalised), total(PLAIN), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 7, 16), (2, 0, 7, 16)])
def test_of_nothing_there_are_no_statistics(shape: tuple[int, ...]) -> None:
    ones = jnp.ones(16)
    for statistic in normalised(jnp.zeros(shape), ones, ones, ones, epsilon=EPSILON, relu=True)[1:]:
        assert np.isnan(statistic).all()


@pytest.mark.parametrize("sizes", ["b, 5, 7, 16", "2, h, 7, 16", "2, 5, w, 16", "b, h, w, 16"])
def test_programs_for_any_size_stay_plain(sizes: str) -> None:
    shape = jax.export.symbolic_shape(sizes)
    x, ones = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((16,), jnp.float32)
    f = partial(normalised, epsilon=EPSILON, relu=True)
    exported = jax.export.export(jax.jit(f))(x, ones, ones, ones)
    assert CALL not in exported.mlir_module()


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_without_jit(case: Case) -> None:
    def quantity(f: Function, of: Any, by: Any) -> Any:
        del by
        return jax.grad(loss(f), (0, 1, 2))(*of)

    with jax.disable_jit():
        assert_equal_to_float64(case, quantity, 5e-6)


def test_arrays_that_are_not_the_librarys_are_refused() -> None:
    """A program from a file may come from a processor on which signs take more bytes."""
    x, scale, bias, _ = (jnp.asarray(a, jnp.float32) for a in operands(CASES[0]))
    (size,) = onednn_norm.signs_shape(x, EPSILON)
    usual = [x, scale, bias, jnp.zeros(size, jnp.uint8)]  # y, mean, var and signs

    def call(results: Any, *of: jax.Array) -> None:
        jax.block_until_ready(onednn_norm._call(CALLED, results, *of, epsilon=EPSILON, relu=True))

    call(usual, x, scale, bias)
    with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
        jax.block_until_ready(
            onednn_norm.gradient(
                x.astype("bfloat16"), x, scale, scale, bias, x, usual[3], epsilon=EPSILON
            )
        )
    double = jnp.zeros(2 * size, jnp.uint8)
    for place, wrong in ((0, x[:1]), (0, x.astype("bfloat16")), (1, scale[:8]), (3, double)):
        results = [wrong if i == place else result for i, result in enumerate(usual)]
        with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
            call(results, x, scale, bias)
    with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
        call(usual, x, scale.astype("bfloat16"), bias)
    with pytest.raises(jax.errors.JaxRuntimeError, match="flaxcnn_onednn_norm"):
        call(usual[:3], x, scale, bias)  # no signs


# ------------------------------------------------------------------------------- blocks.norm_relu
def variables_of(case: Case) -> tuple[jax.Array, dict[str, Any]]:
    x, scale, bias, mean = (jnp.asarray(a, jnp.float32) for a in operands(case))
    stats = {"mean": mean, "var": jnp.abs(scale)}
    return x, {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_a_batch_norm_is_the_formula(
    monkeypatch: pytest.MonkeyPatch, case: Case, relu: bool, dtype: Any
) -> None:
    """The output, and both running statistics."""
    x, variables = variables_of(case)
    norm = blocks.BatchNorm(use_running_average=False, dtype=dtype)

    def apply(x: jax.Array) -> Any:
        method = blocks.norm_relu if relu else None
        return norm.apply(variables, x, mutable=["batch_stats"], method=method)

    def text() -> str:
        return str(jax.jit(apply).lower(x).as_text())

    found = jax.jit(apply)(x.astype(dtype))
    assert (CALL in text()) is (relu or case == CASES[0])
    monkeypatch.setattr(normalisation, "PLAIN", True)
    jax.clear_caches()
    assert CALL not in text()
    wanted = jax.jit(apply)(x.astype(dtype))
    assert found[0].dtype == dtype
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        rounding = 2**-7 if a.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), rounding, 1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_of_narrow_maps_a_norm_in_float32_is_not_rounded(case: Case) -> None:
    x, variables = variables_of(case)
    norm = blocks.BatchNorm(use_running_average=False)
    x = x.astype(jnp.bfloat16)
    narrow, wide = (
        norm.apply(variables, of, mutable=["batch_stats"]) for of in (x, x.astype("float32"))
    )
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)
    assert narrow[0].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_of_another_type_stay_plain(dtype: Any) -> None:
    x, variables = variables_of(CASES[0])
    variables = jax.tree.map(lambda a: a.astype(dtype), variables)
    norm = blocks.BatchNorm(use_running_average=False)
    y, _ = norm.apply(variables, x, mutable=["batch_stats"], method=blocks.norm_relu)
    same = jax.tree.map(lambda a: a.astype(jnp.float32), variables)
    wanted, _ = norm.apply(same, x, mutable=["batch_stats"], method=blocks.norm_relu)
    np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_of_narrow_parameters_statistics_are_in_float32() -> None:
    """As of the same numbers in float32."""
    x, variables = variables_of(Case((2, 65, 67, 16), True))
    norm = blocks.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)
    x = x.astype(jnp.bfloat16)
    variables = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    same = jax.tree.map(lambda a: a.astype(jnp.float32), variables)
    (y, changed), (wanted, wanted_changed) = (
        norm.apply(v, x, mutable=["batch_stats"], method=blocks.norm_relu)
        for v in (variables, same)
    )
    for a, b in zip(*map(jax.tree.leaves, (changed, wanted_changed)), strict=True):
        assert a.dtype == jnp.float32
        # The running ones that are kept are multiplied in bfloat16.
        np.testing.assert_allclose(a, b, rtol=2**-7)
    assert y.dtype == jnp.bfloat16
    y, wanted = (np.asarray(a, np.float64) for a in (y, wanted))
    np.testing.assert_allclose(y, wanted, rtol=2**-7, atol=1e-5)


def test_norms_made_of_batch_norms_are_called_as_they_are() -> None:
    class Own(blocks.BatchNorm):
        """With one argument."""

        @nn.compact
        # Without `relu`, as norms of users are: what is tested.
        def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
            return -super().__call__(x)

    x, variables = variables_of(CASES[0])
    alone = blocks.BatchNorm(use_running_average=False)
    plain, _ = alone.apply(variables, x, mutable=["batch_stats"])
    for kind, sign in ((Own, -1), (nn.remat(blocks.BatchNorm), 1), (nn.jit(blocks.BatchNorm), 1)):
        norm = kind(use_running_average=False)
        y, _ = norm.apply(variables, x, mutable=["batch_stats"], method=blocks.norm_relu)
        np.testing.assert_allclose(y, np.maximum(sign * plain, 0), atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axis", [None, "device"])
@pytest.mark.parametrize("activation", [nn.relu, nn.silu], ids=lambda f: f.__name__)
def test_norm_act_is_the_norm_and_then_the_activation(
    train: bool, dtype: Any, axis: str | None, activation: Any
) -> None:
    x, scale, bias, mean = (jnp.asarray(a, jnp.float32) for a in operands(CASES[0]))
    norm = blocks.BatchNorm(use_running_average=not train, dtype=dtype, axis_name=axis)
    params = {"scale": scale, "bias": bias}
    stats = {"mean": mean, "var": jnp.abs(scale)}

    def apply(method: Any, x: jax.Array) -> Any:
        """The output and the new statistics, and the gradients of x and of the parameters."""

        def total(params: Any, x: jax.Array) -> Any:
            variables = {"params": params, "batch_stats": stats}
            y, changed = norm.apply(variables, x, mutable=["batch_stats"], method=method)
            return jnp.sum(jnp.square(y.astype("float32"))), (y, changed)

        gradients, found = jax.grad(total, (0, 1), has_aux=True)(params, x)
        return *found, gradients

    over = jax.vmap if axis is None else partial(jax.pmap, axis_name=axis)
    of = x.astype(dtype)[:, None]
    together = over(partial(apply, lambda norm, x: blocks.norm_act(norm, x, activation)))(of)
    apart = over(partial(apply, lambda norm, x: activation(norm(x))))(of)
    y, wanted = together[0], apart[0]
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(y.astype("float32"), wanted.astype("float32"), atol=tolerance)
    if activation is nn.relu:
        assert float(y.min()) == 0
    for a, b in zip(*map(jax.tree.leaves, (together[1], apart[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    # Sums: of bfloat16, which has 8 bits, each of some hundred numbers is rounded once or twice.
    rounding = 1e-5 if dtype == jnp.float32 else 2**-7
    for a, b in zip(*map(jax.tree.leaves, (together[2], apart[2])), strict=True):
        a, b = a.astype("float32"), b.astype("float32")
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding * np.abs(b).max())


def test_norm_relu_trains_by_one_call_each_way() -> None:
    norm = blocks.BatchNorm(use_running_average=False)
    x = jnp.asarray(operands(CASES[0])[0], jnp.float32)
    variables = norm.init(jax.random.key(0), x)

    def total(params: Any, x: jax.Array) -> jax.Array:
        y, _ = norm.apply(
            {**variables, "params": params},
            x,
            mutable=["batch_stats"],
            method=lambda norm, x: blocks.norm_relu(norm, x),
        )
        return jnp.sum(y**2)

    text = jax.jit(jax.grad(total, (0, 1))).lower(variables["params"], x).as_text()
    assert text.count(CALL) == 2
    assert "stablehlo.rsqrt" not in text
