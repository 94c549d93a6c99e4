"""Writes a state_dict as torch.save does, without torch."""

import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flaxcnn.errors import WeightsError
from flaxcnn.pth.tensors import DTYPES

_ALIGNMENT = 64  # of each record's bytes, as torch's: its mmap=True wants it
_ROOT = "flaxcnn"  # torch takes any name
_LARGE = 2**30  # bytes; from here on a record gets 64-bit sizes
_LOCAL_HEADER_BYTES, _ZIP64_EXTRA_BYTES, _EXTRA_HEADER_BYTES = 30, 20, 4
_PADDING = 0x4246  # the kind of extra field that torch pads with, "FB"
_STORAGES = {dtype: name for name, dtype in DTYPES.items()}


def write_pth(path: str | os.PathLike[str], state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays so that `torch.load(path, weights_only=True)` gives them as tensors.

    Each array gets a storage of its own, contiguous and little-endian. The file appears under its
    name only when it is whole; equal arrays give equal bytes.

    Raises:
        WeightsError: for an array of a type that torch lacks, or a name that is not a string;
            nothing is written then.
        OSError: if the file cannot be written.
    """
    storages = {name: _storage_name(name, value) for name, value in state_dict.items()}
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with open(unfinished, "xb") as file:
        try:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                _add(archive, "data.pkl", _pickled(state_dict, storages))
                _add(archive, "byteorder", b"little")
                for index, value in enumerate(state_dict.values()):
                    _add(archive, f"data/{index}", _little_endian_bytes(value))
                _add(archive, "version", b"3\n")
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, target)
        except BaseException:
            os.unlink(unfinished)
            raise


def _storage_name(name: str, value: np.ndarray) -> str:
    if not isinstance(name, str):
        raise WeightsError(f"a state_dict's names are strings, not {name!r}")
    storage = _STORAGES.get(value.dtype.newbyteorder("<"))
    if storage is None:
        known = ", ".join(dtype.name for dtype in _STORAGES)
        raise WeightsError(f"{name}: no storage of torch has type {value.dtype}; known: {known}")
    return storage


def _little_endian_bytes(value: np.ndarray) -> memoryview:
    """The elements in C order; copied only if they are not so already."""
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Adds a record whose bytes start at a multiple of 64."""
    large = len(content) >= _LARGE
    record = zipfile.ZipInfo(f"{_ROOT}/{name}")  # of 1980, as torch's: no clock in the bytes
    record.file_size = len(content)
    fixed = _LOCAL_HEADER_BYTES + len(record.filename) + large * _ZIP64_EXTRA_BYTES
    start = archive.start_dir + fixed + _EXTRA_HEADER_BYTES
    padding = -start % _ALIGNMENT
    record.extra = struct.pack("<HH", _PADDING, padding) + b"Z" * padding
    with archive.open(record, "w", force_zip64=large) as file:
        file.write(content)


# ------------------------------------------------------------------------------ the pickle, by hand
# An OrderedDict of names -> _rebuild_tensor_v2((storage), offset, size, stride, requires_grad,
# hooks), in protocol 2.
def _pickled(state_dict: Mapping[str, np.ndarray], storages: Mapping[str, str]) -> bytes:
    parts = [b"\x80\x02", _ordered_dict(), b"("]
    for index, (name, value) in enumerate(state_dict.items()):
        storage = [
            _string("storage"),
            _global("torch", storages[name]),
            _string(str(index)),
            _string("cpu"),
            _integer(value.size),
        ]
        strides = [int(np.prod(value.shape[axis + 1 :])) for axis in range(value.ndim)]
        arguments = [
            _tuple(storage) + b"Q",  # BINPERSID
            _integer(0),
            _tuple([_integer(n) for n in value.shape]),
            _tuple([_integer(n) for n in strides]),
            b"\x89",  # False
            _ordered_dict(),
        ]
        parts += [
            _string(name),
            _global("torch._utils", "_rebuild_tensor_v2"),
            _tuple(arguments),
            b"R",  # REDUCE
        ]
    return b"".join([*parts, b"u."])  # SETITEMS, STOP


def _ordered_dict() -> bytes:
    return _global("collections", "OrderedDict") + b")R"  # called without arguments


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _string(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)  # LONG1


def _tuple(items: list[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"
