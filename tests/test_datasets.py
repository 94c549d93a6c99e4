"""Data sets as they are: what is in them, and what is said where they are not."""

import dataclasses
import gzip
import pathlib
import shutil

import cv2
import numpy as np
import pytest
import tfds_shapes

from train import datasets
from train.errors import UsageError


def test_digits_are_split_once_and_evenly() -> None:
    digits = datasets.load("digits", None, "train", None)
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    labels = [[source[i][1] for i in range(len(source))] for source in (digits.train, digits.test)]
    shares = np.bincount(labels[1]) / (np.bincount(labels[0]) + np.bincount(labels[1]))
    assert shares == pytest.approx(0.2, abs=0.006)
    image, _ = digits.train[0]
    assert (image.shape, image.dtype, image.max()) == ((8, 8, 1), np.uint8, 255)
    seen = {source[i][0].tobytes() for source in (digits.train, digits.test) for i in range(360)}
    assert len(seen) > 715  # distinct images, but for a few that are alike
    assert not digits.mirrors
    mean, std = digits.mean_and_std
    everything = np.stack([digits.train[i][0] for i in range(1437)]) / 255
    assert (mean[0], std[0]) == pytest.approx((everything.mean(), everything.std()), abs=2e-3)


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes()))


def test_idx_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(5 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(5, 28, 28)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    monkeypatch.setattr(datasets, "_DEBIAN_FASHION_MNIST", tmp_path)
    found = datasets.load("fashion_mnist", None, "train", None)
    assert found.class_names[9] == "Ankle boot"
    assert found.mirrors
    image, label = found.test[3]
    np.testing.assert_array_equal(image[..., 0], images[3])
    assert label == 3

    whole = (tmp_path / "train-labels-idx1-ubyte.gz").read_bytes()
    for broken in (b"", b"text", whole[:-9], gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc")):
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(broken)
        with pytest.raises(UsageError, match="train-labels-idx1-ubyte"):
            datasets.load("fashion_mnist", None, "train", None)


def test_missing_data_sets_say_how_to_get_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_DEBIAN_FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(UsageError, match=r"--data_dir.* apt-get install dataset-fashion-mnist"):
        datasets.load("fashion_mnist", None, "train", None)
    with pytest.raises(UsageError, match="no such directory"):
        datasets.load("cifar10", str(tmp_path / "absent"), "train", None)
    with pytest.raises(UsageError, match="cifar10 is not prepared"):
        datasets.load("cifar10", str(tmp_path), "train", None)
    for name in ("my_own", "cifar10"):
        (tmp_path / name).mkdir()
        with pytest.raises(UsageError, match=f"--dataset={name} under --data_dir") as caught:
            datasets.load(name, str(tmp_path), "train", None)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="are for TFDS data sets; digits has its own"):
        datasets.load("digits", None, "train[:50%]", None)


def test_mirroring_and_statistics_go_by_the_name_alone() -> None:
    digits = datasets.load("digits", None, "train", None)
    for name in ("mnist:3.0.1", "emnist/letters", "svhn_cropped"):
        assert not dataclasses.replace(digits, name=name).mirrors
    assert dataclasses.replace(digits, name="cifar10:3.0.2").mirrors
    fashion = dataclasses.replace(digits, name="fashion_mnist:3.0.1")
    assert fashion.mean_and_std == ((0.2860,), (0.3530,))


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("tfds")
    tfds_shapes.prepare(directory, "array_record")
    return directory


def test_a_tfds_data_set(shapes_dir: pathlib.Path) -> None:
    found = datasets.load("tiny_shapes", str(shapes_dir), "train", None)
    assert (len(found.train), len(found.test)) == (48, 10)
    assert list(found.class_names) == ["disc", "square"]
    assert (found.channels, found.small) == (3, False)
    expected = {
        cv2.imdecode(
            np.frombuffer(tfds_shapes.jpeg(i), np.uint8), cv2.IMREAD_COLOR_RGB
        ).tobytes(): (i % 2)
        for i in range(48)
    }
    for i in range(48):
        image, label = found.train[i]
        assert expected.pop(image.tobytes()) == label
    assert not expected


def test_tfds_splits(shapes_dir: pathlib.Path) -> None:
    found = datasets.load("tiny_shapes", str(shapes_dir), "train[:75%]", "train[75%:]")
    assert (len(found.train), len(found.test)) == (36, 12)
    assert found.origin == "tiny_shapes/1.0.0, train[:75%] and train[75%:]"
    for wrong in ("training", "train[:0]"):
        with pytest.raises(UsageError, match="it has t"):
            datasets.load("tiny_shapes", str(shapes_dir), wrong, None)


def test_images_to_test_on_need_no_others(shapes_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """As where ImageNet's validation images alone are prepared."""
    expected = datasets.load("tiny_shapes", str(shapes_dir), "train", None)
    shutil.copytree(shapes_dir, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*train.array_record*"):
        path.unlink()
    for split in (None, "test"):
        source, class_names = datasets.load_test("tiny_shapes", str(tmp_path / "data"), split)
        assert list(class_names) == ["disc", "square"]
        assert len(source) == 10
        for i in range(10):
            image, label = source[i]
            np.testing.assert_array_equal(image, expected.test[i][0])
            assert label == expected.test[i][1]
    some, _ = datasets.load_test("tiny_shapes", str(shapes_dir), "train[:25%]")
    assert len(some) == 12
    digits, names = datasets.load_test("digits", None, None)
    assert (len(digits), len(names)) == (360, 10)
    with pytest.raises(UsageError, match="digits has the split test alone"):
        datasets.load_test("digits", None, "train")
    with pytest.raises(UsageError, match="no such directory"):
        datasets.load_test("tiny_shapes", str(tmp_path / "gone"), None)


def test_tfrecord_files_hold_the_same(shapes_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tfds_shapes.prepare(tmp_path, "tfrecord")
    found = [datasets.load("tiny_shapes", str(d), "train", None) for d in (shapes_dir, tmp_path)]
    assert len(found[0].train) == len(found[1].train) == 48
    for i in range(48):
        (image, label), (other_image, other_label) = found[0].train[i], found[1].train[i]
        np.testing.assert_array_equal(image, other_image)
        assert label == other_label
    some = datasets.load("tiny_shapes", str(tmp_path), "train[25%:50%]", "test[:3]")
    assert (len(some.train), len(some.test)) == (12, 3)
    np.testing.assert_array_equal(some.train[0][0], found[0].train[12][0])

    with pytest.raises(UsageError, match="it is empty"):
        datasets.load("tiny_shapes", str(tmp_path), "train", "test[:0]")

    (path,) = tmp_path.rglob("*train.tfrecord*")
    whole = path.read_bytes()
    for broken in (whole[:-1], whole + b"\0", whole[:3], b"\xff" * 20):
        path.write_bytes(broken)
        with pytest.raises(UsageError, match=r"train.tfrecord.*cut short"):
            datasets.load("tiny_shapes", str(tmp_path), "train", None)
    path.unlink()
    with pytest.raises(UsageError, match="No such file"):
        datasets.load("tiny_shapes", str(tmp_path), "train", None)


def test_a_broken_image_is_named() -> None:
    source = datasets.TfdsSource([{"image": b"not a jpeg", "label": 0}], "image", "label", 3)
    with pytest.raises(ValueError, match="example 0: its image cannot be decoded"):
        source[0]


def test_some_images_of_each_class() -> None:
    """As many of each, drawn by the seed; fewer are among more; the test stays whole."""
    whole = datasets.load("digits", None, "train", None)

    def drawn(count: int, seed: int) -> set[bytes]:
        some = datasets.with_images_per_class(whole, count, seed)
        examples = [some.train[i] for i in range(len(some.train))]
        labels = [label for _, label in examples]
        assert sorted(labels) == sorted(list(range(10)) * count)
        assert labels == list(some.train.labels)
        assert some.test is whole.test
        assert (some.origin, some.drawn) == (
            "scikit-learn",
            f"{count} of each class by seed {seed}",
        )
        return {image.tobytes() + bytes([label]) for image, label in examples}

    assert drawn(5, 0) < drawn(20, 0)
    assert drawn(5, 0) == drawn(5, 0)
    assert len(drawn(20, 0) & drawn(20, 1)) < 100
    with pytest.raises(UsageError, match="--images_per_class=200: '0' has 142 training images"):
        datasets.with_images_per_class(whole, 200, 0)
