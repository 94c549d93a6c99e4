"""What a CPU keeps in memory instead of computing it again for each use."""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, PartitionSpec
from processor import skip_unless_computed

from flaxcnn import blocks, create_model
from flaxcnn.cpu.written import written

SHAPE = (3, 5, 7, 16)
DTYPES = [jnp.float32, jnp.bfloat16]


def array(dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(0, 1, SHAPE), dtype)


# ------------------------------------------------------------------------------- what it computes
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_nothing_changes(dtype: Any) -> None:
    skip_unless_computed(dtype)
    x = array(dtype)

    def kept(x: jax.Array) -> jax.Array:
        return jnp.sin(written(jnp.exp(x)))

    def not_kept(x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.exp(x))

    def gradient(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return jax.grad(lambda x: jnp.sum(jnp.square(f(x)).astype(jnp.float32)))

    def derivatives(f: Callable[[Any], Any], x: jax.Array) -> Any:
        direction = jnp.cos(x)
        return [
            f(x),
            jax.jvp(f, [x], [direction]),
            gradient(f)(x),
            jax.jvp(gradient(f), [x], [direction]),
            jax.vmap(gradient(f), in_axes=3, out_axes=1)(x),
        ]

    for compiled in (lambda f: f, jax.jit):
        found = compiled(partial(derivatives, kept))(x)
        wanted = compiled(partial(derivatives, not_kept))(x)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert a.dtype == b.dtype == dtype
            # Where XLA takes steps together it rounds once instead of each time: of up to eight
            # roundings in a row, by 2^-24 each in float32 and by 2^-8 in bfloat16, of the largest.
            digits = 2.0**-21 if dtype == jnp.float32 else 2.0**-5
            np.testing.assert_allclose(
                np.float32(a), np.float32(b), rtol=0, atol=digits * float(jnp.abs(b).max())
            )


def test_its_operand_stays_as_it_is_where_it_is_used_again() -> None:
    """The result lies in the operand's place, and what comes of it may be written there."""

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = written(x)
        return y * 2, x

    x = array()
    for argument in (x, jnp.copy(x)):
        doubled, same = jax.jit(both, donate_argnums=0)(argument)
        np.testing.assert_array_equal(doubled, 2 * np.asarray(same))
    np.testing.assert_array_equal(same, array())


def test_one_image_on_each_device() -> None:
    x = jnp.concatenate([array()] * 8)[:8]
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    spread = PartitionSpec("batch")

    def kept(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.square(written(2 * x))))(x)

    found = jax.jit(jax.shard_map(kept, mesh=mesh, in_specs=spread, out_specs=spread))(x)
    np.testing.assert_array_equal(found, 8 * x)  # powers of two: nothing is rounded


def test_without_compilation() -> None:
    with jax.disable_jit():
        np.testing.assert_array_equal(written(array()), array())


# -------------------------------------------------------------------------------------- for whom
@pytest.fixture
def as_jax_has_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(blocks, "PLAIN", True)
    jax.clear_caches()
    yield
    jax.clear_caches()


def calls(dtype: Any, platform: str = "cpu") -> int:
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    lowered = jax.jit(lambda x: blocks.relu(x)).trace(x).lower(lowering_platforms=(platform,))
    return lowered.as_text().count("flaxcnn_written")


def test_for_a_cpu_alone() -> None:
    skip_unless_computed(jnp.float32)
    assert [calls(jnp.float32, platform) for platform in ("cpu", "cuda", "tpu")] == [1, 0, 0]
    with jax.enable_x64(True):
        assert calls(jnp.float64) == 0


def test_not_where_types_say_how_an_array_is_spread() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.concatenate([array()] * 2), PartitionSpec("data"))
        lowered = jax.jit(lambda x: written(jnp.exp(x))).lower(x)
        assert "flaxcnn_written" not in lowered.as_text()


def test_not_in_programs_for_any_size() -> None:
    shape = jax.export.symbolic_shape("n, 5, 7, 16")
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = jax.export.export(jax.jit(lambda x: written(2 * x)), platforms=("cpu",))(images)
    np.testing.assert_array_equal(program.call(array()), 2 * array())


def test_not_with_the_switch(as_jax_has_it: None) -> None:
    assert calls(jnp.float32) == 0


# ----------------------------------------------------------------------------------- what it is for
class Loop(NamedTuple):
    """One that XLA compiled, with the sizes of its arrays in float32, in elements."""

    operands: list[int]
    result: int


def loops(compiled: Any) -> list[Loop]:
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :]
    arrays = re.findall(r"(%[\w.-]+) = f32\[([\d,]+)\]", entry)
    sizes = {name: math.prod(int(n) for n in shape.split(",")) for name, shape in arrays}
    found = re.findall(r"(%[\w.-]+) = f32\[.* fusion\(([^)]*)\), kind=kLoop", entry)
    return [
        Loop([sizes.get(name, 0) for name in re.findall(r"%[\w.-]+", operands)], sizes[result])
        for result, operands in found
        if result in sizes
    ]


def most_maps_read(name: str, size: int, map_size: int) -> int:
    """By one loop of a training step's gradient, of those with so many elements."""
    model = create_model(name, num_classes=10)
    images = jnp.zeros((2, size, size, 3))
    variables = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))

    def loss(params: Any, rest: Any) -> jax.Array:
        logits, _ = model.apply(
            {"params": params, **rest}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.square(logits))

    params = variables.pop("params")
    found = loops(jax.jit(jax.grad(loss)).lower(params, variables).compile())
    assert len(found) > 20
    return max(loop.operands.count(map_size) for loop in found)


@pytest.mark.parametrize(
    ("name", "size", "map_size"),
    [("resnet32", 32, 2 * 8 * 8 * 64), ("resnet50", 64, 2 * 4 * 4 * 1024)],
)
def test_no_sum_begins_where_its_stage_does(
    name: str, size: int, map_size: int, request: pytest.FixtureRequest
) -> None:
    """Two summands, or in the gradient both ways' and what says where it is zero."""
    skip_unless_computed(jnp.float32)
    assert most_maps_read(name, size, map_size) <= 3
    request.getfixturevalue("as_jax_has_it")
    assert most_maps_read(name, size, map_size) >= 5


@pytest.mark.parametrize(("activation", "written"), [(None, [1, 0]), (nn.silu, [1, 2])])
def test_what_a_variance_is_of_is_not_written(activation: Any, written: list[int]) -> None:
    """Of so many values that XLA sums them up: x - mean would be a map more.

    By XLA there is what comes out, and with the gradient, in which the sum above takes that in, the
    activation and the gradient of its argument.
    """
    skip_unless_computed(jnp.float32)
    norm = blocks.BatchNorm(use_running_average=False)
    x = jax.ShapeDtypeStruct((2, 67, 65, 16), jnp.float32)
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)

    def loss(variables: Any, x: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.vdot(norm.apply(variables, x, activation, mutable=["batch_stats"])[0], weights)

    def outputs(variables: Any, x: jax.Array) -> Any:
        return norm.apply(variables, x, activation, mutable=["batch_stats"])[0]

    both_ways = jax.jit(jax.value_and_grad(loss, argnums=1)).lower(variables, x, x).compile()
    alone = jax.jit(outputs).lower(variables, x).compile()
    maps = [sum(loop.result == x.size for loop in loops(of)) for of in (alone, both_ways)]
    assert maps == written
