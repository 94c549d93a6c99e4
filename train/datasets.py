"""Data sets: images to train on and images to test on, each with its label."""

import dataclasses
import gzip
import pathlib
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import cv2
import numpy as np

from flaxcnn.transforms import IMAGENET_MEAN, IMAGENET_STD
from train import folders
from train.errors import UsageError
from train.tfrecord import TfrecordExamples

# Mirrored, these would be other classes, or none.
_NOT_MIRRORED = (
    "digits",
    "emnist",
    "kmnist",
    "mnist",
    "mnist_corrupted",
    "omniglot",
    "svhn_cropped",
)
_SMALL_PIXELS = 64  # images up to this side count as small
_DEBIAN_FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_CLASSES = (
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat")
    + ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
)  # fmt: skip
# Mean and standard deviation of the channels, images scaled to [0, 1].
_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
_GREY = ((0.449,), (0.226,))  # ImageNet's, averaged over its channels
_STATISTICS = {"digits": ((0.3053,), (0.3761,)), "fashion_mnist": ((0.2860,), (0.3530,))}


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Image [H, W, C] uint8, and its label."""
        ...

    @property
    def labels(self) -> Sequence[int] | np.ndarray:
        """Of all examples."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images to train on and images to test on."""

    name: str
    origin: str  # which data, exactly: version and splits
    train: Source
    test: Source
    class_names: Sequence[str]
    channels: int
    small: bool  # whether its images are small, so that the small recipe is the default
    notes: Sequence[str] = ()  # for the user: what was left out
    drawn: str = ""  # which of the images to train on, where not all

    @property
    def mirrors(self) -> bool:
        """Whether a mirrored image still shows its class."""
        return self._base_name not in _NOT_MIRRORED

    @property
    def mean_and_std(self) -> tuple[Sequence[float], Sequence[float]]:
        """Of each channel, images scaled to [0, 1]."""
        return _STATISTICS.get(self._base_name, _IMAGENET if self.channels == 3 else _GREY)

    @property
    def _base_name(self) -> str:
        """Without TFDS's configuration and version: "emnist" for "emnist/letters:3.1.0"."""
        return re.split("[/:]", self.name)[0]


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images that fit in memory: [N, H, W, C] and labels [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of the examples of a source."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.source[int(self.indices[index])]

    @property
    def labels(self) -> np.ndarray:
        """Of these examples."""
        return np.asarray(self.source.labels)[self.indices]


# -------------------------------------------------------------------------------- the data sets
def load(name: str, data_dir: str | None, train_split: str, test_split: str | None) -> Dataset:
    """The data set of that name; see `--dataset`. Photos in folders: `load_photos`.

    Raises:
        UsageError: where it is not, or is nothing that a classifier can train on.
    """
    if data_dir is not None and not pathlib.Path(data_dir).is_dir():
        raise UsageError(f"--data_dir={data_dir}: no such directory")
    embedded = {"digits": _digits}
    if not _is_prepared("fashion_mnist", data_dir):
        embedded["fashion_mnist"] = _fashion_mnist
    if name not in embedded:
        return _tfds(name, data_dir, train_split, test_split)
    if train_split != "train" or test_split is not None:
        raise UsageError(
            f"--train_split and --test_split are for TFDS data sets; {name} has its own"
        )
    return embedded[name]()


def load_photos(data_dir: str | None, holdout: float | None, max_bad: int) -> Dataset:
    """Photos in folders; see `folders.load`.

    Raises:
        UsageError: as that does.
    """
    if data_dir is None:
        raise UsageError("--dataset=folder needs --data_dir, which holds train/CLASS/*.jpg")
    photos = folders.load(data_dir, holdout, max_bad)
    return Dataset(
        name="folder",
        origin=photos.origin,
        train=photos.train,
        test=photos.test,
        class_names=photos.class_names,
        channels=3,
        small=False,
        notes=photos.notes,
    )


def with_images_per_class(dataset: Dataset, count: int, seed: int) -> Dataset:
    """With so many training images of each class, drawn by `seed`; fewer are among more.

    Raises:
        UsageError: where a class has fewer.
    """
    labels = np.asarray(dataset.train.labels)
    drawn = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for label, name in enumerate(dataset.class_names):
        of_class = drawn[labels[drawn] == label]
        if len(of_class) < count:
            raise UsageError(
                f"--images_per_class={count}: {name!r} has {len(of_class)} training images"
            )
        chosen.append(of_class[:count])
    return dataclasses.replace(
        dataset,
        drawn=f"{count} of each class by seed {seed}",
        train=Subset(dataset.train, np.sort(np.concatenate(chosen))),
    )


def load_test(name: str, data_dir: str | None, split: str | None) -> tuple[Source, Sequence[str]]:
    """The images to test on alone, and the names of the classes; no training split is needed.

    Raises:
        UsageError: as `load` does.
    """
    embedded = name == "digits" or (
        name == "fashion_mnist" and not _is_prepared("fashion_mnist", data_dir)
    )
    if embedded:
        if split not in (None, "test"):
            raise UsageError(f"--split={split}: {name} has the split test alone")
        dataset = load(name, data_dir, "train", None)
    elif data_dir is not None and not pathlib.Path(data_dir).is_dir():
        raise UsageError(f"--data_dir={data_dir}: no such directory")
    else:
        dataset = _tfds(name, data_dir, None, split)
    return dataset.test, dataset.class_names


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8; every fifth of each class is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    by_class = np.argsort(digits.target, kind="stable")
    is_test = np.zeros(len(images), bool)
    is_test[by_class[::5]] = True
    return Dataset(
        name="digits",
        origin="scikit-learn",
        train=ArraySource(images[~is_test], digits.target[~is_test]),
        test=ArraySource(images[is_test], digits.target[is_test]),
        class_names=[str(name) for name in digits.target_names],
        channels=1,
        small=True,
    )


def _fashion_mnist() -> Dataset:
    """Xiao, Rasul and Vollgraf 2017 (arXiv:1708.07747), from the files of the Debian package."""
    if not _DEBIAN_FASHION_MNIST.is_dir():
        raise UsageError(
            "fashion_mnist is neither prepared under --data_dir as a TFDS data set nor installed "
            f"in {_DEBIAN_FASHION_MNIST}; give --data_dir, or apt-get install dataset-fashion-mnist"
        )
    sources = [
        ArraySource(
            _read_idx(_DEBIAN_FASHION_MNIST / f"{part}-images-idx3-ubyte.gz")[..., None],
            _read_idx(_DEBIAN_FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz"),
        )
        for part in ("train", "t10k")
    ]
    return Dataset(
        name="fashion_mnist",
        origin="idx files",
        train=sources[0],
        test=sources[1],
        class_names=_FASHION_MNIST_CLASSES,
        channels=1,
        small=True,
    )


def _read_idx(path: pathlib.Path) -> np.ndarray:
    """An array of bytes in LeCun's idx format: two zeros, type 8, rank, sizes, values."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UsageError(f"{path}: {error}") from None
    rank = data[3] if len(data) > 4 else 0
    shape = struct.unpack_from(f">{rank}I", data, 4) if len(data) >= 4 + 4 * rank else ()
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise UsageError(f"{path}: not an idx file of bytes, or cut short")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


# ------------------------------------------------------------------------------------------ TFDS
def _is_prepared(name: str, data_dir: str | None) -> bool:
    return data_dir is not None and (pathlib.Path(data_dir) / name.split(":")[0]).is_dir()


def _tfds(
    name: str, data_dir: str | None, train_split: str | None, test_split: str | None
) -> Dataset:
    """Any prepared image classification data set of TensorFlow Datasets, without TensorFlow.

    Without a split to train on, the test images stand in its place.
    """
    import tensorflow_datasets as tfds

    if not _is_prepared(name, data_dir):
        raise UsageError(
            f"--dataset={name} is not prepared under --data_dir={data_dir}; known without TFDS: "
            "digits, fashion_mnist"
        )
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--dataset={name} under --data_dir={data_dir}: {reason}") from None
    if not builder.info.splits:
        raise UsageError(f"--dataset={name} under --data_dir={data_dir} has no prepared split")
    image_key, label_key = (builder.info.supervised_keys or ("image", "label"))[:2]
    features = dict(builder.info.features)
    image, label = features.get(image_key), features.get(label_key)
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise UsageError(f"--dataset={name} has no images with class labels: {list(features)}")
    height, width, channels = image.shape
    if channels not in (1, 3):
        raise UsageError(f"--dataset={name} has images of {channels} channels; 1 or 3 can be read")

    decoders = {image_key: tfds.decode.SkipDecoding()}

    def source(split: str) -> Source:
        examples: Any
        try:
            if str(builder.info.file_format.value) == "tfrecord":
                examples = TfrecordExamples(
                    builder.info.splits[split], builder.info.features, decoders
                )
            else:
                examples = builder.as_data_source(split, decoders=decoders)
            if not len(examples):
                raise ValueError("it is empty")
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            if isinstance(error, UsageError):
                raise
            splits = ", ".join(builder.info.splits)
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"--dataset={name}: split {split!r} cannot be read ({reason}); it has {splits}"
            ) from None
        return TfdsSource(examples, image_key, label_key, channels)

    test_split = test_split or _labelled_test_split(builder, source)
    train_split = train_split or test_split
    return Dataset(
        name=name,
        origin=f"{builder.info.full_name}, {train_split} and {test_split}",
        train=source(train_split),
        test=source(test_split),
        class_names=label.names,
        channels=channels,
        small=max(height or 224, width or 224) <= _SMALL_PIXELS,
    )


def _labelled_test_split(builder: Any, source: Callable[[str], Source]) -> str:
    """The test split; or validation, where there is no test split or its labels are kept back."""
    splits = [split for split in ("test", "validation") if split in builder.info.splits]
    for split in splits:
        if source(split)[0][1] >= 0:  # ImageNet's test labels are all -1
            return split
    raise UsageError(
        f"--dataset={builder.name} has no labelled test or validation split but "
        f"{', '.join(builder.info.splits)}; name one: --train_split='train[:90%]' "
        "--test_split='train[90%:]'"
    )


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A TFDS split whose images are decoded here: OpenCV, without the GIL."""

    examples: Any  # random access to {image_key: bytes, label_key: int}
    image_key: str
    label_key: str
    channels: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        example = self.examples[index]
        colour = cv2.IMREAD_GRAYSCALE if self.channels == 1 else cv2.IMREAD_COLOR_RGB
        # TFDS's own decoder ignores EXIF orientation too.
        flags = colour | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(example[self.image_key], np.uint8), flags)
        if image is None:
            raise UsageError(f"example {index}: its image cannot be decoded")
        return image.reshape(*image.shape[:2], self.channels), int(example[self.label_key])

    @property
    def labels(self) -> Sequence[int]:
        """Of all examples; no image is decoded for it."""
        return [int(self.examples[i][self.label_key]) for i in range(len(self.examples))]
