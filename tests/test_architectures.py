"""What the papers print: layer by layer, the parameters and the shapes of their tables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from variables import count, random_variables

import flaxcnn
from flaxcnn import lenet
from flaxcnn.blocks import BatchNorm


def shapes_of(model: nn.Module, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Submodule name -> the shape that it returns, without running anything."""
    found: dict[str, tuple[int, ...]] = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = next_call(*args, **kwargs)
        if len(context.module.path) == 1 and context.method_name == "__call__":
            found[context.module.path[0]] = result.shape
        return result

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))
    return found


def test_lenet5_has_the_papers_counts_and_maps() -> None:
    """Section II.B: trainable parameters of each layer, and the size of its maps."""
    model = flaxcnn.create_model("lenet5")
    params = random_variables(model, (1, 32, 32, 1))["params"]
    counts = {"C1": 156, "S2": 12, "C3": 1516, "S4": 32, "C5": 48_120, "F6": 10_164}
    assert {name: count(params[name]) for name in counts} == counts
    shapes = shapes_of(model, (1, 32, 32, 1))
    assert shapes == {
        "C1": (1, 28, 28, 6),
        "S2": (1, 14, 14, 6),
        "C3": (1, 10, 10, 16),
        "S4": (1, 5, 5, 16),
        "C5": (1, 1, 1, 120),
        "F6": (1, 84),
        "output": (1, 10),
    }


def test_lenet5_connects_c3_as_table_i() -> None:
    rows = [  # of S2, as the paper prints them: the maps of C3 that see each
        [0, 4, 5, 6, 9, 10, 11, 12, 14, 15],
        [0, 1, 5, 6, 7, 10, 11, 12, 13, 15],
        [0, 1, 2, 6, 7, 8, 11, 13, 14, 15],
        [1, 2, 3, 6, 7, 8, 9, 12, 14, 15],
        [2, 3, 4, 7, 8, 9, 10, 12, 13, 15],
        [3, 4, 5, 8, 9, 10, 11, 13, 14, 15],
    ]
    ours = [[c3 for c3, seen in enumerate(lenet.C3_INPUTS) if s2 in seen] for s2 in range(6)]
    assert ours == rows


def test_lenet5_layers_do_what_the_paper_says() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 6, 6, 6)).astype("float32")
    params = {"kernel": rng.normal(size=(5, 5, 60)), "bias": rng.normal(size=16)}
    y = lenet.PartialConv(jnp.float32).apply({"params": params}, x)
    connection = 0
    for c3, seen in enumerate(lenet.C3_INPUTS):
        expected = params["bias"][c3]
        for s2 in seen:
            expected += np.sum(x[0, :5, :5, s2] * params["kernel"][:, :, connection])
            connection += 1
        # Float32 sums of up to 150 products of both signs against float64's.
        np.testing.assert_allclose(y[0, 0, 0, c3], expected, rtol=1e-4)

    params = {"scale": np.arange(1.0, 7), "bias": np.arange(6.0)}
    y = lenet.Subsampling(jnp.float32).apply({"params": params}, x)
    sums = x[0, 2:4, 4:6].sum((0, 1))
    np.testing.assert_allclose(y[0, 1, 2], sums * params["scale"] + params["bias"], rtol=1e-5)
    # The paper's constants, of five digits, make f(1) = 1 to as many.
    np.testing.assert_allclose(lenet.squash(jnp.array([-1.0, 1.0])), [-1, 1], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "channels"), [("resnet34", (64, 128, 256, 512)), ("resnet50", (256, 512, 1024, 2048))]
)
def test_resnet_stages_are_table_1(name: str, channels: tuple[int, ...]) -> None:
    shapes = shapes_of(flaxcnn.create_model(name), (1, 224, 224, 3))
    assert shapes["conv1"] == (1, 112, 112, 64)
    blocks = (3, 4, 6, 3)
    for stage, (size, width, number) in enumerate(
        zip((56, 28, 14, 7), channels, blocks, strict=True), start=1
    ):
        for i in range(number):
            assert shapes[f"layer{stage}_{i}"] == (1, size, size, width)
        assert f"layer{stage}_{number}" not in shapes
    assert shapes["fc"] == (1, 1000)


def test_vgg16_maps_are_table_1() -> None:
    shapes = shapes_of(flaxcnn.create_model("vgg16"), (1, 224, 224, 3))
    convolutions = [shape for name, shape in shapes.items() if name.startswith("features")]
    assert convolutions == [
        *[(1, 224, 224, 64)] * 2,
        *[(1, 112, 112, 128)] * 2,
        *[(1, 56, 56, 256)] * 3,
        *[(1, 28, 28, 512)] * 3,
        *[(1, 14, 14, 512)] * 3,
    ]
    assert [shapes[f"classifier_{i}"] for i in (0, 3, 6)] == [(1, 4096), (1, 4096), (1, 1000)]


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual_makes_each_block_the_identity(name: str, last: str) -> None:
    """Goyal et al. 2017, section 5.1: the last scale of each residual branch starts at zero."""
    drawn: dict[tuple[str, ...], Any] = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            drawn[context.module.path] = context.module.scale_init
        return next_call(*args, **kwargs)

    model = flaxcnn.create_model(name, zero_init_residual=True)
    with nn.intercept_methods(record):
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
        )
    assert len(drawn) > 16
    for path, init in drawn.items():
        expected = 0 if path[-1] == last else 1
        assert (init(jax.random.key(0), (3,)) == expected).all(), path


def test_dropout_acts_in_training_only() -> None:
    model = flaxcnn.create_model("vgg11", num_classes=3)
    variables = random_variables(model, (1, 32, 32, 3))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")

    def logits(key: int, train: bool) -> jax.Array:
        return model.apply(variables, images, train=train, rngs={"dropout": jax.random.key(key)})

    assert (logits(0, train=True) != logits(1, train=True)).any()
    assert (logits(0, train=True) == logits(0, train=True)).all()
    assert (logits(0, train=False) == logits(1, train=False)).all()
