"""The products of dense layers against plain ones in float64, with all their derivatives."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from processor import skip_unless_computed

import flaxcnn
from flaxcnn import blocks, matrix_product
from flaxcnn.cpu import onednn, onednn_product
from flaxcnn.operators.bilinear import Kind

NUMBERS = (((1,), (0,)), ((), ()))
ROWS, KERNEL = (3, 1500), (1500, 1400)  # just large enough to be turned


def operands(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=ROWS), rng.normal(size=KERNEL)


def in_both(function: Any, *arrays: np.ndarray) -> tuple[Any, Any]:
    """`function(product, *arrays)` turned in float32, and plain in float64."""
    ours = partial(matrix_product.dot_general, dimension_numbers=NUMBERS)
    plain = partial(lax.dot_general, dimension_numbers=NUMBERS)
    single = [jnp.asarray(a, jnp.float32) for a in arrays]
    assert "dense_product" in str(jax.make_jaxpr(ours)(*single[:2]))
    found = jax.jit(partial(function, ours))(*single)
    with jax.enable_x64(True):
        wanted = jax.jit(partial(function, plain))(*(jnp.asarray(a, jnp.float64) for a in arrays))
    return found, wanted


def assert_close(found: Any, wanted: Any, relative: float) -> None:
    """Of the largest element; float32 sums of 1,500 products err by a few 1e-7 of it."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max())


def assert_rounded_once(found: Any, wanted: Any) -> None:
    """Summed exactly enough, and then rounded to bfloat16: by half of 2^-7."""
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        small = 1e-6 * np.abs(b).max()  # what float32 sums err, where terms cancel
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=small)


