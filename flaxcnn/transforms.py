"""From a picture to what a network takes: resize, crop and normalise, as weights were evaluated.

The same as torchvision's preset `ImageClassification` on PIL images, whose resizing is antialiased
(https://github.com/pytorch/vision/blob/main/torchvision/transforms/_presets.py).
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image

from flaxcnn.errors import PictureError

# Of ImageNet's channels, red, green, blue: what nearly all weights are for.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_LARGEST = 10_000  # pixels
_MOST_ELONGATED = 100  # times as long as wide
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageClassification:
    """The central square of a picture, normalised: picture -> float32 [crop_size, crop_size, C].

    A picture is a PIL image or a uint8 array, [H, W] or [H, W, C]. C is the length of `mean`: with
    three, grey pictures become RGB; with one, colours become grey (PIL's luma).

    Raises:
        ValueError: for numbers by which no picture could be prepared.
        TypeError: for what is no picture, when it is called.
        PictureError: for one more than a hundred times as long as wide.
    """

    crop_size: int  # pixels, the side of the square
    resize_size: int  # pixels, of the shorter side before the crop; at least `crop_size`
    mean: tuple[float, ...]  # per channel, of values from 0 to 1
    std: tuple[float, ...]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        """Refuses what no picture could be prepared by, as it may come from a file."""
        sizes = (self.crop_size, self.resize_size)
        if not all(isinstance(size, int) and 0 < size <= _LARGEST for size in sizes):
            raise ValueError(f"crop_size and resize_size must be from 1 to {_LARGEST}: {sizes}")
        if self.crop_size > self.resize_size:
            raise ValueError(f"crop_size {self.crop_size} is more than resize_size: {sizes}")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(f"mean and std have one value or three each: {self.mean}, {self.std}")
        if not all(math.isfinite(value) for value in self.mean + self.std) or min(self.std) <= 0:
            raise ValueError(f"mean and std are finite, std above 0: {self.mean}, {self.std}")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation {self.interpolation!r} is none of {list(_FILTERS)}")

    def __call__(self, picture: Image.Image | np.ndarray) -> np.ndarray:
        return self.normalise(self.view(picture))

    def view(self, picture: Image.Image | np.ndarray) -> np.ndarray:
        """Picture -> uint8 [crop_size, crop_size, C], not yet normalised."""
        image = _as_pil(picture).convert("RGB" if len(self.mean) == 3 else "L")
        width, height = image.size
        shorter = min(width, height)
        if max(width, height) > _MOST_ELONGATED * shorter:  # resized, it would take gigabytes
            raise PictureError(f"a picture of {width}x{height} pixels is too narrow")
        # The longer side is cut, not rounded, and the crop's corner is rounded half to even.
        size = (int(self.resize_size * width / shorter), int(self.resize_size * height / shorter))
        if size != image.size:
            image = image.resize(size, _FILTERS[self.interpolation])
        left, top = (round((side - self.crop_size) / 2) for side in size)
        image = image.crop((left, top, left + self.crop_size, top + self.crop_size))
        return np.asarray(image).reshape(self.crop_size, self.crop_size, len(self.mean))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [..., C] -> float32 [..., C]."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def in_8_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits in 8, as PIL would cut them off at 255; others as they are."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def _as_pil(picture: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(picture, Image.Image):
        return in_8_bits(picture)
    if not isinstance(picture, np.ndarray):
        raise TypeError(f"a picture is a PIL image or a uint8 array; got {type(picture).__name__}")
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[:, :, 0]
    if (
        not picture.size
        or picture.dtype != np.uint8
        or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4)))
    ):
        raise TypeError(
            "a picture as an array is uint8, [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; "
            f"got {picture.dtype} {list(picture.shape)}"
        )
    return Image.fromarray(picture)
