"""Prepares a small TFDS data set of JPEG images of many sizes, in either file format."""

import pathlib
import struct
import subprocess
import sys

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """Bright squares and bright discs on dark grounds."""

    VERSION = tfds.core.Version("1.0.0")
    SIZES = {"train": 48, "test": 10}  # noqa: RUF012 (tfds builders have plain class attributes)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=["disc", "square"]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: object) -> dict:
        return {split: self._generate_examples(size) for split, size in self.SIZES.items()}

    def _generate_examples(self, size: int):  # type: ignore[no-untyped-def]
        for i in range(size):
            yield i, {"image": jpeg(i), "label": i % 2}


def jpeg(i: int) -> bytes:
    """Example i: odd ones show a square, even ones a disc."""
    rng = np.random.default_rng(i)
    height, width = rng.integers(40, 70, 2)
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    colour = [int(c) for c in rng.integers(150, 255, 3)]
    if i % 2:
        cv2.rectangle(image, (10, 10), (30, 30), colour, -1)
    else:
        cv2.circle(image, (20, 20), 11, colour, -1)
    return cv2.imencode(".jpg", image)[1].tobytes()


def prepare(data_dir: pathlib.Path, file_format: str) -> None:
    """Writes data_dir/tiny_shapes/1.0.0, in a process of its own: tfds keeps what it has built."""
    subprocess.run([sys.executable, __file__, data_dir], check=True, capture_output=True)
    if file_format == "tfrecord":
        _rewrite_as_tfrecord(data_dir / "tiny_shapes" / "1.0.0")


def _rewrite_as_tfrecord(directory: pathlib.Path) -> None:
    """The same serialised examples in tfrecord files, which tfds itself writes with TensorFlow."""
    for path in directory.glob("*.array_record*"):
        with array_record_data_source.ArrayRecordDataSource(str(path)) as records:
            frames = b"".join(
                _frame(record) for record in records.__getitems__(range(len(records)))
            )
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(frames)
        path.unlink()
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


def _frame(record: bytes) -> bytes:
    length = struct.pack("<Q", len(record))
    return length + _masked_crc(length) + record + _masked_crc(record)


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated and offset as the format has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


if __name__ == "__main__":
    TinyShapes(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
