"""Every registered network, by name: sizes, shapes, and what it says to wrong input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variables import count, random_variables

import flaxcnn

# torchvision's `num_params`; LeNet-5: 60,000 up to F6 as the paper counts, and 850 behind it.
PARAMETERS = {
    "lenet5": 60_850,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
}
SMALLEST = ["lenet5", "resnet18", "vgg11_bn"]  # one per family


def test_the_list_is_complete() -> None:
    assert flaxcnn.list_models() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    model = flaxcnn.create_model(name)
    images = jnp.zeros((1, 32, 32, 1 if name == "lenet5" else 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert count(shapes["params"]) == PARAMETERS[name]


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_any_channels_and_classes(name: str, channels: int) -> None:
    model = flaxcnn.create_model(name, num_classes=3)
    shape = (2, 45, 37, channels)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))
    apply = jax.eval_shape(lambda v: model.apply(v, jnp.zeros(shape), train=False), shapes)
    assert apply.shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "features"), [("lenet5", 120), ("resnet18", 512), ("vgg11", 25088)]
)
def test_no_classes_gives_pooled_features(name: str, features: int) -> None:
    model = flaxcnn.create_model(name, num_classes=0)
    variables = random_variables(model, (1, 32, 32, 3))
    with_classes = flaxcnn.create_model(name, num_classes=4)
    assert set(variables["params"]) < set(random_variables(with_classes, (1, 32, 32, 3))["params"])
    assert model.apply(variables, jnp.ones((2, 40, 32, 3)), train=False).shape == (2, features)


@pytest.mark.parametrize("name", ["lenet5", "vgg11"])
def test_too_small_images_are_refused_with_the_least_size(name: str) -> None:
    model = flaxcnn.create_model(name)
    with pytest.raises(ValueError, match=r"at least 32x32; got 31x40"):
        model.init(jax.random.key(0), jnp.zeros((1, 31, 40, 3)), train=False)
    with pytest.raises(ValueError, match=r"\[N, H, W, C\]"):
        model.init(jax.random.key(0), jnp.zeros((32, 32, 3)), train=False)


@pytest.mark.parametrize("name", SMALLEST)
def test_bfloat16_computes_in_bfloat16_and_keeps_the_rest_in_float32(name: str) -> None:
    wide, narrow = (flaxcnn.create_model(name, dtype=d) for d in (jnp.float32, jnp.bfloat16))
    variables = random_variables(narrow, (1, 32, 32, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    ours = narrow.apply(variables, images, train=False)
    exact = wide.apply(variables, images, train=False)
    assert ours.dtype == jnp.float32
    difference = float(jnp.abs(ours - exact).max() / jnp.abs(exact).max())
    # bfloat16 has eight bits: some rounding there must be, and no more than a few per cent.
    assert 1e-4 < difference < 0.1


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet5'; did you mean .*resnet50"):
        flaxcnn.create_model("resnet5")
    with pytest.raises(ValueError, match=r"known: lenet5, resnet101"):
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
