"""The order in which a run sees the images of its data set, and the batches that it gets them in.

The order is grain's, a function of (seed, epoch); augmentation is drawn by (seed, epoch, example).
So a run resumes at a step by slicing, and any number of threads or processes sees the same images.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np

from flaxcnn.transforms import ImageClassification
from train import augment
from train.datasets import Source
from train.plan import Plan
from train.steps import MeanAndStd

Batch = dict[str, Any]  # of arrays


def training_batches(
    source: Source, plan: Plan, first_step: int, read_threads: int
) -> Iterator[Batch]:
    """This process's share of every global batch from `first_step` on, without end.

    Epochs follow each other without a gap, so no example is dropped.
    Yields {"image": uint8 [b, S, S, C], "label": int32 [b]}, b the batch size per process.
    """

    def example(item: tuple[np.ndarray, int], rng: np.random.Generator) -> Batch:
        image, label = item
        if plan.augmentation == "resized_crop":
            image = augment.random_resized_crop(image, plan.image_size, rng)
        else:
            image = augment.central_square(image, plan.image_size)
            if plan.augmentation == "pad_crop":
                image = augment.pad_and_crop(image, rng)
        if plan.flip:
            image = augment.random_flip(image, rng)
        return {"image": image, "label": np.int32(label)}

    examples = (
        grain.MapDataset.source(source).seed(plan.seed).shuffle().repeat().random_map(example)
    )
    return _in_shares(examples, plan.batch_size, first_step, read_threads)


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
    source: Source, transform: ImageClassification, batch_size: int, read_threads: int
) -> Iterator[Batch]:
    """Every example once, in order; the last batch is padded, and `mask` says with what.

    Yields {"image": uint8, "label", "mask": bool [b]}; every process yields as many batches. The
    images are not normalised yet, which is the device's part.
    """
    count = len(source)
    padded = -(count // -batch_size) * batch_size

    def example(index: int) -> Batch:
        image, label = source[min(index, count - 1)]
        image = transform.view(image)
        return {"image": image, "label": np.int32(label), "mask": np.bool_(index < count)}

    examples = grain.MapDataset.range(padded).map(example)
    return _in_shares(examples, batch_size, 0, read_threads)


def _in_shares(
    examples: grain.MapDataset, batch_size: int, first_batch: int, read_threads: int
) -> Iterator[Batch]:
    """Batches whose consecutive parts belong to consecutive processes, so that the global batches
    are the same for any number of processes."""
    processes = jax.process_count()
    shares = examples.batch(batch_size // processes, drop_remainder=True)
    mine = shares[jax.process_index() + first_batch * processes :: processes]
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=2 * read_threads)
    return iter(mine.to_iter_dataset(options))
