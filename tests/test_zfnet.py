"""ZFNet: the sizes that figure 3 prints, and parameters by arithmetic."""

import numpy as np
from by_hand import convolution, dense, max_pool, relu, response_norm
from shapes import stage_shapes, traced
from variables import count, random_variables

import flaxcnn

IMAGES = (1, 224, 224, 3)


def test_zfnet_maps_are_figure_3() -> None:
    model = flaxcnn.create_model("zfnet")
    shapes = traced(model, IMAGES).modules
    assert [shapes[f"conv{i}"] for i in (1, 2, 3, 4, 5)] == [
        *((110, 110, 96), (26, 26, 256), (13, 13, 384), (13, 13, 384), (13, 13, 256)),
    ]
    assert stage_shapes(model, IMAGES) == {
        "pool1": (55, 55, 96),
        "pool2": (13, 13, 256),
        "pool3": (6, 6, 256),
    }
    assert [shapes[f"fc{i}"] for i in (6, 7, 8)] == [(4096,), (4096,), (1000,)]


def test_zfnet_parameters_are_those_of_figure_3() -> None:
    """The paper prints no count: filters of 7x7, 5x5 and 3x3, three dense layers, and biases."""
    convolutions = {
        "conv1": 7 * 7 * 3 * 96 + 96,
        "conv2": 5 * 5 * 96 * 256 + 256,
        "conv3": 3 * 3 * 256 * 384 + 384,
        "conv4": 3 * 3 * 384 * 384 + 384,
        "conv5": 3 * 3 * 384 * 256 + 256,
    }
    dense = {
        "fc6": 6 * 6 * 256 * 4096 + 4096,
        "fc7": 4096 * 4096 + 4096,
        "fc8": 4096 * 1000 + 1000,
    }
    params = traced(flaxcnn.create_model("zfnet"), IMAGES).variables["params"]
    assert {name: count(params[name]) for name in params} == convolutions | dense
    assert count(params) == 62_357_608


def test_zfnet_by_hand() -> None:
    """Figure 3: ReLU, pool, normalisation, on images of which one value is left."""
    model = flaxcnn.create_model("zfnet", num_classes=5)
    # Bright enough that the normalisation's alpha counts beside its k.
    images = np.random.default_rng(0).normal(0, 50, (1, 63, 63, 3)).astype("float32")
    variables = random_variables(model, images.shape)
    params = variables["params"]
    x = relu(convolution(images, params["conv1"], strides=2, padding=1))
    x = response_norm(max_pool(x, 3, 2, ceil=True))
    x = relu(convolution(x, params["conv2"], strides=2))
    x = response_norm(max_pool(x, 3, 2, ceil=True))
    for name in ("conv3", "conv4", "conv5"):
        x = relu(convolution(x, params[name], padding=1))
    x = max_pool(x, 3, 2)
    assert x.shape == (1, 1, 1, 256)
    x = relu(dense(np.tile(x.ravel(), (1, 36)), params["fc6"]))
    x = relu(dense(x, params["fc7"]))
    # Float32 sums of up to 9216 products, eight layers deep: 1e-4 of 30 was seen.
    logits = model.apply(variables, images, train=False)
    np.testing.assert_allclose(logits, dense(x, params["fc8"]), rtol=1e-4, atol=1e-3)
