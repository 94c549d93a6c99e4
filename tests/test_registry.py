"""Every registered network, by name: sizes, shapes, and what it says to wrong input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import MODELS
from variables import count, random_variables

import flaxcnn

# torchvision's `num_params`, GoogLeNet's auxiliary heads included.
TORCHVISION = {
    "alexnet": 61_100_840,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "efficientnet_b5": 30_389_784,
    "efficientnet_b6": 43_040_704,
    "efficientnet_b7": 66_347_960,
    "efficientnet_v2_l": 118_515_272,
    "efficientnet_v2_m": 54_139_356,
    "efficientnet_v2_s": 21_458_488,
    "googlenet": 13_004_888,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "resnext50_32x4d": 25_028_904,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "wide_resnet101_2": 126_886_696,
    "wide_resnet50_2": 68_883_240,
}
# Not in torchvision; test_<family>.py has where they come from. LeNet: of grey images.
OTHERS = {
    "alexnet_2012": 60_965_224,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "efficientnet_lite3": 8_197_096,
    "efficientnet_lite4": 13_006_568,
    "googlenet_v1": 13_378_280,
    "lecun1989": 9_760,
    "lenet5": 60_850,
    "plain18": 11_515_688,
    "plain20": 269_722,
    "plain34": 21_623_848,
    "plain56": 853_018,
    "resnet101_v2": 44_541_480,
    "resnet110": 1_727_962,
    "resnet152_v2": 60_185_128,
    "resnet18_v2": 11_687_720,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet50_v2": 25_549_352,
    "resnet56": 853_018,
    "vgg11_lrn": 132_863_336,
    "zfnet": 62_357_608,
}
PARAMETERS = {**TORCHVISION, **OTHERS}
# One per base class, with the least images that all of them take.
SMALLEST = [
    *("lecun1989", "lenet5", "alexnet", "alexnet_2012", "zfnet", "vgg11_bn", "googlenet"),
    *("googlenet_v1", "resnet18", "resnet20", "resnet18_v2", "efficientnet_b0"),
    "efficientnet_lite0",
]
FEATURES = {
    "lecun1989": 30,
    "lenet5": 120,
    "alexnet": 9216,
    "alexnet_2012": 9216,
    "zfnet": 9216,
    "vgg11": 25088,
    "googlenet": 1024,
    "googlenet_v1": 1024,
    "resnet18": 512,
    "resnet20": 64,
    "resnet18_v2": 512,
    "efficientnet_b0": 1280,
    "efficientnet_lite0": 1280,
}


def test_the_list_is_complete() -> None:
    assert flaxcnn.list_models() == sorted(PARAMETERS)
    assert sorted(TORCHVISION) == MODELS


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    model = flaxcnn.create_model(name)
    images = jnp.zeros((1, 64, 64, 1 if name in ("lecun1989", "lenet5") else 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert count(shapes["params"]) == PARAMETERS[name]


def test_googlenet_without_its_auxiliary_heads() -> None:
    """6,624,904: what torchvision's metadata counts."""
    model = flaxcnn.create_model("googlenet", aux_logits=False)
    images = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert count(shapes["params"]) == 6_624_904


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_any_channels_and_classes(name: str, channels: int) -> None:
    model = flaxcnn.create_model(name, num_classes=3)
    shape = (2, 75, 67, channels)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))
    apply = jax.eval_shape(lambda v: model.apply(v, jnp.zeros(shape), train=False), shapes)
    assert apply.shape == (2, 3)


@pytest.mark.parametrize(("name", "features"), FEATURES.items())
def test_no_classes_gives_pooled_features(name: str, features: int) -> None:
    images = jax.ShapeDtypeStruct((2, 75, 67, 3), jnp.float32)

    def shapes(num_classes: int) -> Any:
        model = flaxcnn.create_model(name, num_classes=num_classes)
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
        output = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
        return variables["params"], output

    params, pooled = shapes(0)
    params_with_classes, _ = shapes(4)
    assert set(params) < set(params_with_classes)
    assert pooled.shape == (2, features)


@pytest.mark.parametrize("name", PARAMETERS)
def test_too_small_images_are_refused_with_the_least_size(name: str) -> None:
    model = flaxcnn.create_model(name)
    least = model.min_size
    if least > 1:
        too_small = jnp.zeros((1, least - 1, 80, 3))
        with pytest.raises(ValueError, match=rf"at least {least}x{least}; got {least - 1}x80"):
            jax.eval_shape(lambda: model.init(jax.random.key(0), too_small, train=False))
    with pytest.raises(ValueError, match=r"\[N, H, W, C\]"):
        model.init(jax.random.key(0), jnp.zeros((80, 80, 3)), train=False)


@pytest.mark.parametrize("name", SMALLEST)
def test_bfloat16_computes_in_bfloat16_and_keeps_the_rest_in_float32(name: str) -> None:
    wide, narrow = (flaxcnn.create_model(name, dtype=d) for d in (jnp.float32, jnp.bfloat16))
    variables = random_variables(narrow, (1, 64, 64, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    ours, exact = (
        jax.jit(lambda v, x, model=model: model.apply(v, x, train=False))(variables, images)
        for model in (narrow, wide)
    )
    assert ours.dtype == jnp.float32
    difference = float(jnp.abs(ours - exact).max() / jnp.abs(exact).max())
    # bfloat16 has eight bits: some rounding there must be, and no more than a few per cent.
    assert 1e-4 < difference < 0.1


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet5'; did you mean .*resnet50"):
        flaxcnn.create_model("resnet5")
    with pytest.raises(ValueError, match=r"known: alexnet, alexnet_2012, efficientnet_b0"):
        flaxcnn.create_model("")


def test_an_unknown_argument_lists_what_there_is() -> None:
    with pytest.raises(TypeError, match=r"resnet18 has no argument classes; it has .*num_classes"):
        flaxcnn.create_model("resnet18", classes=3)
    with pytest.raises(TypeError, match="has no argument min_size"):  # a constant, no argument
        flaxcnn.create_model("resnet18", min_size=3)


def test_train_has_no_default() -> None:
    model = flaxcnn.create_model("lenet5")
    with pytest.raises(TypeError, match="train"):
        model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
