"""Pictures in folders, one folder for each class: one's own photos, or ImageNet as usually kept.

    DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (or test), or DIR/CLASS/*.jpg to be divided.

Every picture is decoded once before anything else, so that none that is broken ends a run later.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from flaxcnn.errors import PictureError
from flaxcnn.pictures import SUFFIXES, printable, read_as_stored, read_picture
from train.errors import UsageError

_TEST_SPLITS = ("val", "validation", "test")  # the first that is there


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Pictures by class; what is broken is told by name when it is read."""

    files: Sequence[pathlib.Path]
    labels: Sequence[int]
    as_stored: bool = False  # neither turned nor blended, as published accuracies are measured

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            return np.asarray(self.picture(index)), self.labels[index]
        except PictureError as error:
            raise UsageError(str(error)) from None

    def picture(self, index: int) -> Image.Image:
        """The picture in RGB.

        Raises:
            PictureError: if it cannot be read.
        """
        read = read_as_stored if self.as_stored else read_picture
        return read(self.files[index]).convert("RGB")


class Photos(NamedTuple):
    """Pictures to train on and pictures to test on, all of which can be read."""

    train: FolderSource
    test: FolderSource
    class_names: list[str]
    origin: str  # which pictures, by their names and sizes
    notes: list[str]  # what was left out


# --------------------------------------------------------------------------------- train and test
def load(data_dir: str, holdout: float | None, max_bad: int) -> Photos:
    """The photos of a directory, each looked at.

    Args:
        holdout: share of the pictures to test on, where there is no folder of those. Which they
            are goes by a hash of class and file name: it stays when others are added.
        max_bad: how many broken pictures to leave out.

    Raises:
        UsageError: for another layout, classes without pictures, or more broken ones, all listed.
    """
    root = _directory(data_dir)
    train, test, class_names, others = _divided(root, holdout)
    bad = _broken([*train.files, *test.files])
    if len(bad) > max_bad:
        raise UsageError(
            f"{len(bad)} pictures cannot be read, more than --max_bad={max_bad}:\n  "
            + "\n  ".join(bad.values())
        )
    train, test = (_chosen(s, [file not in bad for file in s.files]) for s in (train, test))
    _check_classes(train, test, class_names, held_out=holdout is not None)
    notes = [f"left out   {reason}" for reason in bad.values()]
    if others:
        kinds = (f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common())
        notes.append(f"left out   what is not {', '.join(SUFFIXES)}: {', '.join(kinds)}")
    origin = f"{len(train)} and {len(test)} pictures, {_fingerprint(root, train, test)}"
    return Photos(train, test, class_names, origin, notes)


def _divided(
    root: pathlib.Path, holdout: float | None
) -> tuple[FolderSource, FolderSource, list[str], Counter[str]]:
    """Pictures to train on and to test on, the classes, and the suffixes of other files."""
    names = [split for split in _TEST_SPLITS if (root / split).is_dir()]
    has_train = (root / "train").is_dir()
    if has_train and names:
        if holdout is not None:
            raise UsageError(f"--holdout: {root} has its test pictures in {names[0]}/ already")
        train, class_names, others = _pictures(root / "train")
        test, test_names, more_others = _pictures(root / names[0])
        test = _renumbered(test, test_names, class_names, root / names[0])
        return train, test, class_names, others + more_others
    folder = root / "train" if has_train else root
    if holdout is None:
        raise UsageError(
            f"--data_dir={root} has no pictures to test on: put some into val/CLASS/, and those to "
            "train on into train/CLASS/, or have a share of CLASS/ held out, as --holdout=0.2"
        )
    both, class_names, others = _pictures(folder)
    is_test = [_fraction(file.relative_to(folder)) < holdout for file in both.files]
    train, test = (_chosen(both, [out is side for out in is_test]) for side in (False, True))
    return train, test, class_names, others


def read_split(data_dir: str, split: str, as_stored: bool) -> tuple[FolderSource, list[str]]:
    """The pictures of one split, and the names of the classes: its folders, sorted.

    They are not looked at before, as a test of ImageNet need not read it twice.

    Raises:
        UsageError: where there are none.
    """
    root = _directory(data_dir)
    folder = root / split
    if not folder.is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise UsageError(
            f"--data_dir={data_dir} has no folder {split!r} with a folder for each class; it has "
            f"{', '.join(map(printable, there[:10])) or 'no folders'}"
        )
    source, class_names, _ = _pictures(folder)
    return dataclasses.replace(source, as_stored=as_stored), class_names


