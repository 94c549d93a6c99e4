"""Convolutions by oneDNN against XLA's in float64, with all their derivatives."""

import os
import pathlib
import platform
import re
import subprocess
import sys
import threading
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from processor import skip_unless_computed

from flaxcnn import convolution
from flaxcnn.convolution import conv_general_dilated
from flaxcnn.cpu import onednn, onednn_bilinear, onednn_convolution
from flaxcnn.cpu.geometry import Geometry
from flaxcnn.operators.bilinear import Kind

PADS = tuple[tuple[int, int], tuple[int, int]]

# Where the package is built for, it is a dependency: that it cannot be loaded there is a failure.
if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip(f"{onednn.PACKAGE} is for x86-64 Linux", allow_module_level=True)


class Case(NamedTuple):
    """One convolution."""

    image: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]
    strides: tuple[int, int] = (1, 1)
    padding: PADS = ((1, 1), (1, 1))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


NONE: PADS = ((0, 0), (0, 0))
TWO: PADS = ((2, 2), (2, 2))
CASES = [
    Case((2, 9, 7, 16), (3, 3, 16, 32)),
    Case((3, 9, 8, 5), (3, 3, 5, 4), (2, 2)),
    Case((2, 16, 17, 3), (7, 7, 3, 6), (2, 2), ((3, 3), (3, 3))),
    Case((1, 23, 25, 3), (11, 11, 3, 8), (4, 4), TWO),
    Case((2, 9, 7, 5), (3, 3, 5, 4), (2, 1), ((0, 2), (1, 0))),
    Case((2, 14, 13, 6), (2, 2, 6, 5), (4, 4), NONE),  # steps over some of the image
    Case((2, 9, 9, 6), (3, 3, 6, 4), padding=TWO, dilation=(2, 2)),
    Case((4, 23, 23, 6), (1, 1, 6, 16), padding=NONE),
    Case((4, 33, 33, 16), (1, 1, 16, 5), (2, 2), NONE),
    Case((2, 9, 8, 24), (3, 3, 1, 24), groups=24),
    Case((2, 9, 9, 5), (5, 5, 1, 5), (2, 1), ((2, 1), (0, 2)), groups=5),
    Case((2, 7, 7, 32), (3, 3, 4, 64), groups=8),
    Case((1, 6, 6, 10), (5, 5, 1, 20), padding=TWO, groups=10),  # depth multiplier 2
    Case((2, 9, 9, 8), (3, 3, 4, 6), padding=TWO, dilation=(2, 2), groups=2),
]


def settings(case: Case) -> dict[str, Any]:
    return {
        "window_strides": case.strides,
        "padding": case.padding,
        "rhs_dilation": case.dilation,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": case.groups,
    }


def ours(case: Case) -> Any:
    return partial(conv_general_dilated, **settings(case))


def plain(case: Case) -> Any:
    return partial(lax.conv_general_dilated, **settings(case))


def operands(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=case.image), rng.normal(size=case.kernel)


def in_both(case: Case, function: Any, *arrays: np.ndarray) -> Any:
    """`function(convolve, *arrays)` by oneDNN in float32, and by XLA in float64."""
    single = [jnp.asarray(a, jnp.float32) for a in arrays]
    by_us = jax.jit(partial(function, ours(case)))
    assert "onednn_convolution" in str(jax.make_jaxpr(ours(case))(*single[:2]))
    found = by_us(*single)
    with jax.enable_x64(True):
        double = [jnp.asarray(a, jnp.float64) for a in arrays]
        wanted = jax.jit(partial(function, plain(case)))(*double)
    return found, wanted


