"""ResNet v2: its units written out in numpy, and where the network normalises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import Layer, convolution, max_pool, norm, relu
from flax import linen as nn
from shapes import macs_of, stage_shapes, traced
from variables import count, random_variables

import flaxcnn
from flaxcnn.blocks import BatchNorm
from flaxcnn.resnet_v2 import PreactBasicBlock, PreactBottleneck, ResNetV2

IMAGES = (1, 224, 224, 3)
X = np.random.default_rng(0).normal(size=(2, 6, 5, 8)).astype("float32")
# Float32 sums of up to 144 products.
TOLERANCES = {"rtol": 1e-4, "atol": 1e-4}


class Alone(nn.Module):
    """A unit by itself, with its norms in evaluation."""

    block: Any
    channels: int
    strides: int
    activated: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        unit = self.block(
            self.channels,
            self.strides,
            self.activated,
            lambda name: BatchNorm(use_running_average=True, name=name),
            jnp.float32,
            name="unit",
        )
        return unit(x)


def relu_norm(x: np.ndarray, params: Layer, stats: Layer) -> np.ndarray:
    return relu(norm(x, params, stats))


def unit_and_variables(
    block: Any, channels: int, strides: int, activated: bool = False
) -> tuple[nn.Module, Any, Any, Any]:
    """The unit, its variables for `X`, and within those its parameters and its statistics."""
    unit = Alone(block, channels, strides, activated)
    variables = random_variables(unit, X.shape)
    return unit, variables, variables["params"]["unit"], variables["batch_stats"]["unit"]


# ----------------------------------------------------------------------------------------- units
@pytest.mark.parametrize(
    ("channels", "strides", "activated"), [(8, 1, False), (16, 2, False), (8, 1, True)]
)
def test_basic_units_are_figure_4_e(channels: int, strides: int, activated: bool) -> None:
    """Norm, ReLU, convolution, twice; nothing behind the addition."""
    unit, variables, params, stats = unit_and_variables(
        PreactBasicBlock, channels, strides, activated
    )
    y = X.astype("float64") if activated else relu_norm(X, params["bn1"], stats["bn1"])
    shortcut = X
    if strides != 1:  # appendix: "these projection shortcuts are also with pre-activation"
        shortcut = convolution(y, params["downsample"], strides)
    y = convolution(y, params["conv1"], strides, 1)
    y = relu_norm(y, params["bn2"], stats["bn2"])
    y = convolution(y, params["conv2"], 1, 1)
    np.testing.assert_allclose(unit.apply(variables, X, train=False), shortcut + y, **TOLERANCES)
    assert ("bn1" in params) != activated
    assert ("downsample" in params) == (strides != 1)


@pytest.mark.parametrize(
    ("channels", "strides", "activated"), [(2, 1, False), (4, 2, False), (4, 1, True)]
)
def test_bottlenecks_are_figure_4_e(channels: int, strides: int, activated: bool) -> None:
    """1x1, 3x3 and 1x1, each behind a norm and a ReLU; the 3x3 has the stride."""
    unit, variables, params, stats = unit_and_variables(
        PreactBottleneck, channels, strides, activated
    )
    y = X.astype("float64") if activated else relu_norm(X, params["bn1"], stats["bn1"])
    shortcut = X
    if channels != 2:  # where the output has other than eight channels
        shortcut = convolution(y, params["downsample"], strides)
    y = convolution(y, params["conv1"])
    y = relu_norm(y, params["bn2"], stats["bn2"])
    y = convolution(y, params["conv2"], strides, 1)
    y = relu_norm(y, params["bn3"], stats["bn3"])
    y = convolution(y, params["conv3"])
    np.testing.assert_allclose(unit.apply(variables, X, train=False), shortcut + y, **TOLERANCES)
    assert ("bn1" in params) != activated
    assert ("downsample" in params) == (channels != 2)


@pytest.mark.parametrize(
    ("block", "channels", "last"), [(PreactBasicBlock, 8, "conv2"), (PreactBottleneck, 2, "conv3")]
)
def test_identity_shortcuts_carry_the_input_unchanged(block: Any, channels: int, last: str) -> None:
    """Equation 3 with h and f both the identity: what is negative stays so."""
    unit, variables, params, _ = unit_and_variables(block, channels, 1)
    params[last]["kernel"] *= 0
    np.testing.assert_array_equal(unit.apply(variables, X, train=False), X)


# --------------------------------------------------------------------------------------- network
def test_first_and_last_activations_are_the_appendixs() -> None:
    """The first right behind `conv1`, before the paths split; another behind the last addition."""
    model = ResNetV2(block=PreactBasicBlock, stage_sizes=(2,), num_classes=0)
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype("float32")
    variables = random_variables(model, images.shape)
    params, stats = variables["params"], variables["batch_stats"]
    assert "bn1" not in params["layer1_0"]
    assert "bn1" in params["layer1_1"]

    maps = flaxcnn.extract_features(model, variables, images, ["stem", "layer1"])
    stem = relu_norm(convolution(images, params["conv1"], 2, 3), params["bn1"], stats["bn1"])
    np.testing.assert_allclose(maps["stem"], max_pool(stem, 3, 2, padding=1), **TOLERANCES)
    assert (np.asarray(maps["layer1"]) < 0).any()  # sums, which nothing has activated
    features = relu_norm(np.asarray(maps["layer1"]), params["bn2"], stats["bn2"]).mean((1, 2))
    np.testing.assert_allclose(model.apply(variables, images, train=False), features, **TOLERANCES)


V2 = {
    "resnet18_v2": (1, (2, 2, 2, 2)),
    "resnet50_v2": (4, (3, 4, 6, 3)),
    "resnet101_v2": (4, (3, 4, 23, 3)),
    "resnet152_v2": (4, (3, 8, 36, 3)),
}


@pytest.mark.parametrize("name", V2)
def test_stages_are_those_of_the_first_papers_table_1(name: str) -> None:
    expansion, blocks = V2[name]
    model = flaxcnn.create_model(name)
    assert stage_shapes(model, IMAGES) == {
        "stem": (56, 56, 64),
        "layer1": (56, 56, 64 * expansion),
        "layer2": (28, 28, 128 * expansion),
        "layer3": (14, 14, 256 * expansion),
        "layer4": (7, 7, 512 * expansion),
    }
    numbers = [
        len({layer for layer in macs_of(model, IMAGES) if layer.startswith(f"layer{i}_")})
        for i in (1, 2, 3, 4)
    ]
    # A stage's convolutions: two or three a unit, and the projection of the first. Basic units of
    # 64 channels need none behind the stem.
    per_unit = 2 if expansion == 1 else 3
    projections = [0 if expansion == 1 else 1, 1, 1, 1]
    assert numbers == [per_unit * n + p for n, p in zip(blocks, projections, strict=True)]
    assert traced(model, IMAGES).modules["fc"] == (1000,)


@pytest.mark.parametrize("name", V2)
def test_norms_have_these_parameters(name: str) -> None:
    """A scale and a bias of each channel that comes into a unit's norms, or out of the network."""
    expansion, blocks = V2[name]
    normalised, inputs = 64, 64  # behind conv1
    for stage, number in enumerate(blocks):
        channels = 64 * 2**stage
        for unit in range(number):
            if stage or unit:
                normalised += inputs  # bn1, which the first unit lacks
            normalised += channels if expansion == 1 else 2 * channels  # bn2, or bn2 and bn3
            inputs = expansion * channels
    normalised += inputs  # the last
    variables = traced(flaxcnn.create_model(name), IMAGES).variables
    assert count(variables["batch_stats"]) == 2 * normalised  # means and variances
    in_norms = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-2].key.startswith("bn")
    ]
    assert sum(in_norms) == 2 * normalised


@pytest.mark.parametrize("depth", [18, 50, 101, 152])
def test_the_difference_to_the_first_version_is_the_norms(depth: int) -> None:
    """The same convolutions and dense layer: the rearranged units have other norms only."""
    first, second = (
        traced(flaxcnn.create_model(name), IMAGES).variables
        for name in (f"resnet{depth}", f"resnet{depth}_v2")
    )
    convolutions = [
        sum(leaf.size for leaf in jax.tree.leaves(tree["params"]) if leaf.ndim == 4)
        for tree in (first, second)
    ]
    assert convolutions[0] == convolutions[1]
    assert count(first["params"]) - count(second["params"]) == count(first["batch_stats"]) - count(
        second["batch_stats"]
    )
