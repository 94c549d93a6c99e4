"""Max pools by oneDNN against those in JAX's own functions, with all their derivatives."""

import platform
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from processor import skip_unless_computed

from flaxcnn import pooling
from flaxcnn.cpu import onednn, onednn_pool, pool_primitives
from flaxcnn.operators import max_places
from flaxcnn.operators.max_places import Windows

# Where the package is built for, it is a dependency: that it cannot be loaded there is a failure.
if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip(f"{onednn.PACKAGE} is for x86-64 Linux", allow_module_level=True)

NONE = ((0, 0), (0, 0))
# Where windows overlap their gradients are added in another order: at most nine float32 below 4.
OTHER_ORDER = 1e-5
CASES = [
    Windows(2, 2, NONE),
    Windows(3, 2, ((1, 1), (1, 1))),
    Windows(3, 2, ((0, 1), (0, 0))),
    Windows(3, 1, ((1, 1), (1, 1))),
    Windows(3, 1, ((2, 0), (0, 1))),
    Windows(2, 3, ((0, 1), (0, 0))),
    Windows(5, 3, ((2, 1), (1, 2))),
    Windows(4, 2, ((1, 2), (0, 3))),
]
by_jax = partial(pool_primitives.max_pool, how=(0, 0))
TYPES = [jnp.float32, jnp.bfloat16]


def with_ties(*shape: int) -> jax.Array:
    """Small integers, of which many windows hold equal ones."""
    return jnp.asarray(np.random.default_rng(0).integers(-2, 3, shape), jnp.float32)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("windows", CASES)
@pytest.mark.parametrize("channels", [1, 3, 16, 24])
@pytest.mark.parametrize("dtype", TYPES)
def test_maxima_and_places_are_the_same(windows: Windows, channels: int, dtype: Any) -> None:
    skip_unless_computed(dtype)
    x = with_ties(2, 9, 8, channels).astype(dtype)
    assert onednn_pool.suits(x.shape, windows)
    expected = max_places.maxima_and_places(x, windows)
    ours = pool_primitives._maxima.bind(x, windows=windows, how=None)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("windows", CASES)
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_gradient_is_the_same(windows: Windows, channels: int, dtype: Any) -> None:
    skip_unless_computed(dtype)
    x = with_ties(2, 9, 8, channels)
    dy = random(2, *windows.along(9, 8), channels).astype(dtype)

    def gradient(pool: Any, dtype: Any) -> np.ndarray:
        """Of gradients in that type; what it returns is a float32 of it."""
        _, pullback = jax.vjp(lambda x: pool(x, windows), x.astype(dtype))
        (dx,) = pullback(dy.astype(dtype))
        assert dx.dtype == dtype
        return np.asarray(dx, np.float32)

    ours, exact = gradient(pool_primitives.max_pool, dtype), gradient(by_jax, jnp.float32)
    if windows.stride >= windows.size:  # nothing is added
        np.testing.assert_array_equal(ours, exact)
    elif dtype == jnp.float32:
        np.testing.assert_allclose(ours, exact, rtol=0, atol=OTHER_ORDER)
    else:  # sums are rounded with each addition, those between 4 and 8 by up to 2^-6
        most = (-(-windows.size // windows.stride)) ** 2  # windows that see an element
        np.testing.assert_allclose(ours, exact, rtol=0, atol=most * 2**-6)


@pytest.mark.parametrize(
    ("windows", "dtype"),
    [*((windows, jnp.float32) for windows in CASES), *((w, jnp.bfloat16) for w in CASES[1:3])],
)
def test_other_derivatives(windows: Windows, dtype: Any) -> None:
    """Forward, by vmap, of a gradient, of a gradient's gradient, and with rematerialisation."""
    skip_unless_computed(dtype)
    x, dx = (a.astype(dtype) for a in (random(2, 9, 8, 16), with_ties(2, 9, 8, 16)))

    def derivatives(pool: Any, x: jax.Array, dx: jax.Array) -> Any:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(pool(x, windows)) ** 2)

        def of_gradient(x: jax.Array) -> jax.Array:
            return jnp.sum(jax.grad(loss)(x) ** 2)

        return (
            jax.jvp(lambda x: pool(x, windows), (x,), (dx,)),
            jax.linearize(lambda x: pool(x, windows), x)[1](dx),
            jax.vmap(jax.grad(loss))(jnp.stack([x, x[::-1]])),
            jax.vmap(lambda x: jax.grad(lambda x: jnp.sum(pool(x, windows)))(x))(x[None]),
            jax.vmap(lambda dx: jax.jvp(lambda x: pool(x, windows), (x,), (dx,))[1])(dx[None]),
            jax.vmap(lambda dy: jax.vjp(lambda x: pool(x, windows), x)[1](dy)[0])(
                2 * pool(dx, windows)[None]
            ),
            jax.vmap(partial(pool, windows=windows), 1, 1)(x[:, None]),
            jax.jvp(jax.grad(loss), (x,), (dx,)),
            jax.grad(of_gradient)(x),
            jax.grad(jax.checkpoint(loss))(x),
        )

    def by_platform(x: jax.Array, windows: Windows) -> jax.Array:
        return pooling._max_by_platform(x, windows)

    ours, plain = (jax.jit(partial(derivatives, pool))(x, dx) for pool in (by_platform, by_jax))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype == dtype
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        # Of gradients' gradients: squares, and what they are made of is in another order already;
        # in bfloat16 rounded in some steps.
        atol = 2e-4 if dtype == jnp.float32 else 2**-5 * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [np.nan, -np.nan, -np.inf, np.inf, "least"])
