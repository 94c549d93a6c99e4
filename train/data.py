"""The order in which a run sees the images of its data set, and the batches that it gets them in.

The order is grain's, a function of (seed, epoch); augmentation is drawn by (seed, epoch, example).
So a run resumes at a step by slicing, and any number of threads or processes sees the same images.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from flaxcnn.network import Network
from flaxcnn.transforms import ImageClassification
from train import augment
from train.datasets import Dataset, Source
from train.plan import Plan
from train.steps import MeanAndStd

Batch = dict[str, Any]  # of arrays
View = Callable[[np.ndarray], np.ndarray]  # an image as the network gets it, not normalised


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a run's data set, as its network sees them in training and in the test."""

    model: Network
    dataset: Dataset
    plan: Plan
    transform: ImageClassification
    read_threads: int

    @property
    def classifier(self) -> Network:
        """What is applied to a batch."""
        return self.model

    @property
    def mean_and_std(self) -> MeanAndStd:
        """What its images are normalised by."""
        return self.transform.mean, self.transform.std

    def training_batches(self, first_step: int) -> Iterator[Batch]:
        """See the function of this name; from trained weights on, images look as in the test."""
        view = self.transform.view if self.plan.weights else None
        return training_batches(self.dataset.train, self.plan, first_step, self.read_threads, view)

    def test_batches(self) -> Iterator[Batch]:
        """See `evaluation_batches`."""
        return evaluation_batches(
            self.dataset.test, self.transform.view, self.plan.batch_size, self.read_threads
        )


def training_batches(
    source: Source, plan: Plan, first_step: int, read_threads: int, view: View | None = None
) -> Iterator[Batch]:
    """This process's share of every global batch from `first_step` on, without end.

    Epochs follow each other without a gap, so no example is dropped. `view` is of an image that is
    not cropped at random, before it is shifted or mirrored; by default its middle.
    Yields {"image": uint8 [b, S, S, C], "label": int32 [b]}, b the batch size per process.
    """

    def example(item: tuple[np.ndarray, int], rng: np.random.Generator) -> Batch:
        image, label = item
        if plan.augmentation == "resized_crop":
            image = augment.random_resized_crop(image, plan.image_size, rng)
        else:
            image = view(image) if view else augment.central_square(image, plan.image_size)
            if plan.augmentation == "pad_crop":
                image = augment.pad_and_crop(image, rng)
        if plan.flip:
            image = augment.random_flip(image, rng)
        return {"image": image, "label": np.int32(label)}

    examples = _in_order(source, plan).random_map(example)
    return _in_shares(examples, plan.batch_size, first_step, read_threads)


def feature_batches(
    source: Source, plan: Plan, first_step: int, read_threads: int
) -> Iterator[Batch]:
    """As `training_batches`, in the same order, of features [F] float32, which stay as they are."""
    examples = _in_order(source, plan).map(_as_they_are)
    return _in_shares(examples, plan.batch_size, first_step, read_threads)


def _as_they_are(item: tuple[np.ndarray, int]) -> Batch:
    features, label = item
    return {"image": features, "label": np.int32(label)}


def _in_order(source: Source, plan: Plan) -> grain.MapDataset:
    return grain.MapDataset.source(source).seed(plan.seed).shuffle().repeat()


def evaluation_transform(
    plan: Plan, mean_and_std: MeanAndStd, prepared: ImageClassification | None = None
) -> ImageClassification:
    """How the test images of a run are prepared, and later whatever its network sees.

    Where training sees random crops, the test sees the middle 7/8, as is usual on ImageNet. With
    weights whose images were `prepared` so, their statistics, interpolation and share of the image.
    """
    size, cropped = plan.image_size, plan.augmentation == "resized_crop"
    if prepared is None:
        mean, std = mean_and_std
        resize = round(size / 0.875) if cropped else size
        return ImageClassification(
            crop_size=size, resize_size=resize, mean=tuple(mean), std=tuple(std)
        )
    mean, std = prepared.mean, prepared.std
    if plan.channels == 1 and len(mean) == 3:  # the first kernels are summed over the channels
        mean, std = ((sum(values) / 3,) for values in (mean, std))
    return dataclasses.replace(
        prepared,
        crop_size=size,
        resize_size=max(size, round(size * prepared.resize_size / prepared.crop_size)),
        mean=mean,
        std=std,
    )


def evaluation_batches(
    source: Source, view: View, batch_size: int, read_threads: int
) -> Iterator[Batch]:
    """Every example once, in order; the last batch is padded, and `mask` says with what.

    Yields {"image": as `view` gives it, "label", "mask": bool [b]}; every process yields as many
    batches. The images are not normalised yet, which is the device's part.
    """
    return _in_shares(_padded(source, view, batch_size), batch_size, 0, read_threads)


def all_batches(source: Source, view: View, batch_size: int, read_threads: int) -> Iterator[Batch]:
    """As `evaluation_batches`, all of them in each process."""
    batches = _padded(source, view, batch_size).batch(batch_size, drop_remainder=True)
    return iter(batches.to_iter_dataset(_read_options(read_threads)))


def _padded(source: Source, view: View, batch_size: int) -> grain.MapDataset:
    count = len(source)

    def example(index: int) -> Batch:
        image, label = source[min(index, count - 1)]
        return {"image": view(image), "label": np.int32(label), "mask": np.bool_(index < count)}

    return grain.MapDataset.range(-(count // -batch_size) * batch_size).map(example)


def _in_shares(
    examples: grain.MapDataset, batch_size: int, first_batch: int, read_threads: int
) -> Iterator[Batch]:
    """Batches whose consecutive parts belong to consecutive processes, so that the global batches
    are the same for any number of processes."""
    processes = jax.process_count()
    shares = examples.batch(batch_size // processes, drop_remainder=True)
    mine = shares[jax.process_index() + first_batch * processes :: processes]
    return iter(mine.to_iter_dataset(_read_options(read_threads)))


def _read_options(read_threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=2 * read_threads)
