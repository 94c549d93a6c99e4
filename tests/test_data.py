"""The order in which a run sees its images: without gaps, exact on resume, shared by processes."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from plans import PLAN

import flaxcnn
from flaxcnn.transforms import ImageClassification
from train import data, datasets
from train.plan import Plan


def numbered(count: int) -> datasets.ArraySource:
    """Image i is grey of value i."""
    images = (
        np.zeros((count, 8, 8, 1), np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]
    )
    return datasets.ArraySource(images, np.arange(count))


PLAIN = dataclasses.replace(PLAN, batch_size=6, image_size=8, augmentation="none", flip=False)


def labels_of(batches: int, plan: Plan = PLAIN, first_step: int = 0, threads: int = 2) -> list:
    found = data.training_batches(numbered(20), plan, first_step, threads)
    return [batch["label"].tolist() for batch in itertools.islice(found, batches)]


def test_epochs_follow_each_other_without_a_gap() -> None:
    stream = list(itertools.chain.from_iterable(labels_of(10)))
    epochs = [stream[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_the_order_depends_on_the_seed_alone() -> None:
    assert labels_of(9, threads=1) == labels_of(9, threads=7)
    assert labels_of(9) != labels_of(9, dataclasses.replace(PLAIN, seed=1))


def test_resuming_is_exact_in_order_and_in_pixels() -> None:
    plan = dataclasses.replace(PLAIN, augmentation="resized_crop", flip=True, image_size=16)
    source = datasets.load("digits", None, "train", None).train
    whole = list(itertools.islice(data.training_batches(source, plan, 0, 2), 7))
    rest = list(itertools.islice(data.training_batches(source, plan, 4, 3), 3))
    for before, after in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(before["image"], after["image"])
        np.testing.assert_array_equal(before["label"], after["label"])
    assert (whole[4]["image"] != whole[5]["image"]).any()


def test_an_example_is_augmented_anew_in_each_epoch() -> None:
    plan = dataclasses.replace(PLAIN, batch_size=20, augmentation="pad_crop", image_size=16)
    source = datasets.load("digits", None, "train", None).train
    few = datasets.ArraySource(np.stack([source[i][0] for i in range(20)]), np.arange(20))
    first, second = (
        {int(label): image.tobytes() for image, label in zip(b["image"], b["label"], strict=True)}
        for b in itertools.islice(data.training_batches(few, plan, 0, 1), 2)
    )
    same = sum(first[i] == second[i] for i in range(20))
    assert same < 8  # one shift in 25 recurs by chance


def test_processes_share_the_same_global_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = labels_of(5, first_step=2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(labels_of(5, first_step=2))
    together = [a + b for a, b in zip(*shares, strict=True)]
    assert together == alone


@pytest.mark.parametrize("batch_size", [6, 20, 32])
def test_evaluation_sees_every_example_once(batch_size: int) -> None:
    transform = data.evaluation_transform(PLAIN, ((0.5,), (0.5,)))
    batches = list(data.evaluation_batches(numbered(20), transform.view, batch_size, 2))
    assert {batch["label"].shape for batch in batches} == {(batch_size,)}
    seen = [batch["label"][batch["mask"]].tolist() for batch in batches]
    assert list(itertools.chain.from_iterable(seen)) == list(range(20))


@pytest.mark.parametrize("weights", [None, "DEFAULT"])
def test_from_trained_weights_on_images_look_as_in_the_test(weights: str | None) -> None:
    """Resized and cropped as those of the weights were; from scratch their whole middle is seen."""
    digits = datasets.load("digits", None, "train", None)
    plan = dataclasses.replace(PLAIN, image_size=32, batch_size=16, weights=weights)
    prepared = ImageClassification(
        crop_size=224, resize_size=256, mean=(0.5,), std=(0.5,), interpolation="bicubic"
    )
    transform = data.evaluation_transform(plan, digits.mean_and_std, prepared)
    examples = data.Images(flaxcnn.create_model("lenet5"), digits, plan, transform, 2)
    batch = next(examples.training_batches(0))
    seen = {transform.view(digits.train[i][0]).tobytes() for i in range(len(digits.train))}
    as_in_test = [image.tobytes() in seen for image in batch["image"]]
    assert all(as_in_test) if weights else not any(as_in_test)


@pytest.mark.parametrize(("augmentation", "resized"), [("resized_crop", 256), ("pad_crop", 224)])
def test_evaluation_crops_where_training_does(augmentation: str, resized: int) -> None:
    plan = dataclasses.replace(PLAIN, image_size=224, augmentation=augmentation)
    transform = data.evaluation_transform(plan, ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert (transform.crop_size, transform.resize_size) == (224, resized)
    assert (transform.mean, transform.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
