"""`python -m train.main --dataset=folder`: from photos to a network that names them."""

import json
import pathlib

import numpy as np
import pytest
from photo_folders import CLASSES, write_photos

import flaxcnn.__main__
from flaxcnn import model_folder
from train import main, report


@pytest.mark.slow
def test_photos_train_a_network_that_names_them(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "photos", 24)
    broken = tmp_path / "photos" / CLASSES[0] / "broken.jpg"
    broken.write_text("no photo")
    flags = (
        *("--arch=resnet20", "--image_size=32", "--batch_size=16", "--dataset=folder"),
        *(f"--data_dir={tmp_path}/photos", "--holdout=0.3", "--augmentation=none"),
        # Statistics over all images: so all photos were right after 60 steps, for three seeds. Of a
        # device's two images they are so rough that 85 to 100 % were after 120, by machine.
        *("--learning_rate=0.05", "--warmup_epochs=0", "--epochs=40", "--bn=sync"),
        f"--workdir={tmp_path}/run",
    )
    assert main.command(flags) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "1 pictures cannot be read, more than --max_bad=0:" in err
    assert "寺 temple/broken.jpg: none of JPEG, PNG, WEBP, BMP" in err

    assert main.command((*flags, "--max_bad=1")) == 0
    out, _ = capsys.readouterr()
    assert "left out" in out
    assert "2 classes, 32x32" in out
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    tests = [record for record in records if record["split"] == "test"]
    test = max(tests, key=lambda record: record["top1"])
    assert 8 <= test["n"] <= 22
    assert test["top1"] > 0.85

    assert model_folder.load(tmp_path / "run" / "model").class_names == sorted(CLASSES)
    broken.unlink()
    asked = [str(tmp_path / "photos"), f"--model={tmp_path}/run/model", "--json"]
    assert flaxcnn.__main__.main(("predict", *asked)) == 0
    answers = json.loads(capsys.readouterr().out)
    right = [
        pathlib.Path(answer["image"]).parent.name == answer["classes"][0]["class_name"]
        for answer in answers
    ]
    assert len(right) == 48
    assert np.mean(right) > 0.9

    assert report.command([str(tmp_path / "run")]) == 0
    assert f"{test['top1']:.2%}" in capsys.readouterr().out
    if test["top1"] < 1:
        shown = (tmp_path / "run" / "report.html").read_text()
        assert "photos/dahlia &amp; co/" in shown or "photos/寺 temple/" in shown

    # Other photos are other data: the run does not go on with them.
    (tmp_path / "photos" / CLASSES[1] / "0.jpg").unlink()
    assert main.command((*flags, "--max_bad=1")) == 2
    assert "data_origin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset=folder",), "--dataset=folder needs --data_dir"),
        (("--dataset=folder", "--data_dir=/gone"), "--data_dir=/gone: no such directory"),
        (("--dataset=folder", "--data_dir=/", "--holdout=1"), "--holdout must be between 0 and 1"),
        (("--dataset=folder", "--data_dir=/", "--max_bad=-1"), "--max_bad must be at least 0"),
        (("--dataset=folder", "--data_dir=/", "--test_split=a"), "photos lie in folders"),
        (("--holdout=0.2",), "--holdout is for --dataset=folder"),
        (("--max_bad=3",), "--max_bad is for --dataset=folder"),
        (("--images_per_class=0",), "--images_per_class must be at least 1"),
        (("--images_per_class=200",), "--images_per_class=200: '0' has 142 training images"),
        (("--head_init=zero",), "--head_init=zero is of a new last layer on --weights"),
    ],
)
def test_wrong_requests(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.command(("--arch=resnet20", *flags)) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.count("\n") == 1
