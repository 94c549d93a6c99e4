"""Random access to a TFDS split that was prepared as tfrecord files, without TensorFlow.

A tfrecord file is a chain of frames: the length of the record (8 bytes, little-endian), a checksum
of it (4), the record, a checksum of it (4). Only the lengths are read to index a file.
"""

import os
import pathlib
import struct
from typing import Any

from train.errors import UsageError

_HEAD_BYTES, _TAIL_BYTES = 12, 4


class TfrecordExamples:
    """The examples of a split, as `builder.as_data_source` would give them.

    Args:
        split: `builder.info.splits[name]`, slices such as "train[:90%]" included.
        features: `builder.info.features`.
        decoders: as `builder.as_data_source` takes them.

    Raises:
        UsageError: for a file whose frames do not end where it ends.
    """

    def __init__(self, split: Any, features: Any, decoders: Any) -> None:
        self._features, self._decoders = features, decoders
        self._places: list[tuple[pathlib.Path, int, int]] = []
        for part in split.file_instructions:
            path = pathlib.Path(part.filename)
            stop = None if part.take < 0 else part.skip + part.take
            self._places += [(path, *frame) for frame in _frames(path)[part.skip : stop]]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        path, offset, length = self._places[index]
        with path.open("rb", buffering=0) as file:
            record = os.pread(file.fileno(), length, offset)
        return self._features.deserialize_example_np(record, decoders=self._decoders)


def _frames(path: pathlib.Path) -> list[tuple[int, int]]:
    """Offset and length of each record of a file."""
    found = []
    with path.open("rb", buffering=0) as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        while at + _HEAD_BYTES <= end:
            (length,) = struct.unpack_from("<Q", os.pread(file.fileno(), 8, at))
            found.append((at + _HEAD_BYTES, length))
            at += _HEAD_BYTES + length + _TAIL_BYTES
    if at != end:
        raise UsageError(f"{path}: not a tfrecord file, or cut short")
    return found
