"""Pictures in, names of classes out: what `python -m flaxcnn predict` does."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np

from flaxcnn import model_folder, pretrained, registry
from flaxcnn.errors import InputError, PictureError
from flaxcnn.inference import optimize_for_inference
from flaxcnn.network import Network
from flaxcnn.pictures import read_picture
from flaxcnn.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageClassification
from flaxcnn.weights import COSTS, WeightsEnum, get_model_weights, imagenet_classes

T = TypeVar("T")


class Classifier(NamedTuple):
    """A network with all that is between a picture and the name of its class."""

    model: Network
    variables: Mapping[str, Any]
    transform: ImageClassification
    class_names: Sequence[str]

    def as_folder(self, arch: str) -> model_folder.ModelFolder:
        """What `model_folder.save` takes; `arch` as `create_model` calls the network."""
        return model_folder.ModelFolder(
            arch=arch,
            arguments=model_folder.arguments_of(arch, self.model),
            variables=self.variables,
            class_names=self.class_names,
            transform=self.transform,
        )


class Guess(NamedTuple):
    """One of the classes that a picture may be of."""

    class_index: int
    class_name: str
    probability: float


def classifier_with_weights(arch: str, weights: str) -> Classifier:
    """Network `arch` with published weights or those of a file, as `load_pretrained` takes them.

    A file does not say how its pictures were prepared, nor always what its classes are: then it is
    as for the network's default weights, and classes of other number than ImageNet's have numbers.

    Raises:
        InputError: as `load_pretrained` does, and for weights that do not classify.
    """
    registry.family_of(arch)  # refuses what is no network, a model folder for one
    members = get_model_weights(arch).__members__ if arch in COSTS else {}
    found = members.get(weights)
    if found is not None and np.isnan(found.meta["acc@1"]):
        raise InputError(f"{found} are for feature maps alone; their classifier is not trained")
    model, variables = pretrained.load_pretrained(arch, weights)
    names: Sequence[str] = [str(i) for i in range(model.num_classes)]
    if model.num_classes == len(imagenet_classes()):
        names = imagenet_classes()
    channels = pretrained.channels_of(model, variables)
    if channels not in (1, 3):
        raise InputError(f"{weights}: for images of {channels} channels; pictures have 1 or 3")
    transform = _transform(model, found or members.get("DEFAULT"), channels)
    return Classifier(model, variables, transform, names)


def _transform(model: Network, weights: WeightsEnum | None, channels: int) -> ImageClassification:
    """As the weights were evaluated; without any, as most are."""
    size = model.default_image_size
    transform = ImageClassification(
        crop_size=size, resize_size=round(size / 0.875), mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    if weights is not None:
        transform = weights.transforms()
    if channels == 1:
        mean, std = ((sum(values) / 3,) for values in (transform.mean, transform.std))
        transform = dataclasses.replace(transform, mean=mean, std=std)
    return transform


def classifier_of_run(folder: str | os.PathLike[str]) -> Classifier:
    """The model folder of a run of `train.main`.

    Raises:
        WeightsError: for a folder that is missing, broken, or does not fit its network.
    """
    saved = model_folder.load(folder)
    model = registry.create_model(saved.arch, **saved.arguments)
    return Classifier(model, saved.variables, saved.transform, saved.class_names)


def predict(
    classifier: Classifier,
    files: Iterable[pathlib.Path],
    *,
    top: int = 5,
    batch_size: int = 16,
    skipped: Callable[[PictureError], None],
) -> Iterator[tuple[pathlib.Path, list[Guess]]]:
    """Each picture with its `top` likeliest classes, the likeliest first.

    Args:
        batch_size: pictures computed at a time.
        skipped: is told of each file that holds no usable picture.
    """
    transform = classifier.transform
    sides, channels = 2 * (transform.crop_size,), len(transform.mean)
    like = jax.ShapeDtypeStruct((batch_size, *sides, channels), np.float32)
    model, prepared = optimize_for_inference(classifier.model, classifier.variables, like)

    @jax.jit
    def probabilities(variables: Any, images: jax.Array) -> jax.Array:
        logits = cast(jax.Array, model.apply(variables, images, train=False))
        return jax.nn.softmax(logits)

    for batch in _batches(_prepared(transform, files, skipped), batch_size):
        images = np.stack([image for _, image in batch])
        # The last batch is filled up, as another shape would be compiled anew.
        filled = np.pad(images, [(0, batch_size - len(batch)), *[(0, 0)] * 3])
        for (path, _), row in zip(batch, np.asarray(probabilities(prepared, filled)), strict=False):
            best = np.argsort(-row, kind="stable")[:top]
            yield path, [Guess(int(i), classifier.class_names[i], float(row[i])) for i in best]


def _prepared(
    transform: ImageClassification,
    files: Iterable[pathlib.Path],
    skipped: Callable[[PictureError], None],
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    for path in files:
        try:
            image = transform(read_picture(path))
        except PictureError as error:
            skipped(error)
        else:
            yield path, image


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
