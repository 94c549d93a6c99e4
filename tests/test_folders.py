"""One's own photos: whatever lies in the folders is read, left out by name, or refused in a line.

The photos are scikit-learn's, cut in pieces; the other files are what people have beside them.
"""

import io
import os
import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from train import folders
from train.errors import UsageError

Write = Callable[[pathlib.Path], object]


def photo(seed: int, mode: str = "RGB") -> Image.Image:
    """A piece of a real photo."""
    whole = load_sample_images().images[seed % 2]
    rng = np.random.default_rng(seed)
    y, x = rng.integers(0, 300, 2)
    return Image.fromarray(whole[y : y + 90, x : x + 120]).convert(mode)


def encoded(format_: str = "JPEG", seed: int = 0) -> bytes:
    file = io.BytesIO()
    photo(seed).save(file, format_)
    return file.getvalue()


def fill(folder: pathlib.Path, count: int, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    """So many photos of each class."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            photo(100 * number + i).save(folder / name / f"{i}.jpg")


# ------------------------------------------------------------------------------------- the layouts
@pytest.mark.parametrize("second", ["val", "validation", "test"])
def test_train_and_test(second: str, tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / second, 2)
    found = folders.load(str(tmp_path), None, 0)
    assert found.class_names == ["cat", "dog"]
    assert [p.relative_to(tmp_path).as_posix() for p in found.test.files] == [
        f"{second}/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(2)
    ]
    assert (found.train.labels, found.test.labels) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    image, label = found.train[4]
    np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / "train/dog/1.jpg")))
    assert label == 1


def test_a_class_without_test_pictures_keeps_the_others_labels(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "train", 2, ("ant", "cat", "dog"))
    fill(tmp_path / "val", 1, ("cat", "dog"))
    assert folders.load(str(tmp_path), None, 0).test.labels == [1, 2]


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_share_is_held_out(inside: str, tmp_path: pathlib.Path) -> None:
    fill(tmp_path / inside, 40)
    first = folders.load(str(tmp_path), 0.25, 0)
    held_out = {p.relative_to(tmp_path) for p in first.test.files}
    assert 8 <= len(held_out) <= 32
    assert len(first.train) + len(first.test) == 80
    assert not held_out & {p.relative_to(tmp_path) for p in first.train.files}
    # It stays so when others are added, when more is held out, and wherever the folder lies.
    for name in ("cat", "dog"):
        photo(7).save(tmp_path / inside / name / "new.jpg")
    assert held_out <= {
        p.relative_to(tmp_path) for p in folders.load(str(tmp_path), 0.5, 0).test.files
    }
    moved = tmp_path.with_name(tmp_path.name + "moved")
    tmp_path.rename(moved)
    after = folders.load(str(moved), 0.25, 0)
    new = {pathlib.Path(inside, name, "new.jpg") for name in ("cat", "dog")}
    assert {p.relative_to(moved) for p in after.test.files} - new == held_out


def test_the_origin_tells_data_sets_apart(tmp_path: pathlib.Path) -> None:
    fill(tmp_path, 10)
    origins = {folders.load(str(tmp_path), 0.3, 0).origin}
    photo(9).resize((50, 50)).save(tmp_path / "cat" / "3.jpg")
    origins.add(folders.load(str(tmp_path), 0.3, 0).origin)
    (tmp_path / "cat" / "3.jpg").rename(tmp_path / "dog" / "30.jpg")
    origins.add(folders.load(str(tmp_path), 0.3, 0).origin)
    assert len(origins) == 3
    assert folders.load(str(tmp_path), 0.3, 0).origin in origins


# -------------------------------------------------------------------------------- kinds of pictures
@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *(("png", mode) for mode in ("RGB", "L", "RGBA", "LA", "P", "1", "I;16")),
        *(("jpg", mode) for mode in ("RGB", "L", "CMYK")),
        *(("webp", mode) for mode in ("RGB", "RGBA")),
        *(("bmp", mode) for mode in ("RGB", "L", "P", "1")),
        ("JPEG", "RGB"),
    ],
)
def test_modes_and_formats(suffix: str, mode: str, tmp_path: pathlib.Path) -> None:
    fill(tmp_path, 6)
    picture = photo(3)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    if "A" in mode:
        picture.putalpha(128)  # half of it on black
    path = tmp_path / "cat" / f"other.{suffix}"
    picture.save(path)
    with Image.open(path) as written:
        assert written.mode == mode
    found = folders.load(str(tmp_path), 0.3, 0)
    side = found.train if path in found.train.files else found.test
    image, label = side[side.files.index(path)]
    assert (image.dtype, image.shape, label) == (np.uint8, (90, 120, 3), 0)
    grey = mode in ("L", "LA", "I;16")
    expected = np.asarray(photo(3, "1" if mode == "1" else "L" if grey else "RGB").convert("RGB"))
    expected = expected.astype(float) * (128 / 255 if "A" in mode else 1)
    tolerance = 40 if mode == "P" else 8  # the palette's few colours; what JPEG and WebP lose
    assert np.abs(image - expected).mean() < tolerance


def test_pictures_are_upright(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "train", 2)
    fill(tmp_path / "val", 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it
    photo(5).save(tmp_path / "train" / "cat" / "0.jpg", exif=exif, quality=95)
    image, _ = folders.load(str(tmp_path), None, 0).train[0]
    upright = np.asarray(photo(5).transpose(Image.Transpose.ROTATE_270), float)
    assert image.shape == (120, 90, 3)
    assert np.abs(image - upright).mean() < 8
    stored, _ = folders.read_split(str(tmp_path), "train", as_stored=True)[0][0]
    assert stored.shape == (90, 120, 3)


# ---------------------------------------------------------------------------------- hostile files
HOSTILE: dict[str, tuple[str, Write, str | None]] = {
    "empty": ("x.jpg", lambda p: p.write_bytes(b""), "none of JPEG"),
    "truncated": ("x.jpg", lambda p: p.write_bytes(encoded()[:-900]), "no whole picture"),
    "truncated png": ("x.png", lambda p: p.write_bytes(encoded("PNG")[:5000]), "no whole"),
    "text": ("x.jpg", lambda p: p.write_text("not a photo"), "none of JPEG"),
    "zeros": ("x.png", lambda p: p.write_bytes(bytes(5000)), "none of JPEG"),
    "gif": ("x.jpg", lambda p: p.write_bytes(encoded("GIF")), "none of JPEG"),
    "wide": ("x.png", lambda p: Image.new("RGB", (20_000, 300)).save(p), None),
    "thin": ("x.png", lambda p: Image.new("L", (20_000, 1)).save(p), "20000x1 pixels; one side"),
    "huge": ("x.png", lambda p: Image.new("1", (20_000, 20_000)).save(p), "no whole picture"),
    "loop": ("x.jpg", lambda p: p.symlink_to(p.name), "no whole picture"),
    "dangling": ("x.jpg", lambda p: p.symlink_to("gone.jpg"), "No such file"),
    "pipe": ("x.jpg", os.mkfifo, "not a file"),
    "device": ("x.jpg", lambda p: p.symlink_to("/dev/zero"), "not a file"),
    "folder": ("x.jpg", lambda p: p.mkdir(), None),
    "misnamed": ("x.bmp", lambda p: p.write_bytes(encoded("PNG")), None),
    "unicode": ("каша 🐈 é.jpg", lambda p: p.write_bytes(encoded()), None),
    "newline": ("a\nb.jpg", lambda p: p.write_bytes(encoded()), None),
    "newline, broken": ("a\nb.jpg", lambda p: p.write_text("?"), r"a\nb.jpg: none of JPEG"),
    "no text": (os.fsdecode(b"\xff\xfe.jpg"), lambda p: p.write_text("?"), r"\udcff\udcfe.jpg"),
    "no text, good": (os.fsdecode(b"\xff.jpg"), lambda p: p.write_bytes(encoded()), None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: pathlib.Path) -> None:
    """Read, or named with the reason, on one line; and left out where that is allowed."""
    fill(tmp_path / "train", 2)
    fill(tmp_path / "val", 1)
    file, write, fault = HOSTILE[name]
    write(tmp_path / "train" / "cat" / file)
    if fault is None:
        found = folders.load(str(tmp_path), None, 0)
        assert len(found.train) == 4 + (name != "folder")
        assert not found.notes
    else:
        with pytest.raises(UsageError, match="1 pictures cannot be read") as raised:
            folders.load(str(tmp_path), None, 0)
        _, second = str(raised.value).split("\n")
        assert fault in second
        assert second.isprintable()
        found = folders.load(str(tmp_path), None, 1)
        assert len(found.train) == 4
        assert found.notes == ["left out   " + second.strip()]
    for source in (found.train, found.test):
        for index in range(len(source)):
            image, _ = source[index]
            assert image.ndim == 3


def test_unreadable_files_and_folders(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the system would say: these tests may run as one whom it refuses nothing."""
    fill(tmp_path / "train", 2)
    fill(tmp_path / "val", 1)
    locked = tmp_path / "train" / "cat" / "0.jpg"

    def refuse(path: str | os.PathLike[str], *others: Any, **more: Any) -> Image.Image:
        if os.fspath(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return opens(path, *others, **more)

    opens = Image.open
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UsageError, match=r"0\.jpg: no whole picture: Permission denied"):
        folders.load(str(tmp_path), None, 0)


def test_other_files_are_told(tmp_path: pathlib.Path) -> None:
    fill(tmp_path, 8)
    (tmp_path / "notes.txt").write_text("beside the classes")
    for name in ("IMG.HEIC", "IMG2.heic", "raw", ".DS_Store"):
        (tmp_path / "cat" / name).write_bytes(b"?")
    (note,) = folders.load(str(tmp_path), 0.3, 0).notes
    assert note.endswith(": 2 .heic, 1 without suffix")


@pytest.mark.parametrize("where", ["train", "train/cat", "train/cat/deeper"])
def test_links_to_folders_above(where: str, tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "train", 2)
    fill(tmp_path / "val", 1)
    (tmp_path / where).mkdir(exist_ok=True)
    (tmp_path / where / "loop").symlink_to(tmp_path, target_is_directory=True)
    if where == "train":
        with pytest.raises(UsageError, match="loop: a link to where it lies in itself"):
            folders.load(str(tmp_path), None, 0)
    else:
        assert len(folders.load(str(tmp_path), None, 0).train) == 4


def test_nonsense_is_refused_or_left_out(tmp_path: pathlib.Path) -> None:
    """Photos with bytes changed at random: nothing but a UsageError, and none that fails later."""
    rng = random.Random(0)
    (tmp_path / "cat").mkdir()
    for i in range(150):
        data = bytearray(encoded(rng.choice(["JPEG", "PNG", "WEBP", "BMP"])))
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "cat" / f"{i}.jpg").write_bytes(data)
    fill(tmp_path, 4, ("cat", "dog"))
    found = folders.load(str(tmp_path), 0.5, 150)
    assert 20 < len(found.notes) < 150
    for source in (found.train, found.test):
        assert all(source[i][0].ndim == 3 for i in range(len(source)))


