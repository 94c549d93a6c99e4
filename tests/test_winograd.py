"""3x3 convolutions by minimal filtering, against JAX's own in float64.

On any processor with AVX2: the plans are called as they are, with numpy's arrays.
"""

import itertools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flaxcnn.cpu import compiled, onednn, onednn_layers, repeats, winograd
from flaxcnn.cpu.geometry import Geometry
from flaxcnn.cpu.onednn_convolution import NHWC_HWIO
from flaxcnn.cpu.onednn_layers import Activation, Layer
from flaxcnn.operators.bilinear import PLACES, Kind, Shapes

# Where a compiler is, CI fails if nothing was compiled.
if compiled.library() is None or not onednn.available():
    pytest.skip("no C compiler when flaxcnn was installed, or no oneDNN", allow_module_level=True)
if "avx2" not in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
    pytest.skip("the processor has no AVX2", allow_module_level=True)

ONE, FLOAT32 = (1, 1), np.dtype(np.float32)


@pytest.fixture(autouse=True)
def _of_avx2_and_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor has."""
    monkeypatch.setattr(onednn, "at_most_avx2", lambda: True)
    monkeypatch.setattr(onednn.library(), "threads", lambda: 2)


class Case(NamedTuple):
    """A convolution that suits."""

    images: tuple[int, int, int, int]
    features: int
    low: tuple[int, int] = ONE
    high: tuple[int, int] = ONE
    kinds: tuple[Kind, ...] = tuple(Kind)

    @property
    def geometry(self) -> Geometry:
        return Geometry(ONE, ONE, self.low, self.high, 1)

    @property
    def shapes(self) -> Shapes:
        batch, height, width, channels = self.images
        rows = height + self.low[0] + self.high[0] - 2
        columns = width + self.low[1] + self.high[1] - 2
        kernel = (3, 3, channels, self.features)
        return self.images, kernel, (batch, rows, columns, self.features)


NOT_FIRST = (Kind.FORWARD, Kind.SECOND_GRADIENT)
CASES = {
    "even map": Case((2, 8, 10, 48), 80),
    "odd map": Case((3, 7, 9, 32), 16),
    "without padding": Case((4, 9, 10, 16), 32, (0, 0), (0, 0)),
    "with too much": Case((3, 7, 6, 32), 48, (2, 2), (2, 2)),
    "with uneven padding": Case((3, 8, 7, 32), 32, (2, 0), (1, 1)),
    "channels of 8": Case((4, 7, 6, 40), 48, kinds=NOT_FIRST),
    "two rows left of six": Case((4, 6, 8, 8), 64, kinds=NOT_FIRST),
    "many tiles": Case((3, 31, 37, 16), 32),
    "many channels": Case((3, 7, 7, 272), 304),
}


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Of float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_jax(case: Case, arrays: Any) -> tuple[np.ndarray, ...]:
    """Value and gradients, in float64."""

    def convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
        padding = list(zip(case.low, case.high, strict=True))
        return lax.conv_general_dilated(images, kernel, ONE, padding, dimension_numbers=NHWC_HWIO)

    with jax.enable_x64(True):
        images, kernel, of_outputs = (jnp.asarray(a, jnp.float64) for a in arrays)
        outputs, pull = jax.vjp(convolution, images, kernel)
        return jax.device_get((outputs, *pull(of_outputs)))


def by_plan(plan: Any, kind: Kind, arrays: Any) -> np.ndarray:
    """What it makes of the two others, in memory that was not 0."""
    first, second, result = PLACES[kind]
    made = np.full(arrays[result].shape, np.nan, np.float32)
    plan.make_calls([a.ctypes.data for a in (arrays[first], arrays[second], made)])
    return made


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a few roundings of the largest; a second call does not depend on the first."""
    monkeypatch.setattr(onednn.library(), "threads", lambda: threads)
    case = CASES[name]
    arrays = [normal(shape, seed) for seed, shape in enumerate(case.shapes)]
    wanted = by_jax(case, arrays)
    for kind in Kind:
        suits = winograd.suits(kind, case.geometry, case.shapes, FLOAT32)
        assert suits == (kind in case.kinds)
        if not suits:
            continue
        plan = winograd.plan(kind, case.geometry, case.shapes)
        others = [7 * array for array in arrays]
        by_plan(plan, kind, others)
        found = by_plan(plan, kind, arrays)
        with repeats.switched_off():
            np.testing.assert_array_equal(by_plan(plan, kind, arrays), found)
        apart = np.abs(found - wanted[kind]).max() / np.abs(wanted[kind]).max()
        assert apart < 1e-6, (kind, apart)


def test_nearer_than_the_definition() -> None:
    """Than its sums in float32, one product after the other."""
    case = Case((2, 10, 10, 128), 64)
    arrays = [normal(shape, seed) for seed, shape in enumerate(case.shapes)]
    wanted, *_ = by_jax(case, arrays)
    images = np.pad(arrays[0], [(0, 0), (1, 1), (1, 1), (0, 0)])
    defined = np.zeros_like(arrays[2])
    for row, column, channel in np.ndindex(3, 3, 128):
        seen = images[:, row : row + 10, column : column + 10, channel, None]
        defined += seen * arrays[1][row, column, channel]
    found = by_plan(winograd.plan(Kind.FORWARD, case.geometry, case.shapes), Kind.FORWARD, arrays)
    mine, of_definition = (np.sqrt(np.mean((y - wanted) ** 2)) for y in (found, defined))
    assert mine < 0.8 * of_definition


