"""How pictures are prepared: by hand, and beside torchvision's presets on photos."""

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flaxcnn
from flaxcnn.errors import PictureError
from flaxcnn.transforms import ImageClassification

PLAIN = ImageClassification(crop_size=4, resize_size=4, mean=(0.0,) * 3, std=(1.0,) * 3)


def random_picture(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def test_the_middle_is_cut_out_and_normalised() -> None:
    picture = random_picture(4, 9, 3)
    preset = ImageClassification(
        crop_size=4, resize_size=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    # (9 - 4) / 2 = 2.5 is rounded to the even 2.
    expected = (picture[:, 2:6] / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    result = preset(picture)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)  # float32 against float64


def test_the_longer_side_is_cut_down_to_whole_pixels() -> None:
    """10 x 25 -> 4 x 10, and 25 x 10 -> 10 x 4: a picture of stripes stays where it was."""
    stripes = np.zeros((10, 25, 3), np.uint8)
    stripes[:, 10:15] = 255
    middle = PLAIN.view(stripes)
    assert middle[:, 1:3].min() > 200
    assert middle[:, [0, 3]].max() < 80
    np.testing.assert_array_equal(PLAIN.view(stripes.transpose(1, 0, 2)), middle.transpose(1, 0, 2))


def test_shrinking_averages() -> None:
    """A fine checkerboard becomes grey, where picking pixels would give black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    result = PLAIN.view(board.astype(np.uint8))
    assert result.shape == (4, 4, 3)
    assert abs(result.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 1), (6, 6, 3), (6, 6, 4)])
def test_grey_and_colour_pictures(shape: tuple[int, ...]) -> None:
    picture = random_picture(*shape)
    assert PLAIN(picture).shape == (4, 4, 3)
    grey = ImageClassification(crop_size=4, resize_size=6, mean=(0.5,), std=(0.5,))
    view = grey.view(picture)
    assert view.shape == (4, 4, 1)
    if len(shape) == 2:
        np.testing.assert_array_equal(view[:, :, 0], picture[1:5, 1:5])
    np.testing.assert_array_equal(grey(Image.fromarray(picture.squeeze())), grey(picture))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"got float32 \[4, 4, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"got uint8 \[3, 8, 8\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got uint8 \[1, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 \[0, 4, 3\]"),
        ("photo.jpg", "got str"),
    ],
)
def test_what_is_no_picture_is_refused(picture: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PLAIN(picture)


def test_a_picture_that_would_take_gigabytes_is_refused() -> None:
    preset = dataclasses.replace(PLAIN, crop_size=224, resize_size=256)
    assert preset.view(np.zeros((1, 100, 3), np.uint8)).shape == (224, 224, 3)
    for shape in ((1, 101, 3), (60_000, 1, 3)):
        with pytest.raises(PictureError, match="too narrow"):
            preset.view(np.zeros(shape, np.uint8))


def test_16_bits_are_brought_to_8() -> None:
    picture = Image.fromarray(np.full((4, 4), 0x8040, np.uint16))
    assert (PLAIN.view(picture) == 0x80).all()


@pytest.mark.parametrize(
    "numbers",
    [
        {"crop_size": 0},
        {"crop_size": 5},
        {"resize_size": 10**9},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (1.0, 1.0)},
        {"mean": (float("nan"),) * 3},
        {"interpolation": "nearest"},
    ],
)
def test_numbers_that_prepare_nothing_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(numbers))):
        dataclasses.replace(PLAIN, **numbers)


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    [
        "ResNet50_Weights.IMAGENET1K_V1",  # bilinear, 256 and 224
        "EfficientNet_B3_Weights.IMAGENET1K_V1",  # bicubic, 320 and 300
        "EfficientNet_V2_L_Weights.IMAGENET1K_V1",  # no larger than its crop, another mean
        "VGG16_Weights.IMAGENET1K_FEATURES",
    ],
)
def test_photos_are_prepared_as_by_torchvision(name: str) -> None:
    """On photos of 427x640 and odd parts of them, as PIL images and as arrays."""
    importlib.import_module("torch_side")  # makes torchvision import
    models: Any = importlib.import_module("torchvision.models")
    datasets: Any = importlib.import_module("sklearn.datasets")
    theirs, ours = models.get_weight(name).transforms(), flaxcnn.get_weight(name).transforms()
    for photo in datasets.load_sample_images().images:
        for part in (photo, photo[:301, 7:510], photo[50:121, 100:163], photo.transpose(1, 0, 2)):
            picture = Image.fromarray(np.ascontiguousarray(part))
            expected = theirs(picture).permute(1, 2, 0).numpy()
            # Both resize by PIL to the same uint8; float32 scaling in another order remains, of
            # values up to 255 where the deviation is 1 / 255.
            allowed = 1e-6 * np.abs(expected).max()
            np.testing.assert_allclose(ours(picture), expected, atol=allowed)
            np.testing.assert_array_equal(ours(np.asarray(picture)), ours(picture))
