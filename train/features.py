"""A linear probe's features: what the frozen network makes of each image, computed once and kept.

With no augmentation every epoch sees the same images, and all but the last layer answers the same.
Steps on its answers then take as long as that layer does.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tqdm import tqdm

from flaxcnn import convert
from flaxcnn.download import cache_directory
from flaxcnn.network import Network
from flaxcnn.transforms import ImageClassification
from train import data, steps
from train.datasets import Dataset, Source
from train.plan import Plan
from train.transfer import Path, Split

_FORMAT = 1  # of what the cache's names stand for


def suffice(plan: Plan) -> bool:
    """Whether the plan's run can do with the features of each image."""
    return plan.transfer == "linear_probe" and plan.augmentation == "none" and not plan.flip


# --------------------------------------------------------------------------------- the two halves
@dataclasses.dataclass(frozen=True)
class LastLayer:
    """The network from its last layer on, applied as a network is, with all the variables.

    The layers before it see a blank image; nothing depends on them, so XLA leaves them out.
    """

    model: Network
    last: frozenset[Path]  # modules
    image_shape: tuple[int, int, int]

    def apply(self, variables: Any, x: jax.Array, **how: Any) -> Any:
        """Features [N, F] -> logits [N, num_classes]."""

        def instead(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name == "__call__" and context.module.path in self.last:
                return next_call(x, *args[1:], **kwargs)
            return next_call(*args, **kwargs)

        with nn.intercept_methods(instead):
            return self.model.apply(variables, jnp.zeros((1, *self.image_shape)), **how)

    def features(self, variables: Any, images: jax.Array) -> jax.Array:
        """Images [N, H, W, C] -> what the last layer sees of them in evaluation [N, F]."""
        seen: list[jax.Array] = []

        def watch(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name == "__call__" and context.module.path in self.last:
                seen.append(args[0])
            return next_call(*args, **kwargs)

        with nn.intercept_methods(watch):
            self.model.apply(variables, images, train=False)
        (features,) = seen
        return features.astype(jnp.float32)


# -------------------------------------------------------------------------------- what a run sees
@dataclasses.dataclass(frozen=True)
class FeatureSource:
    """Features [N, F] and labels [N], read from the disk as they are asked for."""

    features: np.ndarray
    labels: Any

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.array(self.features[index]), int(self.labels[index])


@dataclasses.dataclass(frozen=True)
class Features:
    """The examples of a linear probe, as `data.Images` are those of another run."""

    model: Network
    split: Split
    variables: Mapping[str, Any]
    dataset: Dataset
    plan: Plan
    transform: ImageClassification
    read_threads: int

    mean_and_std = None  # features are not normalised

    @functools.cached_property
    def classifier(self) -> LastLayer:
        """What is applied to a batch."""
        side = self.plan.image_size
        last = frozenset(path[:-1] for path in self.split.rates)
        return LastLayer(self.model, last, (side, side, self.plan.channels))

    def training_batches(self, first_step: int) -> Iterator[data.Batch]:
        """See `data.training_batches`."""
        return data.feature_batches(self._train, self.plan, first_step, self.read_threads)

    def test_batches(self) -> Iterator[data.Batch]:
        """See `data.evaluation_batches`."""
        return data.evaluation_batches(
            self._test, lambda features: features, self.plan.batch_size, self.read_threads
        )

    @functools.cached_property
    def _train(self) -> FeatureSource:
        return self._of(self.dataset.train, "train", self.dataset.drawn)

    @functools.cached_property
    def _test(self) -> FeatureSource:
        return self._of(self.dataset.test, "test", "")

    def _of(self, source: Source, name: str, drawn: str) -> FeatureSource:
        """From the cache, or computed and kept there: whole, or not at all."""
        path = cache_directory() / "features" / self._file_name(name, drawn)
        try:
            features = np.load(path, mmap_mode="r", allow_pickle=False)
            usable = features.ndim == 2 and len(features) == len(source)
        except (OSError, ValueError, EOFError):  # none there, or none that can be read
            usable = False
        if not usable:
            computed = self._computed(source, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, part = tempfile.mkstemp(suffix=".part", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                np.save(file, computed, allow_pickle=False)
            os.replace(part, path)
            features = np.load(path, mmap_mode="r", allow_pickle=False)
        return FeatureSource(features, np.asarray(source.labels))

    def _file_name(self, part: str, drawn: str) -> str:
        """Another one for other weights, other images, or the same ones prepared otherwise."""
        digest = self._of_weights.copy()
        plan = self.plan
        said = {
            "format": _FORMAT,
            "network": [plan.arch, repr(self.model), plan.image_size, plan.channels],
            "images": [plan.dataset, self.dataset.origin, drawn],
            "transform": dataclasses.asdict(self.transform),
            "computed": [plan.precision, jax.default_backend()],
        }
        digest.update(json.dumps(said, sort_keys=True, default=str).encode())
        return f"{digest.hexdigest()[:32]}-{part}.npy"

    @functools.cached_property
    def _of_weights(self) -> Any:  # hashlib's type has no name
        """The SHA-256 of all variables but the last layer's."""
        digest = hashlib.sha256()
        for path, leaf in sorted(convert.by_path(self.variables).items()):
            if path[:-1] not in self.classifier.last:
                digest.update("/".join(path).encode())
                digest.update(np.ascontiguousarray(leaf).data)
        return digest

    def _computed(self, source: Source, name: str) -> np.ndarray:
        """Features [N, F] of all images; each process computes them on its own devices."""
        devices = jax.local_device_count()
        mean_and_std = self.transform.mean, self.transform.std

        def of_batch(variables: Any, images: jax.Array) -> jax.Array:
            return self.classifier.features(variables, steps.normalised(images, mean_and_std))

        over_devices = jax.pmap(of_batch, in_axes=(None, 0), devices=jax.local_devices())
        variables = jax.device_put(dict(self.variables), steps.replicated())
        batch_size = 32 * devices
        batches = data.all_batches(source, self.transform.view, batch_size, self.read_threads)
        shown = tqdm(
            batches,
            f"features of the {name} images",
            total=-(len(source) // -batch_size),
            unit="batch",
            disable=not sys.stderr.isatty(),
        )
        found = []
        for batch in steps.on_devices({"image": b["image"]} for b in shown):
            found.append(jax.device_get(over_devices(variables, batch["image"])))
        width = found[0].shape[-1]
        return np.concatenate([part.reshape(-1, width) for part in found])[: len(source)]
