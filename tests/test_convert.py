"""The converter is strict: whatever does not fit is named, all of it at once."""

from typing import Any

import jax
import numpy as np
import pytest
from variables import random_variables

import flaxcnn
from flaxcnn.convert import torchvision_key

ARGUMENTS: dict[str, Any] = {"num_classes": 3}


@pytest.fixture
def state_dict() -> dict[str, np.ndarray]:
    """torchvision-named weights of a resnet18, each entry with values of its own."""
    model = flaxcnn.create_model("resnet18", **ARGUMENTS)
    variables = random_variables(model, (1, 32, 32, 3))
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        names = tuple(entry.key for entry in path[1:])
        value = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        found[torchvision_key(names)] = value
    return found


def test_names_are_torchvisions() -> None:
    assert torchvision_key(("layer1_0", "downsample_1", "scale")) == "layer1.0.downsample.1.weight"
    assert torchvision_key(("layer4_10", "bn2", "var")) == "layer4.10.bn2.running_var"
    assert torchvision_key(("inception3a", "branch2_0", "bn", "mean")) == (
        "inception3a.branch2.0.bn.running_mean"
    )
    assert torchvision_key(("classifier_6", "kernel")) == "classifier.6.weight"


def test_every_entry_arrives_in_its_place(state_dict: dict[str, np.ndarray]) -> None:
    variables = flaxcnn.from_torchvision("resnet18", state_dict, **ARGUMENTS)
    expected = random_variables(flaxcnn.create_model("resnet18", **ARGUMENTS), (1, 32, 32, 3))
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_a_flattened_layer_is_permuted() -> None:
    """One image, one unit: the weight of channel c at row h and column w stays with it."""
    model = flaxcnn.create_model("vgg11", **ARGUMENTS)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3)), train=False)
    )
    state_dict = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = tuple(entry.key for entry in path[1:])
        shape = leaf.shape[::-1] if leaf.ndim < 4 else [leaf.shape[i] for i in (3, 2, 0, 1)]
        state_dict[torchvision_key(names)] = np.zeros(shape, "float32")
    weight = np.zeros((4096, 512, 7, 7), "float32")
    weight[5, 100, 2, 6] = 1
    state_dict["classifier.0.weight"] = weight.reshape(4096, -1)
    params = flaxcnn.from_torchvision("vgg11", state_dict, **ARGUMENTS)["params"]
    kernel = np.asarray(params["classifier_0"]["kernel"]).reshape(7, 7, 512, 4096)
    assert kernel[2, 6, 100, 5] == 1
    assert kernel.sum() == 1


def test_all_faults_are_told_at_once(state_dict: dict[str, np.ndarray]) -> None:
    del state_dict["layer1.0.conv1.weight"]
    state_dict["layer1.0.conv3.weight"] = np.zeros(1)
    state_dict["fc.weight"] = state_dict["fc.weight"].T
    state_dict["bn1.bias"] = np.full(64, np.nan)
    state_dict["bn1.num_batches_tracked"] = np.array(7)
    with pytest.raises(ValueError, match="not a state_dict of resnet18") as caught:
        flaxcnn.from_torchvision("resnet18", state_dict, **ARGUMENTS)
    assert str(caught.value).splitlines()[1:] == [
        "  not finite: bn1.bias",
        "  shape: fc.weight (512, 3) does not fit fc/kernel (512, 3)",
        "  missing: layer1.0.conv1.weight (for layer1_0/conv1/kernel)",
        "  not expected: layer1.0.conv3.weight",
    ]
