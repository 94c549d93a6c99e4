"""Pictures in folders: DIR/SPLIT/CLASS/*.jpg, as ImageNet is usually laid out."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from flaxcnn.errors import PictureError
from flaxcnn.pictures import SUFFIXES, read_as_stored
from train.errors import UsageError


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Pictures by class; what is broken is told by name when it is read."""

    files: Sequence[pathlib.Path]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            image = read_as_stored(self.files[index])
        except PictureError as error:
            raise UsageError(str(error)) from None
        return np.asarray(image), self.labels[index]


def read_split(data_dir: str, split: str) -> tuple[FolderSource, list[str]]:
    """The pictures of one split, and the names of the classes: its folders, sorted.

    Raises:
        UsageError: where there are none.
    """
    if not pathlib.Path(data_dir).is_dir():
        raise UsageError(f"--data_dir={data_dir}: no such directory")
    folder = pathlib.Path(data_dir, split)
    if not folder.is_dir():
        there = sorted(path.name for path in pathlib.Path(data_dir).iterdir() if path.is_dir())
        raise UsageError(
            f"--data_dir={data_dir} has no folder {split!r} with a folder for each class; it has "
            f"{', '.join(there[:10]) or 'no folders'}"
        )
    class_names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    files, labels = [], []
    for label, name in enumerate(class_names):
        inside = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        files += inside
        labels += [label] * len(inside)
    if not files:
        raise UsageError(f"{folder}: no pictures ({', '.join(SUFFIXES)}) in folders of classes")
    return FolderSource(files, labels), class_names
