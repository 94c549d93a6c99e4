"""The names under which EfficientNet-Lite's weights are published, and who lacks some of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variables import variable_shapes

import flaxcnn
from flaxcnn.convert import torchvision_key
from flaxcnn.lite_keys import lite_path

LITE = [f"efficientnet_lite{i}" for i in range(5)]


def lite_keys(name: str) -> list[str]:
    model = flaxcnn.create_model(name)
    shapes = variable_shapes(model, (1, 64, 64, 3))
    return [
        torchvision_key(lite_path(model, tuple(entry.key for entry in path[1:])))
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    ]


def test_lite_names_by_hand() -> None:
    """Lite4's stages have 1, 4, 4, 6, 6, 8 and 1 blocks, 30 in all."""
    model = flaxcnn.create_model("efficientnet_lite4")
    for path, key in {
        "features_0_0/kernel": "_conv_stem.weight",
        "features_0_1/var": "_bn0.running_var",
        "features_1_0/block_0_0/kernel": "_blocks.0._depthwise_conv.weight",
        "features_1_0/block_0_1/scale": "_blocks.0._bn1.weight",
        "features_1_0/block_1_1/mean": "_blocks.0._bn2.running_mean",
        "features_2_0/block_0_0/kernel": "_blocks.1._expand_conv.weight",
        "features_2_3/block_0_1/bias": "_blocks.4._bn0.bias",
        "features_3_0/block_1_0/kernel": "_blocks.5._depthwise_conv.weight",
        "features_7_0/block_2_0/kernel": "_blocks.29._project_conv.weight",
        "features_8_0/kernel": "_conv_head.weight",
        "features_8_1/scale": "_bn1.weight",
        "classifier_1/bias": "_fc.bias",
    }.items():
        assert torchvision_key(lite_path(model, tuple(path.split("/")))) == key


@pytest.mark.parametrize("name", LITE)
def test_lite_names_are_all_different(name: str) -> None:
    keys = lite_keys(name)
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("_") for key in keys)


@pytest.mark.parametrize(
    "path",
    [
        "features_8_0/block_0_0/kernel",  # a stage that is none
        "features_2_2/block_0_0/kernel",  # a block too many
        "features_1_0/block_2_0/kernel",  # without expansion there is no third layer
        "features_0_2/kernel",
        "classifier_1",
    ],
)
def test_lite_names_are_for_paths_that_exist(path: str) -> None:
    with pytest.raises(ValueError, match=f"EfficientNetLite has no {path}"):
        lite_path(flaxcnn.create_model("efficientnet_lite0"), tuple(path.split("/")))


def test_lite_weights_are_read_strictly() -> None:
    model = flaxcnn.create_model("efficientnet_lite0", num_classes=3)
    shapes = variable_shapes(model, (1, 64, 64, 3))
    state_dict = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = tuple(entry.key for entry in path[1:])
        shape = leaf.shape if len(leaf.shape) != 4 else tuple(leaf.shape[i] for i in (3, 2, 0, 1))
        shape = shape[::-1] if len(shape) == 2 else shape
        state_dict[torchvision_key(lite_path(model, names))] = np.ones(shape, "float32")
    state_dict["_bn0.num_batches_tracked"] = np.zeros((), "int64")
    variables = flaxcnn.from_torchvision("efficientnet_lite0", state_dict, num_classes=3)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)

    del state_dict["_blocks.3._bn1.bias"]
    state_dict["_blocks.0._expand_conv.weight"] = np.ones((32, 32, 1, 1), "float32")
    state_dict["_fc.weight"] = state_dict["_fc.weight"].T
    state_dict["_conv_head.weight"][0, 0] = np.nan
    with pytest.raises(ValueError, match="not a state_dict of efficientnet_lite0") as caught:
        flaxcnn.from_torchvision("efficientnet_lite0", state_dict, num_classes=3)
    faults = str(caught.value).splitlines()[1:]
    assert [fault.split("(")[0].split(" for")[0].strip() for fault in sorted(faults)] == [
        "missing: _blocks.3._bn1.bias",
        "not expected: _blocks.0._expand_conv.weight",
        "not finite: _conv_head.weight",
        "shape: _fc.weight",
    ]