@pytest.mark.parametrize("windows", CASES)
def test_what_is_not_finite_is_as_it_was(windows: Windows, value: Any, dtype: Any) -> None:
    """Alone, and in whole windows: the library makes something else of NaN and of -inf."""
    skip_unless_computed(dtype)
    value = float(jnp.finfo(dtype).min) if value == "least" else value
    x = np.array(random(2, 9, 8, 16).astype(dtype))
    x[0, 4, 4, 3] = x[0, :, :, 5] = x[1, :6, :6, 7] = value
    expected = max_places.maxima_and_places(jnp.asarray(x), windows)
    ours = pool_primitives._maxima.bind(x, windows=windows, how=None)
    for a, b in zip(ours, expected, strict=True):
        # As float32: NumPy does not take NaN in bfloat16 for equal.
        np.testing.assert_array_equal(a.astype("float32"), b.astype("float32"))
    # Places in the padding too, which only whole windows of -inf have; they are nowhere.
    dy = np.array(with_ties(*expected[1].shape).astype(dtype))
    dy[0, 1, 1, 0], dy[1, 1, 1, 1] = np.nan, np.inf
    of = expected[1], jnp.asarray(dy)
    back = pool_primitives._at_places.bind(*of, windows=windows, image=(9, 8), how=None)
    back, wanted = back.astype("float32"), max_places.at_places(*of, windows, (9, 8))
    np.testing.assert_array_equal(back, wanted.astype("float32"))


def test_what_it_suits() -> None:
    assert onednn_pool.suits((1, 16, 16, 3), Windows(15, 1, NONE))
    assert not onednn_pool.suits((1, 16, 16, 3), Windows(16, 1, NONE))  # 256 places
    assert not onednn_pool.suits((0, 8, 8, 3), Windows(2, 2, NONE))
    assert not onednn_pool.suits((1, 1, 8, 3), Windows(2, 2, NONE))  # no window
    assert not onednn_pool.suits((1, 8, 8, 3), Windows(2, 2, ((0, 2), (0, 0))))  # of padding alone
    assert not onednn_pool.suits((1, 8, 8, 3), Windows(2, 2, ((2, 0), (0, 0))))
    assert not onednn_pool.suits((1, 8, 8, 3), Windows(2, 3, ((0, 0), (0, 3))))


@pytest.mark.parametrize(("window", "stride", "padding"), [(3, 2, 1), (3, 1, 1), (2, 2, 0)])
def test_max_pool_calls_it_where_it_is_faster(window: int, stride: int, padding: int) -> None:
    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(pooling.max_pool(x, window, stride, padding) ** 2))(x)

    image = jax.ShapeDtypeStruct((2, 9, 8, 3), jnp.float32)
    text = jax.jit(gradient).lower(image).as_text()
    assert text.count(onednn_pool._MAXIMA) == 1
    assert text.count(onednn_pool._AT_PLACES) == (0 if onednn.at_most_avx2() else 1)
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = jax.ShapeDtypeStruct((2, 9, 8, 3), dtype)
        called = "flaxcnn_onednn" in jax.jit(gradient).lower(narrow).as_text()
        assert called == onednn.computes(dtype)
    alone = jax.jit(lambda x: pooling.max_pool(x, window, stride, padding))
    assert "flaxcnn_onednn" not in alone.lower(image).as_text()  # in float32 XLA is as fast
    narrow = jax.ShapeDtypeStruct(image.shape, jnp.bfloat16)
    assert ("flaxcnn_onednn" in alone.lower(narrow).as_text()) == onednn.computes(jnp.bfloat16)


