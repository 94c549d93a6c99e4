"""Model folders: what is written is read again, and nothing half-written or wrong is."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from variables import random_variables

import flaxcnn
from flaxcnn import model_folder
from flaxcnn.model_folder import ModelFolder
from flaxcnn.transforms import ImageClassification

TRANSFORM = ImageClassification(
    crop_size=32, resize_size=37, mean=(0.3,), std=(0.4,), interpolation="bicubic"
)


@pytest.fixture(name="saved")
def folder_of_lenet(tmp_path: pathlib.Path) -> tuple[pathlib.Path, ModelFolder]:
    """LeNet-5, whose kernels of rank 3 torchvision's layouts do not know."""
    model = flaxcnn.create_model("lenet5", num_classes=4)
    folder = ModelFolder(
        arch="lenet5",
        arguments=model_folder.arguments_of("lenet5", model),
        variables=random_variables(model, (1, 32, 32, 1)),
        class_names=["zero", "one", "two", "Żółć"],
        transform=TRANSFORM,
    )
    model_folder.save(tmp_path / "model", folder)
    return tmp_path / "model", folder


def test_all_of_it_is_read_again(saved: Any) -> None:
    path, written = saved
    read = model_folder.load(path)
    assert read.arch == "lenet5"
    assert read.arguments == {"num_classes": 4}
    assert read.class_names == written.class_names
    assert read.transform == TRANSFORM
    jax.tree.map(np.testing.assert_array_equal, read.variables, written.variables)
    assert sorted(file.name for file in path.iterdir()) == ["model.json", "weights.safetensors"]


def test_arguments_are_the_numbers_that_are_not_usual() -> None:
    model = flaxcnn.create_model(
        "googlenet", num_classes=1000, aux_logits=False, dropout_rate=0.5, dtype="bfloat16"
    )
    assert model_folder.arguments_of("googlenet", model) == {
        "num_classes": 1000,
        "aux_logits": False,
        "dropout_rate": 0.5,
    }


def test_a_folder_is_one_when_its_description_is_there(saved: Any) -> None:
    path, _ = saved
    assert model_folder.is_one(path)
    (path / "model.json").rename(path / "model.json.part")
    assert not model_folder.is_one(path)
    with pytest.raises(flaxcnn.WeightsError, match="no model folder: No such file"):
        model_folder.load(path)


def test_saving_again_replaces(saved: Any) -> None:
    path, written = saved
    doubled = jax.tree.map(lambda x: 2 * x, written.variables)
    model_folder.save(path, dataclasses.replace(written, variables=doubled))
    jax.tree.map(np.testing.assert_array_equal, model_folder.load(path).variables, doubled)


