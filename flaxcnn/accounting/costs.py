"""What each network of the registry costs, as `summarize` counted it: no tracing at a look-up.

`costs.csv` is written by `python -m benchmarks.resources`; a test counts each network again.
"""

import csv
import functools
import importlib.resources
from collections.abc import Mapping
from typing import NamedTuple

from flaxcnn import registry
from flaxcnn.weights import COSTS, get_model_weights


class Cost(NamedTuple):
    """Of one network and one image, in float32; GoogLeNet without its auxiliary classifiers."""

    image_size: int  # pixels
    params: int
    macs: int  # one multiply-add is one: what papers and torchvision call FLOPs
    activation_bytes: int  # of the outputs of all layers
    forward_bytes: int  # variables, and the activations that are there at one time
    training_bytes: int  # with SGD with momentum


def cost(name: str) -> Cost:
    """Of network `name`, for images of `image_size(name)`.

    Raises:
        InputError: a ValueError, for an unknown name.
    """
    registry.family_of(name)
    return _costs()[name]


def image_size(name: str) -> int:
    """Pixels, of the images that its default weights were evaluated on, or its paper's."""
    if name in COSTS:
        return get_model_weights(name).__members__["DEFAULT"].transforms().crop_size
    return registry.create_model(name).default_image_size


@functools.cache
def _costs() -> Mapping[str, Cost]:
    text = importlib.resources.files("flaxcnn.accounting").joinpath("costs.csv").read_text("utf-8")
    return {
        row.pop("network"): Cost(**{key: int(value) for key, value in row.items()})
        for row in csv.DictReader(text.splitlines())
    }