@pytest.mark.parametrize("sizes", ["n, 9, 8, 16", "2, h, w, 16"])
def test_programs_for_any_size_do_without(sizes: str) -> None:
    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.sin(pooling.max_pool(x, 3, 2))))(x)

    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes), jnp.float32)
    program = jax.export.export(jax.jit(gradient))(images)
    assert "flaxcnn_onednn" not in program.mlir_module()
    x = random(2, 9, 8, 16)
    np.testing.assert_allclose(program.call(x), gradient(x), rtol=0, atol=OTHER_ORDER)


def test_programs_of_several_platforms() -> None:
    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.sin(pooling.max_pool(x, 3, 2))))(x)

    traced = jax.jit(gradient).trace(jax.ShapeDtypeStruct((2, 9, 8, 16), jnp.float32))
    for platforms in (("cpu", "tpu"), ("cuda",), ("tpu",), ("cpu", "cuda")):
        text = traced.lower(lowering_platforms=platforms).as_text()
        assert ("flaxcnn_onednn" in text) == ("cpu" in platforms)


def test_switched_off_and_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    image = jax.ShapeDtypeStruct((2, 9, 8, 3), jnp.float32)

    def lowered() -> str:
        gradient = jax.grad(lambda x: jnp.sum(pooling.max_pool(x, 2, 2)))
        return jax.jit(gradient).lower(image).as_text()

    for module, name, value in ((pooling, "PLAIN", True), (onednn, "available", lambda: False)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            jax.clear_caches()
            assert "flaxcnn_onednn" not in lowered()
    jax.clear_caches()
    assert "flaxcnn_onednn" in lowered()


def test_other_types_are_refused() -> None:
    narrow = jnp.zeros((1, 4, 4, 3), jnp.float16)
    with pytest.raises(TypeError, match="float32 or bfloat16, not float16"):
        jax.vjp(lambda x: pool_primitives.max_pool(x, CASES[0]), narrow)
    with pytest.raises(ValueError, match="below 16"):
        jax.vjp(lambda x: pool_primitives.max_pool(x, Windows(16, 1, NONE)), random(1, 20, 20, 3))


def test_without_jit() -> None:
    x = random(2, 9, 8, 3)
    with jax.disable_jit():
        y, pullback = jax.vjp(lambda x: pool_primitives.max_pool(x, CASES[1]), x)
        (dx,) = pullback(y)
    plain, plain_pullback = jax.vjp(lambda x: by_jax(x, CASES[1]), x)
    np.testing.assert_array_equal(y, plain)
    np.testing.assert_allclose(dx, plain_pullback(plain)[0], rtol=0, atol=OTHER_ORDER)


def test_shard_map() -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x = random(8, 9, 8, 16)

    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.sin(pooling.max_pool(x, 3, 2, 1))))(x)

    def changes(x: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: pooling.max_pool(x, 3, 2, 1), (x,), (jnp.cos(x),))[1]

    for function in (gradient, changes):
        split = jax.shard_map(function, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
        np.testing.assert_allclose(jax.jit(split)(x), function(x), rtol=0, atol=OTHER_ORDER)


def test_shapes_that_do_not_fit_are_refused() -> None:
    """Of a program from a file, say: the library would go behind the end of an array."""
    x = random(2, 8, 8, 3)
    numbers = onednn_pool._numbers(CASES[0])

    def call(target: str, shapes: list[tuple[tuple[int, ...], Any]], *operands: Any) -> Any:
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        return jax.block_until_ready(jax.ffi.ffi_call(target, results)(*operands, numbers=numbers))

    small, usual = (2, 3, 4, 3), (2, 4, 4, 3)
    single, byte = jnp.float32, jnp.uint8
    y, place = call(onednn_pool._MAXIMA, [(usual, single), (usual, byte)], x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
        call(onednn_pool._MAXIMA, [(usual, single), (small, byte)], x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
        call(onednn_pool._MAXIMA, [(usual, jnp.bfloat16), (usual, byte)], x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
        call(onednn_pool._MAXIMA, [(usual, single), (usual, single)], x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="float32 and bfloat16 here"):
        call(onednn_pool._MAXIMA, [(usual, jnp.float16), (usual, byte)], x.astype(jnp.float16))
    with pytest.raises(jax.errors.JaxRuntimeError, match="oneDNN"):
        call(onednn_pool._MAXIMA, [(small, single), (small, byte)], x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
        call(onednn_pool._AT_PLACES, [(x.shape, single)], place[:, 1:], y)
    with pytest.raises(jax.errors.JaxRuntimeError, match="oneDNN"):
        call(onednn_pool._AT_PLACES, [((2, 9, 9, 9), single)], place, y)
