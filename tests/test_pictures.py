"""Pictures from files: upright, in 8 bits, and refused by name where they are none."""

import pathlib
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flaxcnn.errors import PictureError
from flaxcnn.pictures import picture_files, read_as_stored, read_picture

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_lossless_pictures_arrive_as_they_are(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(np.asarray(read_picture(path)), RGB)


def test_pictures_are_turned_as_the_camera_says(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen right, turned clockwise
    Image.fromarray(RGB).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(read_picture(path)), np.rot90(RGB, -1))


def test_as_stored_is_neither_turned_nor_blended(tmp_path: pathlib.Path) -> None:
    """As torchvision's data sets read pictures: `Image.open(...).convert("RGB")`."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_as_stored(tmp_path / "turned.png")), RGB)
    Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert read_as_stored(tmp_path / "clear.png").getpixel((0, 0)) == (200, 100, 50)


def test_mutated_pictures_are_read_or_refused(tmp_path: pathlib.Path) -> None:
    """Small ones of each format, with EXIF data; what PIL raises is never seen."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    path, rng, refused = tmp_path / "mutated", np.random.default_rng(0), 0
    for suffix in ("png", "jpg", "webp", "bmp"):
        whole_path = tmp_path / f"whole.{suffix}"
        Image.fromarray(RGB).save(whole_path, **({} if suffix == "bmp" else {"exif": exif}))
        whole = np.frombuffer(whole_path.read_bytes(), np.uint8)
        for _ in range(500):
            mutated = whole.copy()
            mutated[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
            path.write_bytes(mutated.tobytes())
            for read in (read_picture, read_as_stored):
                try:
                    read(path)
                except PictureError:
                    refused += 1
    assert 500 < refused < 3900


@pytest.mark.parametrize(
    ("picture", "mode", "corner"),
    [
        (Image.new("L", (4, 4), 77), "L", 77),
        (Image.new("1", (4, 4), 1), "L", 255),
        (Image.fromarray(np.full((4, 4), 0x8040, np.uint16)), "L", 0x80),
        (Image.new("P", (4, 4), 0), "RGB", (0, 0, 0)),
        (Image.new("RGBA", (4, 4), (200, 100, 50, 0)), "RGB", (0, 0, 0)),
        (Image.new("RGBA", (4, 4), (200, 100, 50, 255)), "RGB", (200, 100, 50)),
        (Image.new("LA", (4, 4), (90, 255)), "RGB", (90, 90, 90)),
    ],
)
def test_every_mode_becomes_grey_or_rgb(
    tmp_path: pathlib.Path, picture: Image.Image, mode: str, corner: Any
) -> None:
    picture.save(tmp_path / "picture.png")
    found = read_picture(tmp_path / "picture.png")
    assert (found.mode, found.getpixel((0, 0))) == (mode, corner)


def test_cmyk_becomes_rgb(tmp_path: pathlib.Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg", quality=100)
    red, green, blue = read_picture(tmp_path / "cyan.jpg").getpixel((8, 8))
    assert red < 10
    assert min(green, blue) > 245


def broken(tmp_path: pathlib.Path, content: bytes) -> pathlib.Path:
    (tmp_path / "broken.png").write_bytes(content)
    return tmp_path / "broken.png"


def png(tmp_path: pathlib.Path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    return (tmp_path / "whole.png").read_bytes()


def test_broken_pictures_are_refused_by_name(tmp_path: pathlib.Path) -> None:
    whole = png(tmp_path)
    for content in (b"", b"no picture", whole[:20], whole[: len(whole) // 2]):
        path = broken(tmp_path, content)
        with pytest.raises(PictureError, match=re.escape(str(path))):
            read_picture(path)
    with pytest.raises(PictureError, match="No such file"):
        read_picture(tmp_path / "missing.png")


def test_other_formats_are_refused(tmp_path: pathlib.Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "picture.tiff")
    with pytest.raises(PictureError, match="none of JPEG, PNG, WEBP, BMP"):
        read_picture(tmp_path / "picture.tiff")


def test_a_small_file_that_grows_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the limit set low: above it with a warning of PIL's, above twice of it refused."""
    path = tmp_path / "zeros.png"
    Image.new("L", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    assert read_picture(path).size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(PictureError, match=re.escape(str(path))):
        read_picture(path)


def test_folders_are_searched(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/2.JPG", "1.png", "notes.txt", "b/3.webp"):
        (tmp_path / name).touch()
    found = picture_files([tmp_path / "b", tmp_path / "notes.txt", tmp_path])
    names = ["b/2.JPG", "b/3.webp", "notes.txt", "1.png", "b/2.JPG", "b/3.webp"]
    assert found == [tmp_path / name for name in names]
    with pytest.raises(PictureError, match=r"gone.jpg: no such file"):
        picture_files([tmp_path / "gone.jpg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(PictureError, match="no pictures in this folder"):
        picture_files([tmp_path / "empty"])
