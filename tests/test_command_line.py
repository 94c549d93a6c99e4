"""`python -m flaxcnn`: what it answers, and what it says to wrong input."""

import csv
import io
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from complaints import complaint
from PIL import Image
from variables import assert_same_state_dict, random_variables

import flaxcnn
from flaxcnn import model_folder
from flaxcnn.__main__ import main
from flaxcnn.state_dicts import read_state_dict, write_state_dict
from flaxcnn.transforms import ImageClassification

CLASSES = ["bag", "boot", "coat", "dress", "sandal", "shirt", "trouser"]
TRANSFORM = ImageClassification(crop_size=32, resize_size=40, mean=(0.5,) * 3, std=(0.3,) * 3)


@pytest.fixture(scope="module", name="network")
def small_network() -> tuple[Any, Any]:
    model = flaxcnn.create_model("resnet20", num_classes=7)
    return model, random_variables(model, (1, 32, 32, 3))


@pytest.fixture(name="model")
def saved_model(network: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    saved = model_folder.ModelFolder(
        arch="resnet20",
        arguments={"num_classes": 7},
        variables=network[1],
        class_names=CLASSES,
        transform=TRANSFORM,
    )
    model_folder.save(tmp_path / "model", saved)
    return tmp_path / "model"


@pytest.fixture(name="photos")
def three_photos(tmp_path: pathlib.Path) -> pathlib.Path:
    """Of several sizes and channels, to be computed in two batches."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, shape in {"a.png": (50, 70, 3), "b.bmp": (64, 33), "c.png": (32, 32, 3)}.items():
        picture = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def expected_of(network: Any, photo: pathlib.Path) -> np.ndarray:
    """Probabilities [7], one picture at a time."""
    image = TRANSFORM(Image.open(photo))
    logits = np.asarray(network[0].apply(network[1], image[None], train=False), "float64")[0]
    return np.exp(logits) / np.exp(logits).sum()


# --------------------------------------------------------------------------------------- predict
def test_predictions_are_the_networks(
    network: Any, model: pathlib.Path, photos: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", str(photos), "--model", str(model), "--top=7", "--batch-size=2"]
    assert main([*arguments, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["image"] for record in records] == sorted(map(str, photos.iterdir()))
    for record in records:
        expected = expected_of(network, pathlib.Path(record["image"]))
        order = [guess["class_index"] for guess in record["classes"]]
        assert order == np.argsort(-expected).tolist()
        for guess in record["classes"]:
            assert guess["class_name"] == CLASSES[guess["class_index"]]
            # Float32 logits, of batches compiled otherwise.
            assert guess["probability"] == pytest.approx(expected[guess["class_index"]], abs=1e-5)

    assert main([*arguments, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 3 * 7
    assert rows[8]["class_name"] == records[1]["classes"][1]["class_name"]

    assert main(["predict", str(photos / "c.png"), "--model", str(model), "--top", "1"]) == 0
    path, guess = capsys.readouterr().out.splitlines()
    assert path == str(photos / "c.png")
    best = records[2]["classes"][0]
    assert guess.split() == [f"{best['probability']:.2%}", best["class_name"]]


def test_broken_pictures_are_told_and_the_others_answered(
    model: pathlib.Path, photos: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "b.png").write_bytes(b"no picture")
    assert main(["predict", str(photos), "--model", str(model), "--json"]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 3
    assert err == f"python -m flaxcnn: {photos / 'b.png'}: none of JPEG, PNG, WEBP, BMP\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone.jpg", "--arch=resnet18"), "gone.jpg: no such file"),
        ((".", "--model=gone"), "gone: no model folder"),
        ((".", "--model=gone", "--weights=DEFAULT"), "a model folder has its own"),
        ((".", "--arch=resnet5"), "did you mean"),
        ((".", "--arch=zfnet"), "no published weights of 'zfnet'"),
    ],
)
def test_wrong_requests(
    arguments: tuple[str, ...],
    message: str,
    photos: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image, *others = arguments
    image = str(photos) if image == "." else image
    assert message in complaint(capsys, "predict", image, *others)


@pytest.mark.parametrize(
    "arguments",
    [(), ("predict", "a.jpg"), ("predict", "a.jpg", "--arch=x", "--top=0"), ("models", "--sort=x")],
)
def test_wrong_command_lines(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


# --------------------------------------------------------------------------------------- convert
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back(
    network: Any, model: pathlib.Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, again = model.with_name(f"weights{suffix}"), model.with_name("again")
    assert main(["convert", str(model), str(file)]) == 0
    expected = flaxcnn.to_torchvision("resnet20", network[1])
    found = read_state_dict(file)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)
    assert capsys.readouterr().out == f"{file}: resnet20\n"

    assert main(["convert", str(file), str(again), "--arch=resnet20"]) == 0
    read = model_folder.load(again)
    assert read.class_names == [str(i) for i in range(7)]  # a file does not say them
    assert read.transform.crop_size == 32  # of CIFAR's images
    for path, value in flaxcnn.convert.by_path(read.variables).items():
        np.testing.assert_array_equal(value, flaxcnn.convert.by_path(network[1])[path])


def test_from_file_to_file_nothing_is_left_out(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = random_variables(flaxcnn.create_model("googlenet", num_classes=5), (1, 32, 32, 3))
    state_dict = flaxcnn.to_torchvision("googlenet", variables)
    write_state_dict(tmp_path / "w.pth", state_dict)
    target = tmp_path / "w.safetensors"
    assert main(["convert", str(tmp_path / "w.pth"), str(target), "--arch=googlenet"]) == 0
    assert_same_state_dict(read_state_dict(target), state_dict)


def test_what_a_file_does_not_say_is_told(
    network: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, classes = tmp_path / "w.pth", tmp_path / "classes.txt"
    model = flaxcnn.create_model("resnet20", num_classes=7)
    grey = random_variables(model, (1, 32, 32, 1))
    write_state_dict(file, flaxcnn.to_torchvision("resnet20", grey))
    classes.write_text("\n".join(CLASSES))
    source = ("convert", str(file), str(tmp_path / "model"), "--arch=resnet20")
    told = ("--mean", "0.2", "--std", "0.4", f"--classes={classes}")
    assert "3 values" in complaint(capsys, *source, "--mean", "1", "1", "1", "--std", "1", "1", "1")
    assert "std" in complaint(capsys, *source, "--std", "0")
    assert "no such" in complaint(capsys, *source, "--classes=gone.txt").lower()
    assert main([*source, *told, "--image-size=28"]) == 0
    saved = model_folder.load(tmp_path / "model")
    assert saved.class_names == CLASSES
    assert saved.transform == ImageClassification(
        crop_size=28, resize_size=28, mean=(0.2,), std=(0.4,)
    )
    classes.write_text("bag")
    capsys.readouterr()
    again = ("convert", str(file), str(tmp_path / "other"), "--arch=resnet20")
    assert "has 1 names" in complaint(capsys, *again, f"--classes={classes}")


def test_what_is_there_is_not_overwritten(
    model: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.with_name("weights.pth").write_bytes(b"precious")
    assert "is there already" in complaint(
        capsys, "convert", str(model), f"{model.parent}/weights.pth"
    )
    assert model.with_name("weights.pth").read_bytes() == b"precious"


def test_wrong_conversions(
    network: Any, model: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = model.with_name("w.pth"), str(model.with_name("out"))
    write_state_dict(file, flaxcnn.to_torchvision("resnet20", network[1]))
    assert "--arch" in complaint(capsys, "convert", str(file), out)
    assert "not a state_dict of resnet32" in complaint(
        capsys, "convert", str(file), out, "--arch=resnet32"
    )
    assert "holds resnet20, not vgg16" in complaint(
        capsys, "convert", str(model), out, "--arch=vgg16"
    )
    assert ".npz" in complaint(capsys, "convert", str(model), f"{out}.npz")


# ------------------------------------------------------------------------------------- as a user
@pytest.mark.slow
def test_output_may_be_cut_off_and_help_is_there() -> None:
    command = f"{sys.executable} -m flaxcnn models --family=vgg | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert not done.stderr
    for which in ("", "models", "summary", "stack", "scaling", "plot", "predict", "convert"):
        done = subprocess.run(
            [sys.executable, "-m", "flaxcnn", *which.split(), "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "usage: python -m flaxcnn" in done.stdout


# ---------------------------------------------------------------------------- GoogLeNet's input
def test_googlenet_trained_from_scratch_goes_there_and_back(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file does not say whether its network transforms its input; without a word it does."""
    model = flaxcnn.create_model("googlenet", num_classes=5)
    saved = model_folder.ModelFolder(
        arch="googlenet",
        arguments=model_folder.arguments_of("googlenet", model),
        variables=random_variables(model, (1, 32, 32, 3)),
        class_names=list("abcde"),
        transform=TRANSFORM,
    )
    model_folder.save(tmp_path / "model", saved)
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "w.pth")]) == 0
    source = ["convert", str(tmp_path / "w.pth")]
    assert main([*source, str(tmp_path / "usual"), "--arch=googlenet"]) == 0
    assert model_folder.load(tmp_path / "usual").arguments["transform_input"] is True
    scratch = str(tmp_path / "scratch")
    assert main([*source, scratch, "--arch=googlenet", "--no-transform-input"]) == 0
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    logits = [
        network.apply(variables, images, train=False)
        for network, variables in (
            flaxcnn.load_pretrained(tmp_path / "model"),
            flaxcnn.load_pretrained(scratch),
        )
    ]
    np.testing.assert_array_equal(*logits)
    told = complaint_after(capsys, *source, str(tmp_path / "w2.pth"), "--arch=googlenet")
    assert "holds weights alone" in told


def complaint_after(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    return complaint(capsys, *arguments, "--image-size=32")