# -------------------------------------------------------------------------------- what lies there
def _directory(data_dir: str) -> pathlib.Path:
    if not pathlib.Path(data_dir).is_dir():
        raise UsageError(f"--data_dir={data_dir}: no such directory")
    return pathlib.Path(data_dir)


def _pictures(folder: pathlib.Path) -> tuple[FolderSource, list[str], Counter[str]]:
    """What is called like a picture, by class; the classes; and the suffixes of other files."""
    try:
        classes = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
    except OSError as error:
        raise UsageError(f"{printable(folder)}: {error.strerror}") from None
    for path in classes:
        if not path.name.isprintable():
            raise UsageError(
                f"{printable(path)}: rename it; the name of a class has to be printed as it is"
            )
    files: list[pathlib.Path] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, path in enumerate(classes):
        if folder.resolve().is_relative_to(path.resolve()):
            raise UsageError(f"{printable(path)}: a link to where it lies in itself")
        found = _files_in(path)
        inside = [file for file in found if file.suffix.lower() in SUFFIXES]
        others.update(f.suffix.lower() for f in found if f.suffix.lower() not in SUFFIXES)
        files += inside
        labels += [label] * len(inside)
    if not files:
        raise UsageError(
            f"{printable(folder)}: no pictures ({', '.join(SUFFIXES)}) in folders of classes"
        )
    return FolderSource(files, labels), [path.name for path in classes], others


def _files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files in a folder and those in it, sorted, but what is hidden; links are not entered."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"{printable(error.filename)}: {error.strerror}")

    found = []
    for path, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [pathlib.Path(path, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _renumbered(
    test: FolderSource, its_names: Sequence[str], class_names: Sequence[str], folder: pathlib.Path
) -> FolderSource:
    """With the labels of the training pictures, which may have classes that are not tested."""
    unknown = [name for name in its_names if name not in class_names]
    if unknown:
        raise UsageError(
            f"{printable(folder / unknown[0])}: a class that has no folder to train on"
        )
    return FolderSource(test.files, [class_names.index(its_names[i]) for i in test.labels])


def _chosen(source: FolderSource, chosen: Sequence[bool]) -> FolderSource:
    return FolderSource(
        [file for file, taken in zip(source.files, chosen, strict=True) if taken],
        [label for label, taken in zip(source.labels, chosen, strict=True) if taken],
    )


def _check_classes(
    train: FolderSource, test: FolderSource, class_names: Sequence[str], held_out: bool
) -> None:
    if len(class_names) < 2:
        raise UsageError(f"one class, {class_names[0]!r}; a classifier needs at least two")
    seen = set(train.labels)
    empty = [name for i, name in enumerate(class_names) if i not in seen]
    if empty:
        raise UsageError(
            f"no picture of class {printable(empty[0])!r} to train on"
            + ("; --holdout takes them all, give less" if held_out else "")
        )
    if not test.files:
        raise UsageError("no picture to test on" + ("; give more --holdout" if held_out else ""))


def _fraction(name: pathlib.PurePath) -> float:
    """From 0 to 1, by the name."""
    digest = hashlib.sha256(os.fsencode(name.as_posix())).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _fingerprint(root: pathlib.Path, *sources: FolderSource) -> str:
    """Another one for other files, by their names in `root` and their sizes."""
    digest = hashlib.sha256()
    for source in sources:
        for file, label in zip(source.files, source.labels, strict=True):
            name = os.fsencode(file.relative_to(root).as_posix())
            digest.update(b"%d %d %b\0" % (label, file.stat().st_size, name))
        digest.update(b"\0")
    return digest.hexdigest()[:8]


# ---------------------------------------------------------------------------------- what is broken
def _broken(files: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
    """Those that cannot be read, each with the reason."""

    def fault(file: pathlib.Path) -> str | None:
        try:
            read_picture(file)
        except PictureError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders work without the GIL
        faults = pool.map(fault, files)
        return {file: said for file, said in zip(files, faults, strict=True) if said}