def assert_close(actual: Any, desired: Any, relative: float) -> None:
    """Compares with the size of the largest element: single elements may cancel.

    float32 rounds at 6e-8, and errors of sums add up as the root of their length: a few 1e-7 for
    one convolution, ten times that where one is made of another's.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.shape == b.shape
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case) -> None:
    def function(convolve: Any, x: Any, kernel: Any) -> Any:
        y, back = jax.vjp(convolve, x, kernel)
        # The cotangent differs at each output, so that misplaced gradients show.
        return y, *back(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    assert_close(*in_both(case, function, *operands(case)), relative=1e-6)


def kinds(program: Any, *arrays: Any) -> list[int]:
    """Of the convolutions that the library is called for."""
    text = jax.jit(program).lower(*arrays).compile().as_text()
    calls = [line for line in text.splitlines() if f'"{onednn_convolution.TARGET}"' in line]
    # The first of several integers, or all of them, if they are the same.
    return [int(kind) for line in calls for kind in re.findall(r"numbers = dense<\[?(\d)", line)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_both_gradients_in_one_call(case: Case, dtype: Any) -> None:
    """The same as each by itself, and only where both are asked for, if not depthwise."""
    skip_unless_computed(dtype)
    arrays = [jnp.asarray(a, dtype) for a in operands(case)]
    dy = jnp.sin(jnp.arange(ours(case)(*arrays).size)).astype(dtype)

    def loss(x: Any, kernel: Any) -> Any:
        return jnp.vdot(ours(case)(x, kernel).astype(dtype), dy)

    both = jax.grad(loss, (0, 1))
    apart = [Kind.FIRST_GRADIENT, Kind.SECOND_GRADIENT]
    depthwise = case.groups == case.image[3] == case.kernel[3]
    expected = apart if depthwise else [onednn_bilinear.BOTH_GRADIENTS]
    assert sorted(kinds(both, *arrays)) == expected
    found = jax.jit(both)(*arrays)
    for place, kind in enumerate(apart):
        one = jax.grad(loss, place)
        assert kinds(one, *arrays) == [kind]
        np.testing.assert_array_equal(jax.jit(one)(*arrays), found[place])


def test_transposes_of_both() -> None:
    """Of both gradients in the value's, and of a change in each that it is linear in."""
    case = CASES[1]
    x, kernel, dx, dkernel = (
        jnp.asarray(a, jnp.float32) for a in (*operands(case), *operands(case, 1))
    )
    y, dy = jax.jvp(ours(case), (x, kernel), (dx, dkernel))
    _, back = jax.vjp(ours(case), x, kernel)
    (again,) = jax.linear_transpose(back, y)((dx, dkernel))
    assert_close(again, dy, relative=1e-6)
    for place in (0, 1):
        (along,) = jax.linear_transpose(lambda dy, place=place: back(dy)[place], y)(
            (dx, dkernel)[place]
        )
        wanted = ours(case)(dx, kernel) if place == 0 else ours(case)(x, dkernel)
        assert_close(along, wanted, relative=1e-6)

    def changed(x: Any, kernel: Any, dx: Any, dkernel: Any) -> Any:
        return jax.jvp(ours(case), (x, kernel), (dx, dkernel))[1]

    none, nothing = jnp.zeros_like(x), jnp.zeros_like(kernel)
    of_x, of_kernel = back(y)
    for place, others, wanted in (
        (2, (x, kernel, None, nothing), of_x),
        (3, (x, kernel, none, None), of_kernel),
        (0, (None, kernel, none, kernel), of_x),
        (1, (x, None, x, nothing), of_kernel),
    ):

        def of_one(value: Any, place: int = place, others: Any = others) -> Any:
            return changed(*(value if i == place else a for i, a in enumerate(others)))

        (found,) = jax.linear_transpose(of_one, (x, kernel, x, kernel)[place])(y)
        assert_close(found, wanted, relative=1e-6)


