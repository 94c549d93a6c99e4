"""A linear probe on kept features learns what it would on the images, and never from other ones."""

import dataclasses
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from placing import on_devices
from plans import PLAN
from variables import random_variables

import flaxcnn
from train import data, datasets, features, optim, state, steps, transfer
from train.plan import Plan

PROBE = dataclasses.replace(
    PLAN,
    arch="resnet20",
    image_size=16,
    batch_size=16,
    weights="w.pth",
    transfer="linear_probe",
    augmentation="none",
)


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAXCNN_CACHE", str(tmp_path / "cache"))


def made(plan: Plan = PROBE, seed: int = 0) -> features.Features:
    """The examples of a probe on digits, with random weights."""
    dataset = datasets.load("digits", None, "train", None)
    model = state.create_model(plan, 1)
    variables = random_variables(model, (1, plan.image_size, plan.image_size, 1), seed)
    transform = data.evaluation_transform(plan, dataset.mean_and_std)
    return features.Features(
        model, transfer.split(model, plan), variables, dataset, plan, transform, 2
    )


# --------------------------------------------------------------------------------- the two halves
@pytest.mark.parametrize(
    "name", ["lecun1989", "lenet5", "zfnet", "googlenet", "resnet20", "efficientnet_lite0"]
)
def test_the_halves_are_the_network(name: str) -> None:
    model = flaxcnn.create_model(name, num_classes=5)
    side = max(32, model.min_size)
    plan = dataclasses.replace(PROBE, arch=name, image_size=side, channels=3, num_classes=5)
    variables = random_variables(model, (1, side, side, 3))
    images = np.random.default_rng(0).normal(size=(3, side, side, 3)).astype("float32")
    last = frozenset(path[:-1] for path in transfer.split(model, plan).rates)
    half = features.LastLayer(model, last, (side, side, 3))

    @partial(jax.jit, compiler_options=quick.OPTIONS)
    def both_ways(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        halves = half.apply(variables, half.features(variables, images), train=False)
        return halves, model.apply(variables, images, train=False)

    actual, expected = both_ways(variables, images)
    scale = float(jnp.abs(expected).max())
    # Float32 sums in another order, as the whole is compiled otherwise than its halves.
    np.testing.assert_allclose(actual, expected, atol=1e-5 * scale)


def test_the_last_layer_alone_is_computed() -> None:
    probe = made()
    run = jax.jit(lambda v, x: probe.classifier.apply(v, x, train=False))
    costs: Any = run.lower(probe.variables, jnp.zeros((16, 64))).compile().cost_analysis()
    assert costs["flops"] < 3 * 2 * 16 * 64 * 10


# --------------------------------------------------------------------------------------- training
def test_features_train_as_images_do() -> None:
    """The same last layer after some steps, and the same test; all else as it was."""
    probe = made()
    images = data.Images(
        probe.model, probe.dataset, probe.plan, probe.transform, probe.read_threads
    )
    optimiser = probe.split.scaled(optim.optimiser(PROBE, lambda _: 0.1))
    ends, tests = [], []
    for examples in (probe, images):
        step = steps.make_train_step(
            examples.classifier, optimiser, PROBE, examples.mean_and_std, 10, probe.split
        )
        over_devices = jax.pmap(
            step,
            steps.AXIS,
            in_axes=(None, 0),
            out_axes=(None, None),
            devices=jax.devices()[:1],
        )
        current = state.state_of(probe.variables, probe.plan, optimiser, probe.split)
        batches = examples.training_batches(2)
        for _ in range(4):
            batch = {k: v[None] for k, v in next(batches).items()} | {"stop": np.zeros(1, bool)}
            current, _ = over_devices(*on_devices(current, batch, 1))
        ends.append(jax.device_get(current))
        eval_step = jax.pmap(
            steps.make_eval_step(examples.classifier, examples.mean_and_std),
            steps.AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=jax.devices()[:1],
        )
        batch = {k: v[None] for k, v in next(examples.test_batches()).items()}
        tests.append(eval_step(current.variables, batch | {"stop": np.zeros(1, bool)}))
    a, b = ends
    kernel = a.params["fc"]["kernel"]
    assert np.abs(kernel - probe.variables["params"]["fc"]["kernel"]).max() > 0.01
    # Float32 sums in another order; what was learnt is a thousand times as much.
    np.testing.assert_allclose(kernel, b.params["fc"]["kernel"], atol=1e-5)
    np.testing.assert_allclose(a.params["fc"]["bias"], b.params["fc"]["bias"], atol=1e-5)
    for name in ("top1", "top5", "n"):
        assert tests[0][name] == tests[1][name]
    # A loss of kernels that differ by as much as above.
    np.testing.assert_allclose(tests[0]["loss"], tests[1]["loss"], rtol=1e-4)
    del a.params["fc"], b.params["fc"]
    for end in (a, b):
        jax.tree.map(
            np.testing.assert_array_equal,
            (end.params, end.batch_stats),
            (
                {k: v for k, v in probe.variables["params"].items() if k != "fc"},
                probe.variables["batch_stats"],
            ),
        )


@pytest.mark.parametrize(
    ("change", "enough"),
    [
        ({}, True),
        ({"augmentation": "pad_crop"}, False),
        ({"flip": True}, False),
        ({"transfer": "finetune"}, False),
    ],
)
def test_when_features_suffice(change: dict[str, Any], enough: bool) -> None:
    assert features.suffice(dataclasses.replace(PROBE, **change)) is enough


# -------------------------------------------------------------------------------------- the cache
def test_computed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    batches = [next(made().test_batches()), next(made().training_batches(0))]
    names = {path.name for path in (tmp_path / "cache" / "features").iterdir()}
    assert names == {made()._file_name(part, "") for part in ("train", "test")}
    monkeypatch.setattr(features.Features, "_computed", None)  # cannot be called
    again = [next(made().test_batches()), next(made().training_batches(0))]
    jax.tree.map(np.testing.assert_array_equal, batches, again)


def name(probe: features.Features, drawn: str = "") -> str:
    return probe._file_name("train", drawn)


def test_another_last_layer_has_the_same_features() -> None:
    probe = made()
    head = {"kernel": np.ones((64, 10), "float32"), "bias": np.ones(10, "float32")}
    variables = probe.variables | {"params": probe.variables["params"] | {"fc": head}}
    assert name(dataclasses.replace(probe, variables=variables)) == name(probe)
    plan = dataclasses.replace(PROBE, learning_rate=3.0, seed=7, steps=9)
    assert name(dataclasses.replace(probe, plan=plan)) == name(probe)


def test_whatever_else_differs_has_others() -> None:
    probe = made()
    others = dataclasses.replace(probe.dataset, origin="others")
    prepared = dataclasses.replace(probe.transform, interpolation="bicubic")
    moved = jax.tree.map(lambda x: x + 1, probe.variables["batch_stats"])
    names = {
        name(probe),
        name(probe, drawn="5 of each class by seed 0"),
        name(made(seed=1)),
        name(made(dataclasses.replace(PROBE, image_size=17))),
        name(made(dataclasses.replace(PROBE, precision="bfloat16"))),
        name(dataclasses.replace(probe, dataset=others)),
        name(dataclasses.replace(probe, transform=prepared)),
        name(dataclasses.replace(probe, variables={**probe.variables, "batch_stats": moved})),
    }
    assert len(names) == 8


@pytest.mark.parametrize("broken", ["empty", "cut", "text", "pickle", "short", "flat"])
def test_a_broken_file_is_computed_again(
    broken: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = made()
    ours = np.arange(360 * 64, dtype="float32").reshape(360, 64)
    monkeypatch.setattr(features.Features, "_computed", lambda *_: ours)
    path = tmp_path / "cache" / "features" / probe._file_name("test", "")
    path.parent.mkdir(parents=True)
    np.save(path, ours)
    whole = path.read_bytes()
    if broken == "pickle":
        np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    elif broken in ("short", "flat"):
        np.save(path, np.ones((7, 64) if broken == "short" else 360, "float32"))
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-100], "text": b"no array"}[broken])
    np.testing.assert_array_equal(next(probe.test_batches())["image"], ours[:16])
    assert path.read_bytes() == whole
    assert [file.name for file in path.parent.iterdir()] == [path.name]
