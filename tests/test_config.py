"""The command line and the plan: defaults, overrides, and one clear line for what is wrong."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from train import config, datasets
from train.errors import UsageError
from train.plan import Plan

DIGITS = datasets.load("digits", None, "train", None)


def plan_of(*flags: str, devices: int = 1, accelerated: bool = False) -> Plan:
    return config.make_plan(config.parse(flags), DIGITS, devices, accelerated)


def test_every_field_of_the_recipe_has_its_flag() -> None:
    from train.recipes import Recipe

    flags = {field.name for field in dataclasses.fields(config.Config)}
    for field in dataclasses.fields(Recipe):
        assert field.name.removesuffix("_per_256") in flags


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        config.parse(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for field in dataclasses.fields(config.Config):
        assert f"--{field.name} " in said, field.name
    assert "what is trained on what" not in said  # a banner of the source


def test_learning_rate_is_scaled_to_the_batch() -> None:
    small, large = (
        plan_of("--arch=resnet18", "--batch_size=64"),
        plan_of("--arch=resnet18", "--batch_size=128"),
    )
    assert large.learning_rate == pytest.approx(2 * small.learning_rate)
    assert plan_of("--learning_rate=0.3", "--batch_size=64").learning_rate == 0.3


def test_images_are_of_the_networks_size_where_the_data_sets_are_not_small() -> None:
    photos = dataclasses.replace(DIGITS, small=False)
    sizes = {
        arch: config.make_plan(config.parse([f"--arch={arch}"]), photos, 1, False).image_size
        for arch in ("lecun1989", "resnet20", "vgg16", "efficientnet_b2")
    }
    assert sizes == {"lecun1989": 16, "resnet20": 32, "vgg16": 224, "efficientnet_b2": 260}
    assert plan_of("--arch=efficientnet_b2").image_size == 32
    assert plan_of("--arch=alexnet").image_size == 63  # its least


def test_steps_from_epochs_and_back() -> None:
    assert plan_of("--epochs=2.5", "--batch_size=100").steps == 36  # 2.5 * 1437 / 100
    plan = plan_of("--steps=7")
    assert plan.steps == 7
    assert plan.warmup_steps <= 3


def test_flags_overrule_the_recipe() -> None:
    flags = {
        "momentum": 0.5,
        "nesterov": True,
        "weight_decay": 0.25,
        "decay_norm_and_bias": True,
        "label_smoothing": 0.1,
        "dropout_rate": 0.25,
        "clip_norm": 3.0,
        "conv_init": "he",
        "head_init": "network",
        "augmentation": "resized_crop",
        "schedule": "step",
        "flip": True,
    }
    plan = plan_of(*[f"--{name}={value}" for name, value in flags.items()])
    assert {name: getattr(plan, name) for name in flags} == flags


def test_batch_normalisation_stays_where_little_is_transferred() -> None:
    weights = ("--arch=resnet50", "--weights=DEFAULT")
    assert plan_of(*weights).freeze_bn
    assert plan_of(*weights, "--transfer=layerwise").freeze_bn
    assert not plan_of(*weights, "--freeze_bn=False").freeze_bn
    assert not plan_of(*weights, "--recipe=classic").freeze_bn
    assert not plan_of("--arch=resnet50").freeze_bn
    # Of a fresh start there is nothing to freeze.
    assert not plan_of("--arch=resnet50", "--recipe=transfer").freeze_bn


def test_the_classic_recipes() -> None:
    resnet = plan_of("--arch=resnet50", "--recipe=classic", "--batch_size=512")
    assert (resnet.learning_rate, round(resnet.epochs)) == (pytest.approx(0.2), 90)
    assert (resnet.schedule, resnet.weight_decay, resnet.momentum) == ("step", 1e-4, 0.9)
    assert plan_of("--recipe=classic").learning_rate == pytest.approx(0.01)


def test_defaults_follow_the_data_and_the_devices() -> None:
    plan = plan_of()
    assert (plan.recipe, plan.image_size, plan.flip) == ("small", 32, False)
    assert plan_of("--arch=resnet18").image_size == 32
    assert plan_of(accelerated=True).precision == "bfloat16"
    assert plan_of("--precision=float32", accelerated=True).precision == "float32"


@pytest.mark.parametrize(
    ("flags", "devices", "message"),
    [
        (["--arch=vgg61"], 1, r"--arch: unknown model 'vgg61'; did you mean .*vgg16"),
        (["--batch_size=30"], 8, r"--batch_size=30 cannot be shared equally by 8 devices; try 32"),
        (["--batch_size=0"], 1, r"--batch_size must be at least 1"),
        (["--image_size=31"], 1, r"--image_size=31 is too small for vgg16; its least size is 32"),
        (["--epochs=0"], 1, r"must give at least one"),
        (["--steps=-3"], 1, r"must give at least one"),
        (["--steps=99999999999999999999999"], 1, r"fewer than 2,147,483,648 steps"),
        (["--epochs=1e308"], 1, r"fewer than 2,147,483,648 steps"),
        (["--epochs=abc"], 1, r"--epochs.*'abc'"),
        (["--epochs=inf"], 1, r"--epochs must be finite"),
        (["--warmup_epochs=nan"], 1, r"--warmup_epochs must be finite"),
        (["--epoch=3"], 1, r"[Uu]nrecognized.*--epoch=3"),
        (["--precision=float16"], 1, r"'float16'.*'bfloat16'"),
        (["--learning_rate=-1"], 1, r"--learning_rate must be above 0"),
        (["--learning_rate=nan"], 1, r"--learning_rate must be above 0"),
        (["--momentum=1"], 1, r"--momentum must be at least 0 and below 1"),
        (["--label_smoothing=1"], 1, r"--label_smoothing"),
        (["--dropout_rate=1"], 1, r"--dropout_rate"),
        (["--clip_norm=-1"], 1, r"--clip_norm"),
        (["--seed=-1"], 1, r"--seed"),
        (["--log_every=0"], 1, r"--log_every must be at least 1 step"),
        (["--bn=global"], 1, r"--bn=global: expected local, sync or group:N"),
        (["--bn=group:0"], 1, r"expected local, sync or group:N"),
        (["--bn=group:3"], 8, r"8 devices cannot be split into groups of 3"),
        (["--bn=group:2"], 1, r"1 device cannot be split into groups of 2"),
        (["--read_threads=0"], 1, r"--read_threads"),
        (["--workdir="], 1, r"--workdir is empty; name a directory, or leave the flag out"),
    ],
)
def test_wrong_values_get_one_line(flags: list[str], devices: int, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        plan_of(*flags, devices=devices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_tyro_draws_is_one_sentence(
    encoding: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its box is of other characters in ASCII, and in colour on a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    shown = SimpleNamespace(encoding=encoding, isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdout", shown)
    said = {}
    for flag in ("--epoch=3", "--precision=float16"):
        with pytest.raises(UsageError) as caught:
            config.parse([flag])
        said[flag] = str(caught.value)
    assert said == {
        "--epoch=3": "Unrecognized options: --epoch=3",
        "--precision=float16": "invalid choice 'float16' for argument '--precision'. "
        "Expected one of ('auto', 'float32', 'bfloat16').",
    }
