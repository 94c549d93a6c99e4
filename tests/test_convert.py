"""The converter is strict: whatever does not fit is named, all of it at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variables import assert_same_state_dict, random_variables

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


def test_float64_and_devices_as_the_calling_thread_has_them(
    state_dict: dict[str, np.ndarray],
) -> None:
    """Of as many bytes as several threads look at."""
    wide = {key: value.astype(np.float64) + 1e-12 for key, value in state_dict.items()}
    assert sum(value.nbytes for value in wide.values()) > 2**26
    with jax.enable_x64(), jax.default_device(jax.devices()[3]):
        variables = flaxcnn.from_torchvision("resnet18", wide, dtype=jnp.float64, **ARGUMENTS)
    leaves = jax.tree.leaves(variables)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float64")}
    assert {leaf.device for leaf in leaves} == {jax.devices()[3]}
    np.testing.assert_array_equal(variables["params"]["fc"]["bias"], wide["fc.bias"])


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


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_types_become_float32(state_dict: dict[str, np.ndarray], dtype: str) -> None:
    narrow = {key: value.astype(jnp.dtype(dtype)) for key, value in state_dict.items()}
    variables = flaxcnn.from_torchvision("resnet18", narrow, **ARGUMENTS)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    expected = narrow["layer1.0.conv1.weight"].astype("float32").transpose(2, 3, 1, 0)
    kernel = variables["params"]["layer1_0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize("dtype", ["int64", "complex64", "bool"])
def test_what_is_no_floating_point_is_refused(
    state_dict: dict[str, np.ndarray], dtype: str
) -> None:
    state_dict["bn1.weight"] = np.ones(64, dtype)
    with pytest.raises(flaxcnn.WeightsError, match=f"numbers: bn1.weight is {dtype}"):
        flaxcnn.from_torchvision("resnet18", state_dict, **ARGUMENTS)


# ------------------------------------------------------------------------------- the way back
@pytest.mark.parametrize(
    ("name", "arguments", "in_channels"),
    [
        ("resnet20", {"num_classes": 7}, 1),
        ("googlenet", {"num_classes": 3, "aux_logits": True}, 3),
        ("googlenet", {"num_classes": 3, "aux_logits": False}, 4),
        ("efficientnet_lite0", {"num_classes": 5}, 3),
        ("lenet5", {}, 3),
    ],
)
def test_round_trip(name: str, arguments: dict[str, Any], in_channels: int) -> None:
    """Bit for bit; classes, channels and auxiliary heads are seen from the variables."""
    model = flaxcnn.create_model(name, **arguments)
    variables = random_variables(model, (1, 32, 32, in_channels))
    state_dict = flaxcnn.to_torchvision(name, variables)
    again = flaxcnn.from_torchvision(name, state_dict, in_channels=in_channels, **arguments)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert_same_state_dict(flaxcnn.to_torchvision(name, again), state_dict)


def test_norms_get_their_number_of_batches() -> None:
    model = flaxcnn.create_model("resnet20")
    state_dict = flaxcnn.to_torchvision("resnet20", random_variables(model, (1, 32, 32, 3)))
    counters = [key for key in state_dict if key.endswith("num_batches_tracked")]
    assert len(counters) == 19
    assert state_dict["layer1.0.bn1.num_batches_tracked"].dtype == np.int64
    assert state_dict["layer1.0.bn1.num_batches_tracked"].shape == ()
    for value in state_dict.values():  # torch.from_numpy warns of what cannot be written to
        assert value.flags.writeable
        assert value.flags.c_contiguous


def test_all_faults_on_the_way_back_are_told_at_once() -> None:
    model = flaxcnn.create_model("resnet20", **ARGUMENTS)
    variables = random_variables(model, (1, 32, 32, 3))
    params = variables["params"]
    del params["layer1_0"]["conv1"]
    params["layer9"] = {"kernel": np.zeros(1)}
    params["bn1"]["scale"] = np.ones((16, 2))
    params["conv1"]["kernel"][0, 0, 0, 0] = np.inf
    with pytest.raises(flaxcnn.WeightsError, match="not the variables of resnet20") as caught:
        flaxcnn.to_torchvision("resnet20", variables)
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  missing: layer1_0/conv1/kernel (for layer1.0.conv1.weight)",
        "  not expected: layer9/kernel",
        "  not finite: conv1/kernel",
        "  shape: bn1/scale (16, 2) is not (16,)",
    ]