def test_in_a_loop() -> None:
    """The derivatives of what is carried are arrays from the beginning."""
    x, kernel = (jnp.asarray(a, jnp.float32) for a in operands(Case((2, 9, 7, 8), (3, 3, 8, 8))))

    def loss(convolve: Any, x: Any, kernel: Any) -> Any:
        def again(x: Any, _: Any) -> Any:
            return jnp.sin(convolve(x, kernel)), None

        return jnp.sum(lax.scan(again, x, length=3)[0] ** 2)

    case = Case(x.shape, kernel.shape)
    found, wanted = (
        jax.jit(jax.grad(partial(loss, convolve), (0, 1)))(x, kernel)
        for convolve in (ours(case), plain(case))
    )
    assert_close(found, wanted, relative=1e-4)  # both float32; sines of sums of hundreds


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_is_rounded_once(case: Case) -> None:
    """The value and both gradients, each summed exactly enough and then rounded: half of 2^-7."""
    skip_unless_computed(jnp.bfloat16)

    def function(convolve: Any, x: Any, kernel: Any) -> Any:
        y, back = jax.vjp(convolve, x, kernel)
        # Numbers that bfloat16 has, and that differ at neighbouring outputs.
        return y, *back((jnp.arange(y.size) % 13 - 6).astype(y.dtype).reshape(y.shape))

    narrow = [jnp.asarray(a, jnp.bfloat16) for a in operands(case)]
    assert "onednn_convolution" in str(jax.make_jaxpr(ours(case))(*narrow))
    found = jax.jit(partial(function, ours(case)))(*narrow)
    with jax.enable_x64(True):
        double = [jnp.asarray(np.asarray(a, np.float64)) for a in narrow]
        wanted = jax.jit(partial(function, plain(case)))(*double)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        small = 1e-6 * np.abs(b).max()  # what float32 sums err, where terms cancel
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=small)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_derivatives_forward_and_of_derivatives(case: Case) -> None:
    def function(convolve: Any, x: Any, kernel: Any, dx: Any, dkernel: Any) -> Any:
        def loss(x: Any, kernel: Any) -> Any:
            return jnp.sum(jnp.sin(convolve(x, kernel)))

        def gradients(x: Any, kernel: Any) -> Any:
            return jax.grad(loss, argnums=(0, 1))(x, kernel)

        forward = jax.jvp(convolve, (x, kernel), (dx, dkernel))
        _, of_gradients = jax.jvp(gradients, (x, kernel), (dx, dkernel))  # forward over reverse
        _, back = jax.vjp(gradients, x, kernel)  # reverse over reverse
        return forward, of_gradients, back((dx, dkernel))

    assert_close(*in_both(case, function, *operands(case), *operands(case, 1)), relative=2e-5)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_vmap(case: Case) -> None:
    def function(convolve: Any, x: Any, kernel: Any, more: Any) -> Any:
        def gradient(x: Any, kernel: Any) -> Any:
            return jax.grad(lambda k: jnp.sum(convolve(x, k) ** 2))(kernel)

        images, kernels = jnp.stack([x, more]), jnp.stack([kernel, 3 * kernel])
        return (
            jax.vmap(convolve)(images, kernels),
            jax.vmap(convolve, (0, None), out_axes=1)(images, kernel),
            jax.vmap(gradient, (0, None))(images, kernel),
        )

    assert_close(*in_both(case, function, *operands(case), operands(case, 1)[0]), relative=2e-6)


def test_checkpoint_pmap_and_no_jit() -> None:
    case = CASES[0]
    x, kernel = (jnp.asarray(a, jnp.float32) for a in operands(case))

    def loss(convolve: Any, x: Any, kernel: Any) -> Any:
        return jnp.sum(convolve(x, kernel) ** 2)

    wanted = jax.grad(partial(loss, plain(case)), argnums=(0, 1))(x, kernel)
    again = jax.grad(partial(loss, jax.checkpoint(ours(case))), argnums=(0, 1))(x, kernel)
    assert_close(list(again), list(wanted), relative=2e-6)
    many = jax.pmap(ours(case), in_axes=(0, None))(jnp.stack([x] * 8), kernel)
    for one in many:
        np.testing.assert_array_equal(one, many[0])
    assert_close(many[0], ours(case)(x, kernel), relative=1e-6)


def test_it_is_there() -> None:
    assert onednn.available()
    assert onednn.version().startswith("3.")


