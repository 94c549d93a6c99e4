"""Runs of `python -m train.main --weights=...`, as a user starts them."""

import pathlib
import random

import jax
import numpy as np
import pytest
import runs
from variables import random_variables

import flaxcnn
from flaxcnn import model_folder
from flaxcnn.convert import by_path
from flaxcnn.state_dicts import write_state_dict

pytestmark = pytest.mark.slow

FLAGS = (
    *("--arch=resnet20", "--transfer=from:layer3", "--image_size=16", "--batch_size=32"),
    *("--ema_decay=0.9", "--steps=18", "--log_every=3", "--eval_every=9", "--checkpoint_every=5"),
)


@pytest.fixture(name="weights")
def file_of_weights(tmp_path: pathlib.Path) -> pathlib.Path:
    """Of seven classes and colour images: another last layer and first kernels are needed."""
    variables = random_variables(flaxcnn.create_model("resnet20", num_classes=7), (1, 32, 32, 3))
    write_state_dict(tmp_path / "w.pth", flaxcnn.to_torchvision("resnet20", variables))
    return tmp_path / "w.pth"


def test_frozen_stays_frozen_through_kill_and_resume(
    weights: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = (*FLAGS, f"--weights={weights}", "--freeze_bn=False")
    said = runs.run(*flags, f"--workdir={whole}")
    assert f"{weights}, from:layer3: " in said
    victim = runs.start(*flags, f"--workdir={killed}")
    # Behind the checkpoint of step 10, which waited for that of step 5 to be whole.
    runs.kill_after(victim, killed, step=random.randrange(10, 16))
    assert "resumed after step" in runs.run(*flags, f"--workdir={killed}")
    assert runs.records(whole) == runs.records(killed)
    ends = runs.final_state(whole), runs.final_state(killed)
    jax.tree.map(np.testing.assert_array_equal, *ends)

    _, start = flaxcnn.load_pretrained("resnet20", weights, num_classes=10, in_channels=1)
    saved = model_folder.load(whole / "model")
    begun, end = by_path(start), by_path(saved.variables)
    same = {path for path, value in begun.items() if np.array_equal(value, end[path])}
    frozen = {p for p in begun if p[0] in ("conv1", "bn1") or p[0][:6] in ("layer1", "layer2")}
    assert same == frozen

    again = runs.run(*FLAGS, f"--weights={weights}", f"--workdir={whole}", code=2)
    assert "freeze_bn False there, True here" in again


def test_images_are_prepared_as_those_of_the_weights(tmp_path: pathlib.Path) -> None:
    """The weights' size, statistics and interpolation, in the run and in its model folder."""
    arch = "--arch=lenet5"
    runs.run(arch, "--steps=5", "--image_size=40", f"--workdir={tmp_path / 'first'}")
    first = model_folder.load(tmp_path / "first" / "model").transform
    weights = f"--weights={tmp_path / 'first' / 'model'}"
    said = runs.run(arch, weights, "--steps=5", f"--workdir={tmp_path / 'second'}")
    assert "40x40" in said
    assert model_folder.load(tmp_path / "second" / "model").transform == first
    assert "holds lenet5, not --arch=resnet18" in runs.run(
        "--arch=resnet18", weights, "--steps=5", code=2
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--transfer=finetune",), "give them, such as --weights=DEFAULT"),
        (("--freeze_bn=True",), "give them, such as --weights=DEFAULT"),
        (("--weights=w.pth", "--transfer=probe"), "expected linear_probe, finetune, layerwise or"),
        (("--weights=w.pth",), "w.pth: cannot be read: No such file"),
        (("--weights=w.pth", "--conv_init=he"), "--conv_init=he draws convolutions anew"),
        (("--weights=w.pth", "--head_init=lecun"), "--head_init=lecun draws dense layers anew"),
        (("--weights=w.pth", "--lr_decay=0"), "--lr_decay must be above 0"),
        (("--weights=w.pth", "--head_lr_scale=-1"), "--head_lr_scale must be above 0"),
    ],
)
def test_wrong_requests(flags: tuple[str, ...], message: str) -> None:
    said = runs.run("--arch=resnet20", *flags, code=2)
    assert message in said
    assert said.count("\n") == 1
