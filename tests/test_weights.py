"""The enums of published weights: what they say, against the networks, and against torchvision."""

import importlib
import math
import re
from typing import Any

import pytest
from shapes import macs_of, paper_images
from twins import MODELS
from variables import count, variable_shapes

import flaxcnn
from flaxcnn import weights as published
from flaxcnn.weights import WeightsEnum, get_model_weights, get_weight

ALL = [
    member for name in published.COSTS for member in get_model_weights(name)
]  # without DEFAULT, which is one of the others


def test_each_network_of_torchvision_has_weights_and_one_besides() -> None:
    assert set(published.COSTS) == {*MODELS, "efficientnet_lite0"}
    assert flaxcnn.list_models(weights=True) == sorted(published.COSTS)
    for name in published.COSTS:
        enum_class = get_model_weights(name)
        assert enum_class.__members__["DEFAULT"].arch == name
        assert getattr(flaxcnn, enum_class.__name__) is enum_class
    assert {"IMAGENET1K_V1", "IMAGENET1K_V2", "IMAGENET1K_FEATURES"} == {w.name for w in ALL}


@pytest.mark.parametrize("name", published.COSTS)
def test_parameters_and_macs_are_the_networks(name: str) -> None:
    meta = get_model_weights(name).__members__["DEFAULT"].meta
    # GoogLeNet's are counted without its auxiliary heads.
    arguments = {"aux_logits": False} if name == "googlenet" else {}
    model = flaxcnn.create_model(name, **arguments)
    side = get_model_weights(name).__members__["DEFAULT"].transforms().crop_size
    assert count(variable_shapes(model, (1, side, side, 3))["params"]) == meta["num_params"]
    macs = sum(macs_of(model, (1, side, side, 3)).values())
    # torchvision counts some layers besides convolutions and dense ones, and rounds to a million.
    assert meta["macs"] == pytest.approx(macs, rel=0.005)
    assert set(meta["min_size"]) >= {model.min_size} or name.startswith("efficientnet_v2")


@pytest.mark.parametrize("weights", ALL, ids=str)
def test_metadata_is_complete(weights: WeightsEnum) -> None:
    meta = weights.meta
    assert (len(meta["categories"]), meta["categories"][0]) == (1000, "tench")
    assert len(set(meta["categories"])) == 1000
    assert re.fullmatch("[0-9a-f]{8}", weights.sha256_prefix)
    if weights.arch != "efficientnet_lite0":
        assert weights.url.endswith(f"-{weights.sha256_prefix}.pth")
    assert weights.url.startswith("https://")
    assert meta["recipe"].startswith("https://github.com/")
    assert meta["license"]
    assert 50 < meta["acc@1"] < 90 or weights.name == "IMAGENET1K_FEATURES"
    preset = weights.transforms()
    assert preset.crop_size <= preset.resize_size <= preset.crop_size + 40


@pytest.mark.torch
@pytest.mark.parametrize("weights", [w for w in ALL if w.arch in MODELS], ids=str)
def test_weights_are_torchvisions(weights: WeightsEnum) -> None:
    importlib.import_module("torch_side")  # makes torchvision import
    models: Any = importlib.import_module("torchvision.models")
    theirs = models.get_weight(str(weights))
    assert weights.url == theirs.url
    meta, expected = weights.meta, theirs.meta
    accuracy = expected["_metrics"]["ImageNet-1K"]
    for name in ("acc@1", "acc@5"):
        assert meta[name] == accuracy[name] or math.isnan(meta[name] + accuracy[name])
    assert meta["num_params"] == expected["num_params"]
    assert meta["macs"] == round(expected["_ops"] * 1e9)
    assert meta["min_size"] == expected["min_size"]
    assert meta["recipe"] == expected["recipe"]
    # "IMAGENET1K_FEATURES" has no head, and torchvision none or all of the names for it.
    assert meta["categories"] == (expected["categories"] or meta["categories"])
    ours, preset = weights.transforms(), theirs.transforms()
    assert [ours.crop_size] == preset.crop_size
    assert [ours.resize_size] == preset.resize_size
    assert list(ours.mean) == preset.mean
    assert list(ours.std) == preset.std
    assert ours.interpolation == preset.interpolation.value
    enum_class = models.get_model_weights(weights.arch)
    assert type(weights).__members__.keys() == enum_class.__members__.keys()
    assert type(weights).__members__["DEFAULT"].name == enum_class.DEFAULT.name


def test_weights_are_found_by_name() -> None:
    weights = get_weight("ResNet50_Weights.IMAGENET1K_V2")
    assert weights is flaxcnn.ResNet50_Weights.IMAGENET1K_V2
    assert get_weight("ResNet50_Weights.DEFAULT") is weights
    assert get_weight("VGG16_Weights.IMAGENET1K_FEATURES").arch == "vgg16"
    assert get_model_weights("wide_resnet50_2") is flaxcnn.Wide_ResNet50_2_Weights


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ResNet5_Weights.DEFAULT", "did you mean .*ResNet50_Weights"),
        ("ResNet50_Weights.V2", "ResNet50_Weights has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("ResNet50_Weights", "ResNet50_Weights has IMAGENET1K_V1"),
        ("zzz", "such as ResNet50_Weights.DEFAULT"),
    ],
)
def test_unknown_weights_are_told_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_weight(name)


def test_networks_without_weights_are_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no published weights of 'resnet50_v2'; .* resnet50"):
        get_model_weights("resnet50_v2")


def test_default_sizes_are_those_of_the_weights() -> None:
    """Of the networks; but B2, which torchvision evaluates at 288 and its paper at 260."""
    differing = {
        name
        for name in published.COSTS
        if paper_images(name)[1]
        != get_model_weights(name).__members__["DEFAULT"].transforms().crop_size
    }
    assert differing == {"efficientnet_b2"}