def test_values_and_gradients() -> None:
    def function(product: Any, x: Any, kernel: Any) -> Any:
        y, back = jax.vjp(product, x, kernel)
        # The cotangent differs at each output, so that misplaced gradients show.
        return y, *back(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    assert_close(*in_both(function, *operands()), relative=1e-6)


@pytest.mark.parametrize("product", ["onednn_product", "dense_product"])
def test_bfloat16_is_rounded_once(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value and both gradients."""
    if product == "onednn_product":
        skip_unless_computed(jnp.bfloat16)
    else:
        monkeypatch.setattr(onednn, "computes", lambda _: False)

    def function(product: Any, x: Any, kernel: Any) -> Any:
        y, back = jax.vjp(product, x, kernel)
        # Numbers that bfloat16 has, and that differ at neighbouring outputs.
        return y, *back((jnp.arange(y.size) % 13 - 6).astype(y.dtype).reshape(y.shape))

    narrow = [jnp.asarray(a, jnp.bfloat16) for a in operands()]
    ours = partial(matrix_product.dot_general, dimension_numbers=NUMBERS)
    assert product in str(jax.make_jaxpr(ours)(*narrow))
    found = jax.jit(partial(function, ours))(*narrow)
    with jax.enable_x64(True):
        double = [jnp.asarray(np.asarray(a, np.float64)) for a in narrow]
        plain = partial(lax.dot_general, dimension_numbers=NUMBERS)
        wanted = jax.jit(partial(function, plain))(*double)
    assert_rounded_once(found, wanted)


def test_derivatives_forward_and_of_derivatives() -> None:
    def function(product: Any, x: Any, kernel: Any, dx: Any, dkernel: Any) -> Any:
        def gradients(x: Any, kernel: Any) -> Any:
            return jax.grad(lambda *a: jnp.sum(jnp.square(product(*a))), (0, 1))(x, kernel)

        forward = jax.jvp(product, (x, kernel), (dx, dkernel))
        _, of_gradients = jax.jvp(gradients, (x, kernel), (dx, dkernel))  # forward over reverse
        _, back = jax.vjp(gradients, x, kernel)  # reverse over reverse
        return forward, of_gradients, back((dx, dkernel))

    assert_close(*in_both(function, *operands(), *operands(1)), relative=5e-6)


def test_vmap() -> None:
    def function(product: Any, x: Any, kernel: Any, more: Any) -> Any:
        rows = jnp.stack([x, more])
        return (
            jax.vmap(product, (0, None), out_axes=1)(rows, kernel),
            jax.vmap(product)(rows, jnp.stack([kernel, 3 * kernel])),
        )

    assert_close(*in_both(function, *operands(), operands(1)[0]), relative=1e-6)


@pytest.mark.parametrize("place", [0, 1])
def test_one_gradient_in_bfloat16(place: int) -> None:
    skip_unless_computed(jnp.bfloat16)
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in operands()]
    ours = partial(matrix_product.dot_general, dimension_numbers=NUMBERS)

    def loss(x: Any, kernel: Any) -> Any:
        y = ours(x, kernel)
        return jnp.vdot(y, (jnp.arange(y.size) % 13 - 6).astype(y.dtype))

    both = jax.jit(jax.grad(loss, (0, 1)))(*arrays)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss, place))(*arrays), both[place])


def test_by_xla_in_bfloat16() -> None:
    """Where oneDNN's product is batched, or its program is for another platform."""
    skip_unless_computed(jnp.bfloat16)
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in operands())
    ours = partial(matrix_product.dot_general, dimension_numbers=NUMBERS)
    rows = jnp.stack([x, 2 * x])
    found = jax.jit(jax.vmap(ours, (0, None)))(rows, kernel)
    assert_rounded_once([found], [np.asarray(rows, np.float64) @ np.asarray(kernel, np.float64)])
    gradients = jax.grad(lambda *a: jnp.sum(ours(*a) ** 2), (0, 1))
    traced = jax.jit(gradients).trace(x, kernel)
    assert "onednn" in traced.lower().as_text()
    for platform in ("tpu", "cuda"):
        assert "onednn" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_other_calls_of_onednn_are_refused() -> None:
    skip_unless_computed(jnp.bfloat16)
    x, kernel = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)

    def call(*arrays: Any, numbers: Any = (Kind.FORWARD,)) -> Any:
        result = jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)
        called = jax.ffi.ffi_call(onednn_product.TARGET, result)
        return called(*arrays, numbers=np.array(numbers, np.int64))

    assert call(x, kernel)[1, 3] == 3
    for arrays, numbers, said in (
        ((x, kernel), (Kind.FORWARD, 1), "ValueError"),
        ((x, kernel, kernel), (Kind.FORWARD,), "ValueError"),
        ((x, kernel), (4,), "ValueError"),
        ((x, kernel.astype(jnp.float32)), (Kind.FORWARD,), "compile the program here"),
        ((x, kernel[1:]), (Kind.FORWARD,), "oneDNN: dnnl_matmul"),
        ((x, kernel[None]), (Kind.FORWARD,), "ValueError"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=said):
            call(*arrays, numbers=numbers)


def test_many_rows_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "computes", lambda _: False)
    kernel = jnp.zeros(KERNEL, jnp.bfloat16)
    for rows, turned in ((128, True), (129, False)):
        ours = partial(matrix_product.dot_general, dimension_numbers=NUMBERS)
        program = str(jax.make_jaxpr(ours)(jnp.zeros((rows, KERNEL[0]), jnp.bfloat16), kernel))
        assert ("dense_product" in program) == turned


def test_many_rows_in_bfloat16() -> None:
    skip_unless_computed(jnp.bfloat16)
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((300, 1501), (1501, 1409)))
    ours = partial(matrix_product.dot_general, dimension_numbers=NUMBERS)
    found = jax.jit(lambda *a: jax.vjp(ours, *a)[1](ours(*a)))(x, kernel)
    assert "onednn_product" in str(jax.make_jaxpr(ours)(x, kernel))
    y = ours(x, kernel)
    exact = [np.asarray(a, np.float64) for a in (x, kernel, y)]
    wanted = exact[0] @ exact[1], exact[2] @ exact[1].T, exact[0].T @ exact[2]
    assert_rounded_once((y, *found), wanted)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_are_given_the_plain_product(platform: str) -> None:
    def gradients(x: jax.Array, kernel: jax.Array) -> Any:
        ours = partial(matrix_product.dot_general, dimension_numbers=NUMBERS)
        return jax.grad(lambda *a: jnp.sum(jnp.sin(ours(*a))), (0, 1))(x, kernel)

    arrays = [jnp.asarray(a, jnp.float32) for a in operands()]
    traced = jax.jit(gradients).trace(*arrays)
    theirs, cpu = (
        traced.lower(lowering_platforms=(p,)).as_text().count("stablehlo.optimization_barrier")
        for p in (platform, "cpu")
    )
    assert theirs == 0 < cpu