@pytest.mark.parametrize("threads", [1, 3])
def test_layers(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that comes behind the sum, of one image too."""
    monkeypatch.setattr(onednn.library(), "threads", lambda: threads)
    case = Case((1, 11, 8, 40), 48)
    images, kernel, residual = (normal(shape, i) for i, shape in enumerate(case.shapes))
    bias = normal((case.features,), 3)
    convolved, *_ = by_jax(case, (images, kernel, residual))
    for has_bias, adds, relu in itertools.product([False, True], repeat=3):
        activation = Activation.RELU if relu else Activation.NONE
        layer = Layer(*case.shapes, case.geometry, has_bias, adds, activation)
        primitive = onednn_layers._by_winograd(layer)
        assert primitive is not None
        packed = primitive.pack(kernel)
        outputs = residual.copy() if adds else np.full(residual.shape, np.nan, np.float32)
        given = [images, packed, *[bias] * has_bias, outputs]
        call = onednn_layers.Call(primitive.computation, range(len(given)))
        onednn_layers.Plan([call]).make_calls([array.ctypes.data for array in given])
        wanted = convolved + bias * has_bias + residual * adds
        wanted = np.maximum(wanted, 0) if relu else wanted
        # A few roundings of the largest sum.
        np.testing.assert_allclose(outputs, wanted, rtol=0, atol=1e-6 * np.abs(convolved).max())


@pytest.mark.parametrize(
    ("value", "activation"), [(np.nan, Activation.RELU), (np.inf, Activation.NONE)]
)
def test_what_is_not_finite(value: float, activation: Activation) -> None:
    """It is in all outputs that see it, and in no others."""
    case = Case((2, 12, 12, 16), 32)
    images, kernel, outputs = (normal(shape, i) for i, shape in enumerate(case.shapes))
    layer = Layer(*case.shapes, case.geometry, activation=activation)
    primitive = onednn_layers._by_winograd(layer)
    assert primitive is not None
    packed = primitive.pack(kernel)
    plan = onednn_layers.Plan([onednn_layers.Call(primitive.computation, range(3))])
    images[1, 5, 6, 3] = value
    plan.make_calls([array.ctypes.data for array in (images, packed, outputs)])
    assert not np.isfinite(outputs[1, 4:7, 5:8]).any()
    outputs[1, 4:7, 5:8] = 0
    assert np.isfinite(outputs).all()


def test_what_does_not_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    def suits(case: Case, geometry: Geometry | None = None, **changed: Any) -> bool:
        shapes = changed.get("shapes", case.shapes)
        dtype = changed.get("dtype", FLOAT32)
        return winograd.suits(Kind.FORWARD, geometry or case.geometry, shapes, dtype)

    case = Case((8, 8, 8, 32), 32)
    assert suits(case)
    images, kernel, outputs = case.shapes
    for geometry in (
        case.geometry._replace(strides=(1, 2)),
        case.geometry._replace(dilation=(2, 1)),
        case.geometry._replace(groups=2),
        case.geometry._replace(high=(1, 2)),  # which is one column more
    ):
        assert not suits(case, geometry)
    for shapes in (
        (images, (3, 5, 32, 32), outputs),
        (images, (3, 3, 16, 32), outputs),
        (images, (3, 3, 32, 48), outputs),
        ((9, 8, 8, 32), kernel, outputs),
        ((8, 9, 8, 32), kernel, outputs),
    ):
        assert not suits(case, shapes=shapes)
    assert not suits(case, dtype=np.dtype(jnp.bfloat16))
    assert not suits(Case((8, 8, 8, 36), 32))
    assert not suits(Case((8, 8, 8, 32), 40))
    assert not suits(Case((8, 8, 8, 16), 16))
    assert not suits(Case((99, 3, 8, 32), 32))
    assert not suits(Case((0, 8, 8, 32), 32))
    assert not winograd.suits_inference(case.geometry, Case((0, 8, 8, 32), 32).shapes, FLOAT32)
    assert not suits(Case((1, 10, 12, 32), 32))  # 30 tiles
    assert winograd.suits_inference(case.geometry, Case((1, 10, 12, 32), 32).shapes, FLOAT32)
    with monkeypatch.context() as patch:
        patch.setattr(onednn.library(), "threads", lambda: 16)
        assert suits(case)
        assert not suits(Case((7, 8, 8, 32), 32))  # 7 tiles for each
    assert not suits(Case((8, 8, 8, 1 << 14), 1 << 10))  # a kernel of 1 GiB, transformed
    assert not suits(Case((8, 8, 8, (1 << 14) + 8), 16))
    monkeypatch.setattr(onednn, "at_most_avx2", lambda: False)
    assert not suits(case)
    monkeypatch.setattr(onednn, "at_most_avx2", lambda: True)
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert not suits(case)
