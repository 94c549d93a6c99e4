"""Trained here, used there, and the other way round: the same class for every test image."""

import importlib
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
import runs
from photo_folders import write_photos

from flaxcnn import model_folder
from flaxcnn.__main__ import main
from train import datasets, evaluate

pytestmark = [pytest.mark.torch, pytest.mark.slow]

DATASETS = ["digits", "fashion_mnist"]


def prepared(name: str) -> tuple[np.ndarray, np.ndarray]:
    """[N, 32, 32, 1] as a run prepares them, and their labels."""
    try:
        dataset = datasets.load(name, None, "train", None)
    except ValueError as error:
        pytest.skip(str(error))
    transform = model_folder.ImageClassification(
        crop_size=32, resize_size=32, mean=dataset.mean_and_std[0], std=dataset.mean_and_std[1]
    )
    examples = [dataset.test[i] for i in range(len(dataset.test))]
    images = np.stack([transform(image) for image, _ in examples])
    return images, np.array([label for _, label in examples])


def grey_resnet18(torch: Any) -> Any:
    """torchvision's, for images of one channel and ten classes."""
    importlib.import_module("torch_side")  # makes torchvision import
    net = importlib.import_module("torchvision.models").resnet18(num_classes=10)
    net.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return net


def classes_by(torch: Any, net: Any, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(500)
        return torch.cat([net.eval()(part).argmax(1) for part in parts]).numpy()


@pytest.mark.parametrize("name", DATASETS)
def test_trained_here_and_used_there(name: str, tmp_path: pathlib.Path) -> None:
    torch = importlib.import_module("torch")
    images, labels = prepared(name)
    flags = ("--arch=resnet18", f"--dataset={name}", "--steps=60", "--batch_size=64")
    runs.run(*flags, f"--workdir={tmp_path}/run")
    file = tmp_path / "weights.pth"
    assert main(["convert", f"{tmp_path}/run/model", str(file)]) == 0
    net = grey_resnet18(torch)
    net.load_state_dict(torch.load(file, weights_only=True), strict=True)
    theirs = classes_by(torch, net, images)

    saved = model_folder.load(tmp_path / "run" / "model")
    model = model_folder.registry.create_model(saved.arch, **saved.arguments)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False).argmax(-1))
    parts = np.split(images, range(500, len(images), 500))
    ours = np.concatenate([apply(saved.variables, part) for part in parts])
    np.testing.assert_array_equal(ours, theirs)
    logged = runs.records(tmp_path / "run", "test")[-1]
    assert logged["n"] == len(labels)
    assert round(logged["top1"] * len(labels)) == (theirs == labels).sum()


@pytest.mark.parametrize("name", DATASETS)
def test_trained_there_and_used_here(
    name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = importlib.import_module("torch")
    images, labels = prepared(name)
    torch.manual_seed(0)
    net = grey_resnet18(torch).train()
    sgd = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    rng = np.random.default_rng(0)
    for part in rng.integers(0, len(images), (50, 64)):  # on test images: to beat chance is enough
        sgd.zero_grad()
        batch = torch.from_numpy(images[part]).permute(0, 3, 1, 2)
        loss = torch.nn.functional.cross_entropy(net(batch), torch.from_numpy(labels[part]).long())
        loss.backward()
        sgd.step()
    right = (classes_by(torch, net, images) == labels).sum()
    assert right > 0.4 * len(labels)
    torch.save(net.state_dict(), tmp_path / "weights.pth")

    mean, std = datasets.load(name, None, "train", None).mean_and_std
    told = ("--image-size=32", f"--mean={mean[0]}", f"--std={std[0]}")
    folder = str(tmp_path / "model")
    assert main(["convert", str(tmp_path / "weights.pth"), folder, "--arch=resnet18", *told]) == 0
    capsys.readouterr()
    assert evaluate.command(["--model", folder, f"--dataset={name}", "--batch_size=256"]) == 0
    found = re.search(r"top-1 ([\d.]+)%  .* on (\d+) images", capsys.readouterr().out)
    assert found is not None
    assert int(found[2]) == len(labels)
    assert float(found[1]) == pytest.approx(100 * right / len(labels), abs=5e-4)  # as printed


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_a_tuned_network_gives_equal_logits_there(name: str, tmp_path: pathlib.Path) -> None:
    """torchvision's weights, tuned here on photos of other classes, and back to torchvision."""
    torch = importlib.import_module("torch")
    side = importlib.import_module("torch_side")
    torch.save(side.twin(name, 7).state_dict(), tmp_path / "before.pth")
    write_photos(tmp_path / "photos", 12)
    flags = (
        *(f"--arch={name}", f"--weights={tmp_path}/before.pth", "--transfer=finetune"),
        *("--dataset=folder", f"--data_dir={tmp_path}/photos", "--holdout=0.3"),
        *("--image_size=64", "--batch_size=8", "--steps=4", f"--workdir={tmp_path}/run"),
    )
    runs.run(*flags)
    file = tmp_path / "after.pth"
    assert main(["convert", f"{tmp_path}/run/model", str(file)]) == 0
    options = {}
    if name == "googlenet":
        options = {"aux_logits": False, "transform_input": True, "init_weights": False}
    models = importlib.import_module("torchvision.models")
    net = models.get_model(name, weights=None, num_classes=2, **options)
    net.load_state_dict(torch.load(file, weights_only=True), strict=True)

    saved = model_folder.load(tmp_path / "run" / "model")
    model = model_folder.registry.create_model(saved.arch, **saved.arguments)
    images = np.random.default_rng(1).normal(size=(2, 77, 90, 3)).astype("float32")
    ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(saved.variables, images)
    with torch.no_grad():
        theirs = net.eval()(side.channels_first(images)).numpy()
    assert np.abs(theirs).max() > 0.01
    # Float32 sums in another order; what is converted wrong is as large as the logits.
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)