# --------------------------------------------------------------------------------- wrong requests
@pytest.mark.parametrize("name", ["a\nb", "bell\a", os.fsdecode(b"\xff")])
def test_classes_that_cannot_be_named(name: str, tmp_path: pathlib.Path) -> None:
    fill(tmp_path, 3, ("cat", name))
    with pytest.raises(UsageError, match="rename it") as raised:
        folders.load(str(tmp_path), 0.4, 0)
    assert str(raised.value).isprintable()


def test_wrong_layouts(tmp_path: pathlib.Path) -> None:
    def refusal(holdout: float | None) -> str:
        with pytest.raises(UsageError) as raised:
            folders.load(str(tmp_path / "data"), holdout, 0)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "no such directory" in refusal(None)
    (tmp_path / "data").mkdir()
    assert "--holdout=0.2" in refusal(None)
    assert "no pictures" in refusal(0.2)
    fill(tmp_path / "data", 12, ("cat",))
    assert "one class, 'cat'" in refusal(0.3)
    (tmp_path / "data" / "empty").mkdir()
    assert "no picture of class 'empty' to train on" in refusal(0.3)
    (tmp_path / "data" / "empty").rmdir()
    fill(tmp_path / "data", 12)
    assert "no picture to test on; give more --holdout" in refusal(1e-6)
    assert "--holdout takes them all" in refusal(0.999999)
    fill(tmp_path / "data" / "train", 2)
    fill(tmp_path / "data" / "val", 1, ("cat", "cow"))
    assert "cow: a class that has no folder to train on" in refusal(None)
    assert "test pictures in val/ already" in refusal(0.2)
