"""The networks that torchvision has too, the weights both get, and the images both see."""

import zlib
from collections.abc import Mapping

import numpy as np

# Name -> the image size of torchvision's default weights.
OWN_SIZES: Mapping[str, int] = {
    **dict.fromkeys(
        (
            *("alexnet", "googlenet"),
            *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
            *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
            *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
            *("wide_resnet50_2", "wide_resnet101_2"),
        ),
        224,
    ),
    "efficientnet_b0": 224,
    "efficientnet_b1": 240,
    "efficientnet_b2": 288,
    "efficientnet_b3": 300,
    "efficientnet_b4": 380,
    "efficientnet_b5": 456,
    "efficientnet_b6": 528,
    "efficientnet_b7": 600,
    "efficientnet_v2_s": 384,
    "efficientnet_v2_m": 480,
    "efficientnet_v2_l": 480,
}
MODELS = sorted(OWN_SIZES)


def odd_size(name: str) -> int:
    """Images that no stride divides: every padding and every rounding shows."""
    if name == "alexnet":
        return 131
    if name == "googlenet":
        return 119
    return 77 if name.startswith("vgg") else 83


def seeded_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state_dict of random numbers, the same everywhere: each entry's seed is its name's CRC-32.

    Statistics and affine terms are random too, and variances positive. Kernels are scaled so that
    a signal keeps its size from layer to layer; where it may not grow either, as it enters the
    sigmoids of EfficientNet's blocks, which would saturate, to half of that variance or less.
    """
    return {name: _seeded(name, shape) for name, shape in shapes.items()}


def _seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, "int64")
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        return rng.uniform(0.5, 1.5, shape).astype("float32")
    if len(shape) == 1:  # biases and running means
        return rng.uniform(-0.2, 0.2, shape).astype("float32")
    gain = 0.5 if ".block." in name else 2.0
    deviation = np.float32((gain / np.prod(shape[1:])) ** 0.5)
    return rng.standard_normal(shape, dtype="float32") * deviation


def seeded_images(size: int, batch: int = 2, dtype: str = "float32") -> np.ndarray:
    """[batch, size, size, 3]."""
    return np.random.default_rng(size).normal(size=(batch, size, size, 3)).astype(dtype)


def summary(feature_map: np.ndarray) -> np.ndarray:
    """[66]: mean, deviation and 64 evenly spread values of a feature map [N, H, W, C]."""
    flat = np.asarray(feature_map, "float64").ravel()
    spread = flat[np.linspace(0, flat.size - 1, 64).astype(int)]
    return np.concatenate([[flat.mean(), flat.std()], spread]).astype("float32")
