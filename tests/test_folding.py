"""Networks with folded batch norm give the logits of those they are of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import linen as nn
from shallow import shallow
from variables import random_variables

import flaxcnn
from flaxcnn.folding import Offset

WITHOUT = ("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_lrn")
WITH_NORM = [
    name
    for name in flaxcnn.list_models()
    if hasattr(flaxcnn.create_model(name), "norm") and name not in WITHOUT
]


def images_for(model: Any, channels: int = 3) -> np.ndarray:
    side = max(37, model.min_size + 2)
    return np.random.default_rng(0).normal(size=(2, side, side, channels)).astype("float32")


def logits(model: Any, variables: Any, images: np.ndarray) -> np.ndarray:
    run = jax.jit(lambda v, x: model.apply(v, x, train=False), compiler_options=quick.OPTIONS)
    return np.asarray(run(variables, images))


def assert_same(after: Any, before: Any) -> None:
    """But for rounding: each kernel is rounded once more; a wrong epsilon was far beyond it."""
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_NORM)
def test_logits_are_the_same(name: str) -> None:
    """Random statistics and affine terms, all the logits; shallow, with blocks of each kind."""
    model = shallow(flaxcnn.create_model(name, num_classes=7))
    images = images_for(model)
    variables = random_variables(model, images.shape)
    folded, folded_variables = flaxcnn.fold_batchnorm(model, variables)
    assert folded_variables.keys() == {"params"}
    before, after = logits(model, variables, images), logits(folded, folded_variables, images)
    assert_same(after, before)


def folded_resnet18(channels: int = 3, **arguments: Any) -> tuple[Any, Any, Any, Any]:
    """The network, its variables, and both folded."""
    model = flaxcnn.create_model("resnet18", **arguments)
    variables = random_variables(model, (1, 32, 32, channels))
    return model, variables, *flaxcnn.fold_batchnorm(model, variables)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_factor_of_a_resnet_is_in_a_kernel(dtype: Any) -> None:
    _, variables, _, folded = folded_resnet18(dtype=dtype)
    leaves = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(folded)]
    assert leaves.count("scale") == 0
    # 17 convolutions and 3 projections with a norm each; the dense layer's bias.
    assert leaves.count("bias") == 21
    assert leaves.count("kernel") == 21
    assert "scale" in variables["params"]["bn1"]  # what was given stays as it was


def test_a_pre_activated_norm_keeps_its_factor() -> None:
    model = flaxcnn.create_model("resnet18_v2")
    variables = random_variables(model, (1, 32, 32, 3))
    _, folded = flaxcnn.fold_batchnorm(model, variables)
    block = folded["params"]["layer2_1"]
    assert block["bn1"].keys() == {"scale", "bias"}  # behind an addition
    assert block["bn2"].keys() == {"bias"}  # behind conv1


class Nested(nn.Module):
    """A network within another."""

    backbone: nn.Module

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.backbone(x, train=train)


def test_within_another_module_factors_stay() -> None:
    model = flaxcnn.create_model("resnet18_v2", num_classes=7)
    images = images_for(model)
    variables = random_variables(model, images.shape)
    folded, folded_variables = flaxcnn.fold_batchnorm(model, variables)
    nested = Nested(folded.clone(name="backbone", parent=None))
    inside = {"params": {"backbone": folded_variables["params"]}}
    before, after = logits(model, variables, images), logits(nested, inside, images)
    assert_same(after, before)


def test_a_head_that_is_not_used_may_be_there() -> None:
    _, variables, _, _ = folded_resnet18()
    headless = flaxcnn.create_model("resnet18", num_classes=0)
    images = images_for(headless)
    folded, folded_variables = flaxcnn.fold_batchnorm(headless, variables)
    before = logits(headless, variables, images)
    after = logits(folded, folded_variables, images)
    assert_same(after, before)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_may_have_other_channels(channels: int) -> None:
    model, variables, folded, folded_variables = folded_resnet18(channels, num_classes=0)
    images = images_for(model, channels)
    before, after = logits(model, variables, images), logits(folded, folded_variables, images)
    assert_same(after, before)


def test_features_are_the_same() -> None:
    model, variables, folded, folded_variables = folded_resnet18()
    images = images_for(model)
    ours, theirs = (
        flaxcnn.extract_features(net, of, images, ["layer2"])["layer2"]
        for net, of in ((folded, folded_variables), (model, variables))
    )
    assert_same(ours, theirs)


def test_in_bfloat16_the_logits_are_as_near_to_float32_as_before() -> None:
    model, variables, _, _ = folded_resnet18()
    images, narrow = images_for(model), jnp.bfloat16
    exact = logits(model, variables, images)
    narrow_model = model.clone(dtype=narrow)
    errors = [
        np.linalg.norm(logits(net, of, images) - exact)
        for net, of in (
            flaxcnn.fold_batchnorm(narrow_model, variables),
            (narrow_model, variables),
        )
    ]
    # Roundings are as good as random: two runs of the same quality differ by some tens of per cent.
    assert errors[0] < 1.5 * errors[1]


def test_in_bfloat16_what_is_left_of_a_norm_is_added_in_it() -> None:
    """As cuDNN takes it into the convolution: nothing of a map is in float32."""
    _, _, net, folded = folded_resnet18(dtype=jnp.bfloat16)
    program = jax.jit(lambda v, x: net.apply(v, x, train=False))
    text = program.lower(folded, jnp.zeros((2, 64, 64, 3))).as_text()
    assert "tensor<2x16x16x64xbf16>" in text
    assert "tensor<2x16x16x64xf32>" not in text


def test_what_is_folded_folds_again_to_itself() -> None:
    _, _, folded, variables = folded_resnet18()
    again, same = flaxcnn.fold_batchnorm(folded, variables)
    assert again is folded
    assert same == variables


@pytest.mark.parametrize(("name", "side"), [("lenet5", 32), ("lecun1989", 16)])
def test_without_batch_norm_nothing_changes(name: str, side: int) -> None:
    model = flaxcnn.create_model(name)
    variables = random_variables(model, (1, side, side, 1))
    folded, same = flaxcnn.fold_batchnorm(model, variables)
    assert folded is model
    assert same == variables


def test_training_is_refused() -> None:
    _, _, folded, variables = folded_resnet18()
    with pytest.raises(ValueError, match="evaluates only"):
        folded.apply(variables, images_for(folded), train=True)


def test_another_module_is_refused() -> None:
    with pytest.raises(TypeError, match="create_model"):
        flaxcnn.fold_batchnorm(Offset(jnp.float32), {})
