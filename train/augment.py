"""Views of one image to train on, drawn from a generator; those to evaluate on are in
`flaxcnn.transforms`, as they belong to the trained network.

Images are uint8 [H, W, C] arrays; every function gives a square one. OpenCV lets go of the GIL, so
that grain's read threads work side by side.
"""

import math

import cv2
import numpy as np

cv2.setNumThreads(0)  # the read threads are the parallelism


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinks = height < image.shape[0] or width < image.shape[1]
    # Averaging over areas is the antialiased way down; OpenCV's linear one skips pixels.
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=mode)
    return resized.reshape(height, width, image.shape[2])  # OpenCV drops a single channel


def central_square(image: np.ndarray, size: int) -> np.ndarray:
    """The shorter side resized to `size`, and the middle cut out."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    # A side never rounds below the crop.
    image = _resize(image, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def pad_and_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifts a square image by up to an eighth of its side each way; black comes in.

    Four pixels at 32: He et al. 2015 (arXiv:1512.03385), section 4.2.
    """
    size = image.shape[0]
    pad = size // 8
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    top, left = rng.integers(0, 2 * pad + 1, 2)
    return padded[top : top + size, left : left + size]


def random_resized_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A rectangle of 8 to 100 % of the area and 3:4 to 4:3 in shape, resized to a square.

    Szegedy et al. 2014 (arXiv:1409.4842), section 6; ten tries, and then the central square.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return _resize(image[top : top + h, left : left + w], size, size)
    return central_square(image, size)


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors every other image left to right."""
    return image[:, ::-1] if rng.random() < 0.5 else image
