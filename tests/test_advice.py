"""What `--suggest` advises: the order, the commands, and what it refuses."""

import dataclasses
import pathlib
import shlex

import numpy as np
import pytest

from train import advice, config, datasets, main
from train.advice import ALL, PROBE, SCRATCH, TOP
from train.datasets import Dataset
from train.errors import UsageError

DIGITS = datasets.load("digits", None, "train", None)


def advised(*flags: str, dataset: Dataset = DIGITS) -> list[advice.Candidate]:
    return advice.candidates(config.parse(flags), dataset, 1)


def with_images(each: int) -> Dataset:
    """About so many images of each class."""
    if each <= 100:
        return datasets.with_images_per_class(DIGITS, each, 0)
    indices = np.arange(10 * each) % len(DIGITS.train)
    return dataclasses.replace(DIGITS, train=datasets.Subset(DIGITS.train, indices))


@pytest.mark.parametrize(
    ("domain", "each", "first", "last"),
    [
        ("near", 99, PROBE, SCRATCH),
        ("near", 100, TOP, SCRATCH),
        ("near", 1000, ALL, SCRATCH),
        ("far", 10, ALL, SCRATCH),
        ("far", 100, ALL, SCRATCH),
        ("far", 999, ALL, SCRATCH),
        ("far", 1000, ALL, PROBE),
    ],
)
def test_the_order_goes_by_images_of_a_class_and_distance(
    domain: str, each: int, first: str, last: str
) -> None:
    ways = advised("--arch=resnet18", f"--domain={domain}", dataset=with_images(each))
    assert {way.name for way in ways} == {PROBE, TOP, ALL, SCRATCH}
    assert (ways[0].name, ways[-1].name) == (first, last)


def test_each_command_is_read_again_as_its_configuration() -> None:
    said = (
        *("--arch=resnet50", "--domain=far", "--suggest", "--seed=3", "--momentum=0.8"),
        *("--data_dir=a b", "--freeze_bn=True", "--flip=False"),
    )
    ways = {way.name: way for way in advised(*said)}
    for way in ways.values():
        python, dash_m, module, *flags = shlex.split(way.command)
        assert (python, dash_m, module) == ("python", "-m", "train.main")
        assert config.parse(flags) == way.config
        assert (way.config.seed, way.config.data_dir) == (3, "a b")
        assert not way.config.suggest
    assert ways[PROBE].config.transfer == "linear_probe"
    assert ways[TOP].config.transfer == "from:layer3"  # the last half of five stages
    assert ways[ALL].config.transfer == "finetune"
    assert ways[SCRATCH].config.weights is None


def test_near_to_imagenet_fewer_stages_are_trained() -> None:
    ways = {way.name: way for way in advised("--arch=vgg16", "--domain=near")}
    assert ways[TOP].config.transfer == "from:pool5"


def test_all_have_the_same_budget() -> None:
    ways = advised("--arch=resnet18", "--domain=near")
    budgets = {(w.config.epochs, w.config.batch_size, w.config.image_size) for w in ways}
    assert len(budgets) == 1
    assert None not in next(iter(budgets))
    ways = advised("--arch=resnet18", "--domain=near", "--steps=9", "--batch_size=5")
    assert {(w.config.steps, w.config.epochs, w.config.batch_size) for w in ways} == {(9, None, 5)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--transfer=finetune",), "--transfer says what is trained"),
        (("--recipe=small",), "--recipe says what is trained"),
        (("--arch=resnet20",), "--arch=resnet20 has no published weights; give --weights=FILE"),
        (("--arch=resnet5O",), "resnet50"),
        ((), "say --domain=near for photos"),  # nobody to ask
    ],
)
def test_what_cannot_be_advised(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.command(("--suggest", "--arch=resnet18", *flags)) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.count("\n") == 1


def test_it_asks_where_somebody_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["", "hm", "far"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert advised("--arch=resnet18")[0].name == ALL
    assert not list(answers)


def test_it_is_printed_and_nothing_is_trained(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    flags = ("--suggest", "--arch=resnet18", "--domain=far", f"--workdir={workdir}")
    assert main.command(flags) == 0
    out, _ = capsys.readouterr()
    assert "1437 images to train on, 10 classes, about 144 of each; that is some" in out
    assert "advice: tune all" in out
    assert out.count("python -m train.main --arch=resnet18 ") == 4
    assert not workdir.exists()


def test_candidates_refuse_what_a_run_would() -> None:
    with pytest.raises(UsageError, match="--momentum must be"):
        advised("--arch=resnet18", "--domain=far", "--momentum=2")
