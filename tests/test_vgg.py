"""VGG: the layers of table 1, the parameters of table 2, and what A-LRN has besides A."""

import jax
import numpy as np
import pytest
from shapes import macs_of, stage_shapes, traced
from variables import count, variable_shapes

import flaxcnn
from flaxcnn import blocks, pooling

IMAGES = (1, 224, 224, 3)
SIDES = (224, 112, 56, 28, 14)
CHANNELS = (64, 128, 256, 512, 512)


@pytest.mark.parametrize(
    ("name", "convolutions", "weight_layers"),
    [
        ("vgg11", (1, 1, 2, 2, 2), 11),  # A
        ("vgg11_lrn", (1, 1, 2, 2, 2), 11),  # A-LRN
        ("vgg13", (2, 2, 2, 2, 2), 13),  # B
        ("vgg16", (2, 2, 3, 3, 3), 16),  # D
        ("vgg19", (2, 2, 4, 4, 4), 19),  # E
    ],
)
def test_maps_are_table_1(name: str, convolutions: tuple[int, ...], weight_layers: int) -> None:
    model = flaxcnn.create_model(name)
    shapes = traced(model, IMAGES).modules
    assert [shape for layer, shape in shapes.items() if layer.startswith("features")] == [
        (side, side, channels)
        for side, channels, number in zip(SIDES, CHANNELS, convolutions, strict=True)
        for _ in range(number)
    ]
    assert [shapes[f"classifier_{i}"] for i in (0, 3, 6)] == [(4096,), (4096,), (1000,)]
    assert len(macs_of(model, IMAGES)) == weight_layers


@pytest.mark.parametrize("name", [name for name in flaxcnn.list_models() if "vgg" in name])
def test_stages_are_table_1(name: str) -> None:
    assert stage_shapes(flaxcnn.create_model(name), IMAGES) == {
        f"pool{i + 1}": (SIDES[i] // 2, SIDES[i] // 2, CHANNELS[i]) for i in range(5)
    }


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vgg11", 133), ("vgg11_lrn", 133), ("vgg13", 133), ("vgg16", 138), ("vgg19", 144)],
)
def test_parameters_are_table_2(name: str, millions: int) -> None:
    params = traced(flaxcnn.create_model(name), IMAGES).variables["params"]
    assert round(count(params) / 1e6) == millions


def test_macs_are_those_that_the_resnet_paper_prints() -> None:
    """He et al. 2016, section 4.1: "VGG-16/19 nets (15.3/19.6 billion FLOPs)".

    19.6 is the whole network; 15.3 are the convolutions alone (15.35, cut), without the dense
    layers that make it 15.5.
    """
    vgg19 = macs_of(flaxcnn.create_model("vgg19"), IMAGES)
    assert round(sum(vgg19.values()) / 1e9, 1) == 19.6
    vgg16 = macs_of(flaxcnn.create_model("vgg16"), IMAGES)
    assert sum(vgg16.values()) == 15_470_264_320
    assert sum(macs for layer, macs in vgg16.items() if "features" in layer) == 15_346_630_656


def test_lrn_is_all_that_vgg11_lrn_has_besides_vgg11(monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 1: once, behind the first convolution; section 2.1: with AlexNet's constants."""
    plain, normalised = (flaxcnn.create_model(name) for name in ("vgg11", "vgg11_lrn"))
    assert variable_shapes(plain, IMAGES) == variable_shapes(normalised, IMAGES)

    called = []
    right = blocks.local_response_norm

    def record(x: jax.Array) -> jax.Array:
        called.append(x.shape[1:])
        return right(x)

    monkeypatch.setattr(blocks, "local_response_norm", record)
    shapes = variable_shapes(normalised, IMAGES)
    assert called == [(224, 224, 64)]
    variable_shapes(plain, IMAGES)
    assert len(called) == 1

    # The first block alone needs no other variables.
    rng = np.random.default_rng(0)
    layer = {
        name: rng.normal(0, 20, leaf.shape).astype("float32")
        for name, leaf in shapes["params"]["features_0"].items()
    }
    images = rng.normal(size=(1, 32, 32, 3)).astype("float32")
    first, second = (
        flaxcnn.extract_features(
            model, {"params": {"features_0": layer}}, images, ["pool1"]
        )["pool1"]
        for model in (plain, normalised)
    )  # fmt: skip
    assert not np.allclose(first, second, rtol=0.1)
    convolved = jax.lax.conv_general_dilated(
        images, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = right(jax.nn.relu(convolved + layer["bias"]))
    np.testing.assert_allclose(second, pooling.max_pool(expected, 2, 2), rtol=1e-4, atol=1e-4)