@pytest.mark.parametrize(
    ("settings", "usable"),
    [
        ({"OMP_DYNAMIC": "true"}, False),
        ({"OMP_THREAD_LIMIT": "1"}, False),
        ({"OMP_MAX_ACTIVE_LEVELS": "0"}, False),
        ({"OMP_DYNAMIC": "true", "OMP_NUM_THREADS": "1"}, True),
        ({"OMP_NUM_THREADS": "3"}, True),
    ],
)
def test_threads_that_may_not_come(settings: dict[str, str], usable: bool) -> None:
    """The library divides its work among as many as OpenMP names, and would wait for them."""
    question = "from flaxcnn.cpu import onednn; print(onednn.available())"
    environment = {"OMP_NUM_THREADS": "2", **os.environ, **settings}
    answer = subprocess.run(
        [sys.executable, "-c", question],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == [str(usable)]


@pytest.mark.parametrize(
    ("settings", "policy", "rounds"),
    [
        ({}, "ACTIVE", "1000"),
        ({"OMP_WAIT_POLICY": "passive"}, "PASSIVE", "0"),
        ({"GOMP_SPINCOUNT": "77"}, "PASSIVE", "77"),  # what is displayed where none is given
    ],
)
def test_how_long_threads_wait(settings: dict[str, str], policy: str, rounds: str) -> None:
    """As the user says, else briefly; what this process starts has the environment it had."""
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    question = (
        "import os; from flaxcnn.cpu import onednn; onednn.available();"
        f"print(*(os.environ.get(name) for name in {names}))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in names}
    answer = subprocess.run(
        [sys.executable, "-c", question],
        env={**environment, "OMP_DISPLAY_ENV": "verbose", **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == [settings.get(name, "None") for name in names]
    assert f"OMP_WAIT_POLICY = '{policy}'" in answer.stderr
    assert f"GOMP_SPINCOUNT = '{rounds}'" in answer.stderr


@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_other_platforms_lower_without(target: str) -> None:
    x, kernel = (jnp.asarray(a, jnp.float32) for a in operands(CASES[0]))
    gradients = jax.grad(lambda x, kernel: ours(CASES[0])(x, kernel).sum(), argnums=(0, 1))
    text = jax.jit(gradients).trace(x, kernel).lower(lowering_platforms=(target,)).as_text()
    assert "onednn" not in text
    assert "stablehlo.convolution" in text


def test_it_is_traced_once_for_all_platforms() -> None:
    """But where other platforms are told more than oneDNN: they are to be as exact as they were."""
    x, kernel = (jnp.asarray(a, jnp.float32) for a in operands(CASES[0]))
    assert "platform_index" not in str(jax.make_jaxpr(ours(CASES[0]))(x, kernel))
    exact = jax.jit(partial(ours(CASES[0]), precision="highest")).trace(x, kernel)
    assert "HIGHEST" in exact.lower(lowering_platforms=("tpu",)).as_text()
    assert "onednn" in exact.lower(lowering_platforms=("cpu",)).as_text()


def test_one_program_for_two_platforms() -> None:
    x, kernel = (jnp.asarray(a, jnp.float32) for a in operands(CASES[0]))
    gradients = jax.grad(lambda x, kernel: jnp.sum(ours(CASES[0])(x, kernel) ** 2), argnums=(0, 1))
    traced = jax.jit(gradients).trace(x, kernel)
    text = traced.lower(lowering_platforms=("cpu", "tpu")).as_text()
    assert "onednn" in text
    assert "stablehlo.convolution" in text


def test_shard_map() -> None:
    """Of replicated kernels the gradient is summed over the devices."""
    x, kernel = (jnp.asarray(a, jnp.float32) for a in operands(CASES[0]))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def gradients(convolve: Any) -> Any:
        def loss(x: Any, kernel: Any) -> Any:
            return jax.lax.psum(jnp.sum(jnp.sin(convolve(x, kernel))), "data")

        def of_kernel(x: Any, kernel: Any) -> Any:
            return jax.grad(loss, argnums=1)(x, kernel)

        def of_both(x: Any, kernel: Any) -> Any:
            return jax.grad(loss, argnums=(0, 1))(x, kernel)

        over = partial(jax.shard_map, mesh=mesh, in_specs=(split, whole))
        alone = jax.jit(over(of_kernel, out_specs=whole))(x, kernel)
        return alone, *jax.jit(over(of_both, out_specs=(split, whole)))(x, kernel)

    found, wanted = gradients(ours(CASES[0])), gradients(plain(CASES[0]))
    # Both are float32, and a sine of sums around 12 has twelve times their error.
    assert_close(found, wanted, relative=1e-5)


def test_other_types_are_refused() -> None:
    geometry = Geometry((1, 1), (1, 1), (1, 1), (1, 1), 1)
    x, kernel = jnp.ones((1, 8, 8, 4), jnp.float16), jnp.ones((3, 3, 4, 4), jnp.float16)
    with pytest.raises(TypeError, match="float32 or bfloat16 alone, not float16 and float16"):
        onednn_convolution.convolution(x, kernel, geometry, (8, 8))
    with pytest.raises(TypeError, match="not float16 and float32"):
        onednn_convolution.convolution(x, kernel.astype(jnp.float32), geometry, (8, 8))


def test_the_same_from_many_threads_and_every_time() -> None:
    """The library's memory is shared: two calls at once would mix their kernels."""
    cases = CASES[:4]

    def program(case: Case) -> Any:
        return jax.jit(jax.grad(lambda kernel, x: jnp.sum(ours(case)(x, kernel) ** 2), (0, 1)))

    programs = [program(case) for case in cases]
    inputs = [[jnp.asarray(a, jnp.float32) for a in reversed(operands(c))] for c in cases]
    wanted = [jax.device_get(f(*a)) for f, a in zip(programs, inputs, strict=True)]
    wrong = []

    def work(number: int) -> None:
        for _ in range(20):
            found = jax.device_get(programs[number](*inputs[number]))
            if not all(map(np.array_equal, found, wanted[number])):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_error_is_the_programs_error() -> None:
    """The library refuses what does not fit together, and no address is read."""
    geometry = Geometry((1, 1), (1, 1), (1, 1), (1, 1), 1)
    with pytest.raises(RuntimeError, match="oneDNN: dnnl_convolution_forward"):
        onednn_convolution._plan(
            Kind.FORWARD,
            geometry.as_numbers(),
            ((1, 8, 8, 4), (3, 3, 4, 4), (1, 5, 5, 4)),
            "f4",
        )
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    program = jax.jit(lambda x, k: onednn_convolution.convolution(x, k, geometry, (5, 5)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="dnnl_convolution_forward"):
        program(x, kernel).block_until_ready()


def test_calls_of_other_versions_or_types_are_refused() -> None:
    geometry = Geometry((1, 1), (1, 1), (1, 1), (1, 1), 1)
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    call = jax.ffi.ffi_call(onednn_convolution.TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
    numbers = [Kind.FORWARD, *geometry.as_numbers()]
    assert call(x, kernel, numbers=np.array(numbers, np.int64)).shape == x.shape
    with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
        call(x, kernel.astype("bfloat16"), numbers=np.array(numbers, np.int64))
    with pytest.raises(jax.errors.JaxRuntimeError, match="ValueError"):
        call(x, kernel, numbers=np.array([*numbers, 1], np.int64))
    for arrays in ((x,), (x, kernel, kernel)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="ValueError"):
            call(*arrays, numbers=np.array(numbers, np.int64))


def test_gradients_of_other_shapes_are_refused() -> None:
    geometry = Geometry((1, 1), (1, 1), (1, 1), (1, 1), 1)
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    numbers = np.array((onednn_bilinear.BOTH_GRADIENTS, *geometry.as_numbers()), np.int64)

    def call(*gradients: jax.Array) -> Any:
        results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in gradients]
        return jax.ffi.ffi_call(onednn_convolution.TARGET, results)

    assert call(x, kernel)(x, kernel, x, numbers=numbers)[1].shape == kernel.shape
    for wrong in ((x, kernel[..., 1:]), (x[1:], kernel), (x.astype("bfloat16"), kernel)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
            call(*wrong)(x, kernel, x, numbers=numbers)
    with pytest.raises(jax.errors.JaxRuntimeError, match="compile the program here"):
        call(x, kernel)(x, kernel, x.astype("bfloat16"), numbers=numbers)
    with pytest.raises(jax.errors.JaxRuntimeError, match="oneDNN: dnnl_convolution_forward"):
        call(x, kernel)(x, kernel, x[:, 1:], numbers=numbers)


def test_where_it_is_faster() -> None:
    def taken(image: Any, kernel: Any, dtype: Any = jnp.float32, **more: Any) -> bool:
        arguments = settings(Case(image, kernel, **more))
        program = jax.make_jaxpr(partial(conv_general_dilated, **arguments))
        return "onednn" in str(program(jnp.ones(image, dtype), jnp.ones(kernel, dtype)))

    assert taken((2, 9, 9, 4), (3, 3, 4, 4))
    assert not taken((2, 9, 9, 4), (3, 3, 4, 4), jnp.float16)
    assert taken((2, 9, 9, 4), (3, 3, 4, 4), jnp.bfloat16) == onednn.computes(jnp.bfloat16)
    assert not taken((2, 2, 2, 4), (3, 3, 4, 4))  # a map smaller than the kernel
    few_rows = ((8, 7, 7, 4), (1, 1, 4, 4))
    assert not taken(*few_rows, padding=NONE)
    assert taken(*few_rows, jnp.bfloat16, padding=NONE) == onednn.computes(jnp.bfloat16)
    assert taken((2, 32, 32, 4), (1, 1, 4, 4), padding=NONE)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = (jnp.asarray(a, jnp.float32) for a in operands(CASES[0]))
    monkeypatch.setattr(convolution, "PLAIN", True)
    assert str(jax.make_jaxpr(ours(CASES[0]))(x, kernel)) == str(
        jax.make_jaxpr(plain(CASES[0]))(x, kernel)
    )


def test_bfloat16_is_computed_where_the_processor_can() -> None:
    flags = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert onednn.computes(jnp.bfloat16) == ("avx512_bf16" in flags)


def test_derivatives_in_bfloat16() -> None:
    """Forward, of the gradient, over another axis, with `jax.checkpoint`, and not compiled."""
    case = CASES[0]
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in operands(case))

    def loss(convolve: Any, x: Any, kernel: Any) -> Any:
        return jnp.sum(jnp.square(convolve(x, kernel).astype(jnp.float32)))

    def found(convolve: Any) -> Any:
        gradients = jax.grad(partial(loss, jax.checkpoint(convolve)), argnums=(0, 1))
        return (
            convolve(x, kernel),
            jax.jvp(convolve, (x, kernel), (x, kernel)),
            jax.jvp(gradients, (x, kernel), (x, kernel)),
            jax.vmap(convolve, (0, None))(jnp.stack([x, 2 * x]), kernel),
        )

    by_us, by_xla = found(ours(case)), found(plain(case))
    for a, b in zip(jax.tree.leaves(by_us), jax.tree.leaves(by_xla), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        # Both are rounded in each of up to three steps.
        np.testing.assert_allclose(a, b, rtol=0, atol=2**-6 * np.abs(b).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_program_for_any_batch(dtype: Any) -> None:
    """Is plain: what suits depends on the size."""
    (batch,) = jax.export.symbolic_shape("b")
    arguments = settings(Case((1, 7, 7, 4), (1, 1, 4, 4), padding=NONE))
    convolve = jax.jit(partial(conv_general_dilated, **arguments))
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((batch, 7, 7, 4), (1, 1, 4, 4))]
    program = jax.export.export(convolve)(*shapes)
    x, kernel = jnp.ones((3, 7, 7, 4), dtype), jnp.ones((1, 1, 4, 4), dtype)
    np.testing.assert_array_equal(program.call(x, kernel), jnp.full((3, 7, 7, 4), 4, dtype))


def test_bfloat16_needs_instructions_for_it() -> None:
    """Where the library may not use them it would be slower than float32."""
    question = (
        "from flaxcnn.cpu import onednn; print(*(onednn.computes(t) for t in ('bfloat16', 'f4')))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", question],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == ["False", "True"]


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn.library.cache_clear()
    monkeypatch.setattr(onednn, "PACKAGE", "no-such-package")
    try:
        assert not onednn.available()
        monkeypatch.undo()
        monkeypatch.setattr(sys, "platform", "darwin")
        onednn.library.cache_clear()
        assert not onednn.available()
    finally:
        monkeypatch.undo()
        onednn.library.cache_clear()
