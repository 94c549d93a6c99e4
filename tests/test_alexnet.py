"""AlexNet of 2012: the numbers that the paper prints, its two towers, and its normalisation."""

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import convolution, dense, max_pool, relu, response_norm
from flax import linen as nn
from shapes import macs_of, stage_shapes, traced
from variables import count, random_variables, variable_shapes

import flaxcnn
from flaxcnn.blocks import local_response_norm

IMAGES = (1, 224, 224, 3)


def layers_of(name: str) -> dict[str, tuple[nn.Module, Any]]:
    """Name of a convolution or dense layer -> the module, and the shape of what it gets."""
    found = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Conv | nn.Dense) and context.method_name == "__call__":
            found[context.module.name] = (context.module.clone(parent=None), args[0].shape)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        variable_shapes(flaxcnn.create_model(name), IMAGES)
    return found


def test_alexnet_2012_has_the_papers_neurons_and_parameters() -> None:
    model = flaxcnn.create_model("alexnet_2012")
    # Figure 2.
    assert stage_shapes(model, IMAGES) == {
        "pool1": (27, 27, 96),
        "pool2": (13, 13, 256),
        "pool3": (6, 6, 256),
    }
    shapes = traced(model, IMAGES).modules
    names = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    neurons = [math.prod(shapes[name]) for name in names]
    # What figure 2's caption prints; but the first number, 253,440 = 55 * 48 * 96, is at odds with
    # the 55x55 maps, 48 a tower, that the same figure draws.
    assert shapes["conv1"] == (55, 55, 2 * 48)
    assert neurons[0] == 290_400
    assert neurons[1:] == [186_624, 64_896, 64_896, 43_264, 4096, 4096, 1000]
    # "650,000 neurons" (abstract): so many have the convolutions alone, 659,272 the network; the
    # caption's numbers sum to 622,312.
    assert sum(neurons[:5]) == 650_080
    assert sum(neurons) == 659_272
    # "60 million parameters" (abstract).
    assert 60e6 < count(traced(model, IMAGES).variables["params"]) < 61e6


def test_alexnet_is_the_tower_of_2014() -> None:
    """Krizhevsky 2014, footnote 1: 64, 192, 384, 384, 256 filters; torchvision's fourth has 256."""
    shapes = traced(flaxcnn.create_model("alexnet"), IMAGES).modules
    convolutions = [shape for name, shape in shapes.items() if name.startswith("features")]
    assert convolutions == [
        *((55, 55, 64), (27, 27, 192), (13, 13, 384), (13, 13, 256), (13, 13, 256)),
    ]


@pytest.mark.parametrize(
    ("name", "alone"), [("conv2", True), ("conv3", False), ("conv4", True), ("conv5", True)]
)
def test_towers_meet_in_conv3_only(name: str, alone: bool) -> None:
    """Section 3.5: which maps move when the inputs of the second tower do."""
    layer, (_, _, _, channels) = layers_of("alexnet_2012")[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 5, channels)).astype("float32")
    x[1] = x[0]
    x[1, ..., channels // 2 :] += 1
    shapes = traced(flaxcnn.create_model("alexnet_2012"), IMAGES).variables["params"][name]
    params = {key: rng.normal(size=leaf.shape).astype("float32") for key, leaf in shapes.items()}
    y, moved = layer.apply({"params": params}, x)
    first, second = np.split(np.any(y != moved, axis=(0, 1)), 2)
    assert second.all()
    assert not first.any() if alone else first.all()


def test_grouped_layers_cost_half() -> None:
    """Each kernel of layers 2, 4 and 5 sees half of the maps: 48, 192 and 192 (section 3.5)."""
    macs = macs_of(flaxcnn.create_model("alexnet_2012"), IMAGES)
    assert [macs[f"conv{i}"] for i in (1, 2, 3, 4, 5)] == [
        290_400 * 11 * 11 * 3,
        186_624 * 5 * 5 * 48,
        64_896 * 3 * 3 * 256,
        64_896 * 3 * 3 * 192,
        43_264 * 3 * 3 * 192,
    ]


def test_initial_weights_and_biases_are_section_5s() -> None:
    layers = layers_of("alexnet_2012")
    ones = {"conv2", "conv4", "conv5", "fc6", "fc7"}
    for name, (layer, _) in layers.items():
        key = jax.random.key(0)
        assert (layer.bias_init(key, (3,)) == (1 if name in ones else 0)).all(), name
        weights = layer.kernel_init(key, (100, 100))
        # 10,000 draws: a standard error of 0.0001 of the mean, 0.00007 of the deviation.
        assert abs(weights.mean()) < 5e-4, name
        assert abs(weights.std() - 0.01) < 5e-4, name
    assert len(layers) == 8


def test_alexnet_2012_by_hand() -> None:
    """Figure 2 and section 3.5, on images of which one value is left, which the pool repeats."""
    model = flaxcnn.create_model("alexnet_2012", num_classes=5)
    # Bright enough that the normalisation's alpha counts beside its k.
    images = np.random.default_rng(0).normal(0, 50, (1, 63, 63, 3)).astype("float32")
    variables = random_variables(model, images.shape)
    params = variables["params"]
    x = relu(convolution(images, params["conv1"], strides=4, padding=2))
    x = max_pool(response_norm(x), 3, 2)
    x = relu(convolution(x, params["conv2"], padding=2, groups=2))
    x = max_pool(response_norm(x), 3, 2)
    x = relu(convolution(x, params["conv3"], padding=1))
    x = relu(convolution(x, params["conv4"], padding=1, groups=2))
    x = relu(convolution(x, params["conv5"], padding=1, groups=2))
    x = max_pool(x, 3, 2)
    assert x.shape == (1, 1, 1, 256)
    x = relu(dense(np.tile(x.ravel(), (1, 36)), params["fc6"]))
    x = relu(dense(x, params["fc7"]))
    # Float32 sums of up to 9216 products, eight layers deep: 1e-4 of 30 was seen.
    logits = model.apply(variables, images, train=False)
    np.testing.assert_allclose(logits, dense(x, params["fc8"]), rtol=1e-4, atol=1e-3)


# ----------------------------------------------------------------------------- normalisation
# Activities of some tens, so that alpha = 1e-4 times their squares counts beside k = 2. Float32
# against float64 and torch: some units in the last place, 1e-7 each.
ACTIVITIES = np.random.default_rng(0).normal(0, 50, (2, 3, 4, 9)).astype("float32")


def test_response_normalisation_is_section_3_3() -> None:
    ours = local_response_norm(jnp.asarray(ACTIVITIES))
    np.testing.assert_allclose(ours, response_norm(ACTIVITIES), rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("size", [5, 4])
def test_response_normalisation_is_torchs(size: int) -> None:
    torch: Any = importlib.import_module("torch")
    theirs = torch.nn.LocalResponseNorm(size, alpha=1e-3 * size, beta=0.6, k=1.5)(
        torch.from_numpy(ACTIVITIES).permute(0, 3, 1, 2)
    )
    ours = local_response_norm(jnp.asarray(ACTIVITIES), size, alpha=1e-3, beta=0.6, k=1.5)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), rtol=1e-6)


def test_both_normalisations_come_before_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 3.5: behind the first and the second convolution, and nowhere else."""
    seen = []

    def record(x: jax.Array) -> jax.Array:
        seen.append(x.shape[1:])
        return local_response_norm(x)

    monkeypatch.setattr("flaxcnn.blocks.local_response_norm", record)
    variable_shapes(flaxcnn.create_model("alexnet_2012"), IMAGES)
    assert seen == [(55, 55, 96), (27, 27, 256)]