@pytest.mark.parametrize(
    ("rows", "kernel", "dtype", "options"),
    [
        ((1, 1500), KERNEL, jnp.float32, {}),
        ((65, 1500), KERNEL, jnp.float32, {}),
        (ROWS, (1500, 1300), jnp.float32, {}),
        ((1, 1500), KERNEL, jnp.bfloat16, {}),
        (ROWS, KERNEL, jnp.float16, {}),
        (ROWS, KERNEL, jnp.float32, {"precision": "highest"}),
        (ROWS, KERNEL, jnp.float32, {"preferred_element_type": jnp.float32}),
        ((2, 3, 1500), KERNEL, jnp.float32, {}),
    ],
)
def test_others_stay_plain(rows: Any, kernel: Any, dtype: Any, options: Any) -> None:
    numbers = (((len(rows) - 1,), (0,)), ((), ()))
    product = partial(matrix_product.dot_general, dimension_numbers=numbers, **options)
    program = str(jax.make_jaxpr(product)(jnp.zeros(rows, dtype), jnp.zeros(kernel, dtype)))
    assert "_product" not in program
    assert "dot_general" in program


@pytest.mark.parametrize("copies", [1, 2])
def test_dense_layers_take_it(copies: int) -> None:
    features = 1400 * copies
    layer = blocks.dense(
        features,
        kernel_init=blocks.uniform_fan_in(1500),
        copies=copies,
        dtype=jnp.float32,
        name="x",
    )
    x = jnp.tile(jnp.asarray(operands()[0], jnp.float32)[:, : 1500 // copies], (1, copies))
    variables = layer.init(jax.random.key(0), x)
    assert "dense_product" in str(jax.make_jaxpr(layer.apply)(variables, x))
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    wanted = np.float64(x) @ np.float64(kernel) + np.float64(bias)
    found = jax.jit(layer.apply)(variables, x)
    assert_close(found, wanted, relative=1e-6)


@pytest.mark.parametrize("batched", [False, True])
def test_shard_map(batched: bool) -> None:
    """Of replicated kernels the gradient is summed over the devices, once; of rows it is not."""
    (x, kernel), (more, _) = operands(), operands(1)
    rows = jnp.asarray((np.stack if batched else np.concatenate)([x, more]), jnp.float32)
    kernel = jnp.asarray(kernel, jnp.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def gradients(product: Any) -> Any:
        def of_both(x: Any, kernel: Any) -> Any:
            return jax.grad(lambda *a: jnp.sum(jnp.sin(product(*a))), (0, 1))(x, kernel)

        def of_each(rows: Any, kernel: Any) -> Any:
            of_rows, of_kernel = jax.vmap(of_both, (0, None))(rows, kernel)
            return of_rows, of_kernel.sum(0)

        return jax.jit(
            jax.shard_map(
                of_each if batched else of_both,
                mesh=mesh,
                in_specs=(split, whole),
                out_specs=(split, whole),
            )
        )

    ours = gradients(partial(matrix_product.dot_general, dimension_numbers=NUMBERS))
    plain = gradients(partial(lax.dot_general, dimension_numbers=NUMBERS))
    # A sine of sums around 40 has forty times their error.
    assert_close(ours(rows, kernel), plain(rows, kernel), relative=5e-5)
    reduced = [
        f.trace(rows, kernel).lower(lowering_platforms=("tpu",)).as_text().count("all_reduce")
        for f in (ours, plain)
    ]
    assert reduced[0] == reduced[1] > 0


def test_explicitly_sharded_arrays_stay_plain() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, kernel = (jnp.asarray(a, jnp.float32) for a in operands())
        x = jax.device_put(jnp.concatenate([x, x]), jax.sharding.PartitionSpec("data"))
        product = partial(matrix_product.dot_general, dimension_numbers=NUMBERS)
        gradient = jax.jit(jax.grad(lambda *a: jnp.sum(product(*a)), (0, 1)))(x, kernel)
        assert gradient[0].shape == x.shape
        assert "dense_product" not in str(jax.make_jaxpr(product)(x, kernel))


def test_summaries_count_the_products() -> None:
    one, three = (flaxcnn.summarize("alexnet", batch_size=size) for size in (1, 3))
    assert three.macs == 3 * one.macs
    assert [layer.kind for layer in three.layers] == [layer.kind for layer in one.layers]
