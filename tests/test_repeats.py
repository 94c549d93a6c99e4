"""Calls of oneDNN that are made without Python, once Python has prepared them."""

import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processor import skip_unless_computed

import flaxcnn
from flaxcnn import pooling
from flaxcnn.convolution import conv_general_dilated
from flaxcnn.cpu import compiled, repeats, xla_handlers
from flaxcnn.cpu.plans import Addresses, Check, Condition, Plan
from flaxcnn.cpu.xla_handlers import Array
from flaxcnn.normalisation import normalised

# The package is complete without; where a compiler is, CI fails if nothing was compiled.
if compiled.library() is None:
    pytest.skip("no C compiler when flaxcnn was installed", allow_module_level=True)


@pytest.fixture
def by_python(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each call that reaches Python."""
    calls: list[int] = []
    read = xla_handlers._read

    def count(frame: int) -> Any:
        calls.append(frame)
        return read(frame)

    monkeypatch.setattr(xla_handlers, "_read", count)
    return calls


def assert_same(found: Any, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


# ------------------------------------------------------------------------------- what is computed
def convolutions(x: jax.Array, kernel: jax.Array) -> Any:
    """A value, both gradients in one call, and each by itself."""

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    return jax.grad(loss, (0, 1))(x, kernel), jax.grad(loss)(x, kernel), loss(x, kernel)


def norms(x: jax.Array, kernel: jax.Array) -> Any:
    scale = kernel[0, 0, 0].astype(jnp.float32)

    def loss(x: jax.Array, scale: jax.Array) -> jax.Array:
        y = normalised(x, scale, scale + 1, jnp.zeros_like(scale), epsilon=1e-5, relu=True).y
        return jnp.sum(y.astype(jnp.float32) ** 3)

    return jax.value_and_grad(loss, (0, 1))(x, scale)


def pools(x: jax.Array, kernel: jax.Array) -> Any:
    def loss(x: jax.Array) -> jax.Array:
        y = pooling.max_pool(x, 3, 2, 1)
        return jnp.sum(y.astype(jnp.float32) ** 3)

    return jax.value_and_grad(loss)(x)


PROGRAMS = [convolutions, norms, pools]


def operands(seed: int, dtype: Any, size: int) -> tuple[jax.Array, jax.Array]:
    """Of a size for each test, so that none finds what another has had prepared."""
    rng = np.random.default_rng(seed)
    x, kernel = rng.normal(size=(2, size, 13, 16)), rng.normal(size=(3, 3, 16, 16))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_same_without_python(
    program: Callable[..., Any], dtype: Any, by_python: list[int]
) -> None:
    """To the last bit, of other values than those that Python had."""
    skip_unless_computed(dtype)
    inputs = [operands(seed, dtype, 18) for seed in range(3)]
    function = jax.jit(program)
    with repeats.switched_off():
        wanted = [jax.device_get(function(*of)) for of in inputs]
    each = len(by_python) // 3
    assert len(by_python) == 3 * each > 0
    for of, result in zip(inputs, wanted, strict=True):
        assert_same(jax.device_get(function(*of)), result)
    assert len(by_python) == 4 * each  # the first of each is handed over


def test_a_network_without_python(by_python: list[int]) -> None:
    """Whole layers too, with a residual branch that is added in its place."""
    model = flaxcnn.create_model("resnet20", num_classes=3)
    x = jax.random.normal(jax.random.key(0), (3, 27, 25, 3))
    variables = model.init(jax.random.key(1), x, train=False)
    fast, prepared = flaxcnn.optimize_for_inference(model, variables, x)
    predict = jax.jit(lambda variables, x: fast.apply(variables, x, train=False))
    first = jax.device_get(predict(prepared, x))
    assert len(by_python) > 10
    del by_python[:]
    for scale in (1, 3):
        wanted = model.apply(variables, scale * x, train=False)
        found = jax.device_get(predict(prepared, scale * x))
        # What folding batch norm into kernels may change, as `tests/test_inference.py` has it.
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert by_python == []
    assert_same(jax.device_get(predict(prepared, x)), first)


def test_what_differs_in_numbers_or_sizes_alone(by_python: list[int]) -> None:
    """Calls of the same arrays by other numbers, and of other arrays of the same sizes."""
    x, kernel = operands(0, jnp.float32, 19)
    cases = [
        (shape, pad, dilation)
        for shape in ((2, 19, 13, 16), (2, 13, 19, 16), (1, 26, 19, 16))
        for pad, dilation in ((1, 1), (2, 2), (3, 3))
    ]

    def convolve(function: Any, shape: Any, pad: int, dilation: int) -> Any:
        padding, dilations = ((pad, pad),) * 2, (dilation, dilation)
        return function(
            x.reshape(shape),
            kernel,
            (1, 1),
            padding,
            rhs_dilation=dilations,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    programs = [jax.jit(lambda case=case: convolve(conv_general_dilated, *case)) for case in cases]
    for again in range(2):
        del by_python[:]
        for program, case in zip(programs, cases, strict=True):
            wanted = convolve(jax.lax.conv_general_dilated, *case)
            # Sums of 144 products in float32, of a size of ten; those of another case are that far.
            np.testing.assert_allclose(program(), wanted, rtol=0, atol=1e-4)
        assert len(by_python) == (0 if again else len(cases))


# ------------------------------------------------------------------------------------- the checks
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "least"])
@pytest.mark.parametrize("program", [norms, pools])
def test_what_is_not_usual_is_pythons(
    program: Callable[..., Any], value: Any, dtype: Any, by_python: list[int]
) -> None:
    skip_unless_computed(dtype)
    x, kernel = operands(0, dtype, 20)
    value = jnp.finfo(dtype).min if value == "least" else value
    strange = x.at[1, 7, 5, 3].set(value)
    function = jax.jit(program)
    with repeats.switched_off():
        wanted = jax.device_get(function(strange, kernel))
    for _ in range(2):
        jax.block_until_ready(function(x, kernel))
    del by_python[:]
    assert_same(jax.device_get(function(strange, kernel)), wanted)
    # An infinity is the maximum of its windows, and the library's own.
    assert len(by_python) == (0 if program is pools and value == np.inf else 1)


class Checked:
    """Calls that do nothing but check; when Python is asked, it says that the check fails."""

    def __init__(self) -> None:
        self.failed = 0
        xla_handlers.register("flaxcnn_test_checked", self._prepare)

    def _prepare(
        self, arguments: Sequence[Array], results: Sequence[Array], numbers: Sequence[int]
    ) -> Plan:
        del results
        condition, elements = Condition(numbers[0]), int(np.prod(arguments[0].shape))
        second = min(1, len(arguments) - 1)
        return Plan(
            [],
            before=[Check(condition, 0, second, elements, lambda _: False)],
            otherwise=self._fail,
        )

    def _fail(self, _: Addresses) -> None:
        self.failed += 1

    def holds(self, condition: Condition, *arrays: np.ndarray) -> bool:
        result = jax.ShapeDtypeStruct((1,), jnp.float32)
        call = jax.ffi.ffi_call("flaxcnn_test_checked", result)

        def check() -> int:
            operands = [jnp.asarray(a) for a in arrays]
            jax.block_until_ready(call(*operands, numbers=np.array([condition], np.int64)))
            return self.failed

        check()  # hands it over
        before = self.failed
        return check() == before


def test_checks() -> None:
    """As NumPy has it, at each place of an array of odd size."""
    checked = Checked()
    rng = np.random.default_rng(0)
    for dtype, condition in (
        (np.dtype(np.float32), Condition.USUAL_FLOAT32),
        (np.dtype(jnp.bfloat16), Condition.USUAL_BFLOAT16),
    ):
        least = jnp.finfo(dtype).min
        usual = [np.inf, 0.0, -0.0, jnp.finfo(dtype).max, jnp.finfo(dtype).tiny]
        for value in [*usual, np.nextafter(least, np.array(0, dtype))]:
            x = rng.normal(size=37).astype(dtype)
            x[rng.integers(37)] = value
            assert checked.holds(condition, x), value
        nan = np.array(np.nan, dtype)
        for place in (0, 17, 36):
            for value in (nan, -nan, -np.inf, least):
                x = rng.normal(size=37).astype(dtype)
                x[place] = value
                assert not checked.holds(condition, x), (value, place)
    ones = np.ones(37, np.float32)
    assert checked.holds(Condition.FINITE, ones, 1e30 * ones)
    assert not checked.holds(Condition.FINITE, 1e30 * ones, 1e30 * ones)
    for place in (0, 36):
        for value in (np.nan, np.inf):
            x = ones.copy()
            x[place] = value
            assert not checked.holds(Condition.FINITE, x, ones)
            assert not checked.holds(Condition.FINITE, ones, x)
    assert not checked.holds(Condition.SAME, ones, ones)


def test_calls_of_another_name() -> None:
    """Of the same arrays and numbers."""
    answered = []
    for name in ("flaxcnn_test_one", "flaxcnn_test_another"):

        def prepare(*_: Any, name: str = name) -> Plan:
            check = Check(Condition.SAME, 0, 1, 0, lambda _: False)
            return Plan([], before=[check], otherwise=lambda _: answered.append(name))

        xla_handlers.register(name, prepare if answered else lambda *_: Plan([]))
        call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((3,), jnp.float32))
        for _ in range(2):
            jax.block_until_ready(call(jnp.ones(3), numbers=np.zeros(1, np.int64)))
        answered.append(name)
    assert answered == ["flaxcnn_test_one", *["flaxcnn_test_another"] * 3]


def test_a_refusal_is_the_programs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = operands(0, jnp.float32, 30)
    plans: list[Plan] = []
    hand_over = repeats.repeat

    def keep(target: int, frame: int, plan: Plan) -> None:
        plans.append(plan)
        hand_over(target, frame, plan)

    monkeypatch.setattr(repeats, "repeat", keep)
    program = jax.jit(
        lambda x, kernel: conv_general_dilated(
            x, kernel, (5, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    wanted = jax.device_get(program(x, kernel))
    (plan,) = plans
    primitive = plan.words[5]
    plan.words[5] = 0
    errors = (jax.errors.JaxRuntimeError, ValueError)  # as JAX calls a program that it has
    with pytest.raises(errors, match="oneDNN answered 2 to a call that it took before"):
        jax.block_until_ready(program(x, kernel))
    plan.words[5] = primitive
    assert_same(jax.device_get(program(x, kernel)), wanted)


# ------------------------------------------------------------------------------ what is not there
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(compiled, "COMPILED", tmp_path / "libcompiled.so")
    assert compiled.library.__wrapped__() is None


def test_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """What was compiled is left alone when a source of it has changed since."""
    changed = tmp_path / "winograd.c"
    changed.write_text(compiled.SOURCES[1].read_text() + "\n")
    monkeypatch.setattr(compiled, "SOURCES", [compiled.SOURCES[0], changed])
    said = r"is not of repeats\.c and winograd\.c: install flaxcnn again"
    with pytest.warns(UserWarning, match=said):
        assert compiled.library.__wrapped__() is None


FULL = """
import ctypes
import jax, jax.numpy as jnp, numpy as np
from flaxcnn.convolution import conv_general_dilated
from flaxcnn.cpu import compiled, onednn_bilinear, repeats, xla_handlers as handlers
from flaxcnn.cpu.plans import Plan

plan, library = Plan([]), compiled.library()
number = ctypes.c_int64()
array = handlers._Array(0, 1, ctypes.pointer(number))
items = (ctypes.c_void_p * 1)(ctypes.addressof(array))
frame = handlers._Frame()
frame.attributes.items = ctypes.cast(items, ctypes.POINTER(ctypes.c_void_p))
kept = 0
for number.value in range(5000):
    kept += library.repeat(20, ctypes.addressof(frame), plan.words)
assert kept == 4096, kept
assert not library.repeat(20, ctypes.addressof(frame), plan.words)
number.value = 7  # which it has
assert not library.repeat(20, ctypes.addressof(frame), plan.words)

calls = []
read = handlers._read
handlers._read = lambda frame: calls.append(frame) or read(frame)
x, kernel = jnp.ones((1, 9, 9, 8)), jnp.ones((3, 3, 8, 8))
program = jax.jit(lambda x, k: conv_general_dilated(
    x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")))
for _ in range(3):
    assert np.all(program(x, kernel) == 72)
assert len(calls) == 3, calls
"""


def test_there_is_room_for_so_many() -> None:
    """Behind them Python makes the calls, as it would without this."""
    subprocess.run([sys.executable, "-c", FULL], check=True)
