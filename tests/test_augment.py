"""Views of images: right pixels, right sizes, right shares."""

import numpy as np
import pytest

from train import augment

RNG = np.random.default_rng


def ramp(height: int, width: int, channels: int = 1) -> np.ndarray:
    """An image whose pixel at (row, column) is 3 * row + 2 * column."""
    image = 3 * np.arange(height)[:, None] + 2 * np.arange(width)
    return np.repeat(image[..., None], channels, axis=2).astype("uint8")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 31), (31, 47), (500, 2), (1, 1)])
def test_central_square_has_the_size_asked_for(height: int, width: int, channels: int) -> None:
    image = np.full((height, width, channels), 7, "uint8")
    view = augment.central_square(image, 32)
    assert view.shape == (32, 32, channels)
    assert (view == 7).all()


def test_central_square_is_the_centre() -> None:
    view = augment.central_square(ramp(16, 20), 16)
    np.testing.assert_array_equal(view, ramp(16, 20)[:, 2:18])


def test_shrinking_averages() -> None:
    board = np.indices((64, 64)).sum(0)[..., None] % 2 * 200  # a chessboard becomes grey
    view = augment.central_square(board.astype("uint8"), 16)
    assert (view == 100).all()


def test_pad_and_crop_shifts_by_up_to_an_eighth() -> None:
    image = ramp(16, 16) + 1
    shifts = set()
    for seed in range(200):
        view = augment.pad_and_crop(image, RNG(seed))
        assert view.shape == image.shape
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        shifts |= {
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(padded[top : top + 16, left : left + 16], view)
        }
    assert shifts == {(top, left) for top in range(5) for left in range(5)}


@pytest.mark.parametrize(("height", "width"), [(60, 80), (8, 300), (300, 8), (1, 1)])
def test_random_resized_crop_has_the_size_asked_for(height: int, width: int) -> None:
    for seed in range(20):
        view = augment.random_resized_crop(np.zeros((height, width, 3), "uint8"), 24, RNG(seed))
        assert view.shape == (24, 24, 3)


def test_random_resized_crop_takes_8_to_100_per_cent() -> None:
    """On a ramp the span of the crop shows in its values."""
    image = np.repeat(np.arange(200, dtype="uint8")[None, :, None], 200, axis=0)
    widths = []
    for seed in range(300):
        row = augment.random_resized_crop(image, 50, RNG(seed))[0, :, 0].astype(int)
        widths.append((row[-1] - row[0]) / 200)
    assert min(widths) < 0.35  # sqrt(0.08 * 3 / 4) = 0.24 at the least
    assert min(widths) > 0.2
    assert max(widths) > 0.9


def test_flip_mirrors_half() -> None:
    image = ramp(4, 6)
    flipped = [
        bool((augment.random_flip(image, RNG(seed)) == image[:, ::-1]).all()) for seed in range(400)
    ]
    assert 0.4 < np.mean(flipped) < 0.6