def test_a_place_that_cannot_be_written_is_told(saved: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(flaxcnn.WeightsError, match="not written"):
        model_folder.save(tmp_path / "file", saved[1])


# --------------------------------------------------------------------------- untrusted folders
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "written in format 2, this reads 1"),
        ({"arch": "lenet6"}, "unknown model 'lenet6'"),
        ({"arch": ["lenet5"]}, "the network is called"),
        ({"format": "1"}, "written in format '1'"),
        ({"arguments": {"num_classes": "4"}}, "the argument 'num_classes', or its value"),
        ({"arguments": {"norm": 1, "num_classes": 4}}, "the argument 'norm'"),
        ({"arguments": {"num_classes": 4.0}}, "the argument 'num_classes'"),
        ({"arguments": {"num_classes": 4, "aux_logits": True}}, "has no argument aux_logits"),
        # Of an EfficientNet it would be hours of tracing.
        ({"arguments": {"num_classes": 4, "depth": 1e9}}, "the argument 'depth'"),
        ({"arguments": {"num_classes": 10**12}}, "1000000000000 classes"),
        ({"arguments": None}, "not usable"),
        ({"transform": {"crop_size": 32}}, "not usable"),
        ({"transform": {**dataclasses.asdict(TRANSFORM), "crop_size": "32"}}, "crop_size"),
        ({"transform": {**dataclasses.asdict(TRANSFORM), "crop_size": 10**9}}, "crop_size"),
        ({"transform": {**dataclasses.asdict(TRANSFORM), "std": [0.0]}}, "std"),
        ({"transform": {**dataclasses.asdict(TRANSFORM), "std": [1.0, 1.0]}}, "std"),
        ({"transform": {**dataclasses.asdict(TRANSFORM), "interpolation": "x"}}, "interpolation"),
        ({"transform": {**dataclasses.asdict(TRANSFORM), "mean": []}}, "mean"),
        ({"classes": ["a", "b"]}, "not 4 class names"),
        ({"classes": "abcd"}, "not 4 class names"),
        ({"classes": ["a", "b", "c", "\x1b[2J"]}, "no printable text"),
        ({"classes": ["a", "b", "c", ["d"]]}, "no printable text"),
        ({"sha256": "0" * 64}, "is not the one that model.json describes"),
    ],
)
def test_wrong_descriptions_are_refused(saved: Any, change: dict[str, Any], message: str) -> None:
    path, _ = saved
    description = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps({**description, **change}))
    with pytest.raises(flaxcnn.WeightsError, match=message):
        model_folder.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"7"])
def test_what_is_no_description_is_refused(saved: Any, content: bytes) -> None:
    path, _ = saved
    (path / "model.json").write_bytes(content)
    with pytest.raises(flaxcnn.WeightsError, match=r"model\.json"):
        model_folder.load(path)


def test_weights_that_do_not_fit_are_told_all_at_once(saved: Any) -> None:
    path, written = saved
    variables = jax.tree.map(np.copy, written.variables)
    params = variables["params"]
    params["F6"]["bias"][0] = np.nan
    params["C9"] = {"kernel": np.zeros((3, 2), "float32")}
    params["output"]["kernel"] = np.zeros((5, 4), "float32")
    del params["C1"]["bias"]
    model_folder.save(path, dataclasses.replace(written, variables=variables))
    with pytest.raises(flaxcnn.WeightsError, match="not a lenet5") as caught:
        model_folder.load(path)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: params/C1/bias",
        "  not expected: params/C9/kernel",
        "  not finite: params/F6/bias",
        "  shape: params/output/kernel (5, 4) is not (84, 4)",
    ]


def test_weights_cut_short_are_refused(saved: Any) -> None:
    path, _ = saved
    whole = (path / "weights.safetensors").read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        (path / "weights.safetensors").write_bytes(whole[:length])
        with pytest.raises(flaxcnn.WeightsError, match=r"weights\.safetensors"):
            model_folder.load(path)


def test_a_second_save_that_was_cut_off_is_not_read(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights are there, and the description of the old ones."""
    path, written = saved
    doubled = jax.tree.map(lambda x: 2 * x, written.variables)
    monkeypatch.setattr(model_folder.json, "dump", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model_folder.save(path, dataclasses.replace(written, variables=doubled))
    with pytest.raises(flaxcnn.WeightsError, match="is not the one that"):
        model_folder.load(path)


@pytest.mark.parametrize("dtype", ["float64", "int32", "bool", "complex64"])
def test_other_types_are_refused(saved: Any, dtype: str) -> None:
    path, written = saved
    variables = jax.tree.map(lambda x: np.ones(x.shape, dtype), written.variables)
    model_folder.save(path, dataclasses.replace(written, variables=variables))
    with pytest.raises(flaxcnn.WeightsError, match=f"type: params/C1/bias {dtype} is not float32"):
        model_folder.load(path)


def test_networks_that_a_folder_cannot_describe_are_refused() -> None:
    model = flaxcnn.create_model("resnet20", stage_sizes=(1, 1, 1))
    with pytest.raises(flaxcnn.WeightsError, match="another stage_sizes"):
        model_folder.arguments_of("resnet20", model)
