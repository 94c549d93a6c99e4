"""Reads what torch.save wrote, without torch and without executing anything from the file."""

import mmap
import os
import stat
from typing import Any, NoReturn

import numpy as np

from flaxcnn.errors import WeightsError
from flaxcnn.pth.containers import read_legacy, read_tar, read_zip
from flaxcnn.pth.tensors import Parameter, Tensor
from flaxcnn.pth.unpickle import quoted
from flaxcnn.threads import in_threads

_NESTED = ("model", "state_dict", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "module.")  # DataParallel and torch.compile, either outside
_OTHER_FILES = (
    (b"\x1f\x8b", "gzip: unpack it first"),
    (b"<", "a web page, as from a download that failed"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself"),
    (b"\x89HDF", "HDF5"),
)


def read_pth(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The state_dict in a file of torch.save: names -> arrays, in the order of the file.

    The arrays are read-only views into a memory map of the file, of any strides and alignment:
    leave the file as it is while they live (replacing it by another is fine). bfloat16 is that of
    ml_dtypes. In a checkpoint that is not itself a state_dict, its entry "model", "state_dict" or
    "model_state_dict" is taken, the first there is. The prefixes "module." of DataParallel and
    "_orig_mod." of torch.compile go where all names have them.

    In zip files the checksum of every record that is used is verified, unless the file was written
    without (`torch.serialization.set_crc32_options(False)`); the older formats have none.

    Raises:
        WeightsError: with the path, if there is no such file, or it is damaged, or is not a
            state_dict; a pickled module or any other object is refused by the name of its class.
    """
    try:
        return read_buffer(_mapped(path))
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)}: {error}") from None


class _Mapped(mmap.mmap):
    """A file in memory that nobody writes to: its pages can be let go of and read again."""


def let_go(array: np.ndarray) -> None:
    """Frees the memory of an array of `read_pth`; whoever looks at it again, reads it again.

    Of other arrays nothing is freed.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    if not isinstance(mapped, _Mapped) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = np.frombuffer(mapped, np.uint8).ctypes.data
    low, high = (address - first for address in np.lib.array_utils.byte_bounds(array))
    low, high = -(low // -mmap.PAGESIZE) * mmap.PAGESIZE, high // mmap.PAGESIZE * mmap.PAGESIZE
    if low < high:
        mapped.madvise(mmap.MADV_DONTNEED, low, high - low)


def _mapped(path: str | os.PathLike[str]) -> _Mapped:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise WeightsError("is not a file")
        if status.st_size == 0:
            raise WeightsError("is empty")
        with open(path, "rb") as file:
            return _Mapped(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise WeightsError(f"cannot be read: {error.strerror}") from None


def read_buffer(buffer: bytes | mmap.mmap) -> dict[str, np.ndarray]:
    """As `read_pth`, of a file in memory; the arrays are views of `buffer`."""
    data = memoryview(buffer)
    if bytes(data[:4]) == b"PK\3\4":
        pickled, locate = read_zip(data)
    elif bytes(data[257:262]) == b"ustar":
        pickled, locate = read_tar(data)
    elif bytes(data[:1]) == b"\x80":  # the opcode that every pickle starts with
        pickled, locate = read_legacy(data)
    else:
        _refuse_other_file(bytes(data[:64]))

    def array(item: tuple[str, Tensor]) -> np.ndarray:
        name, tensor = item
        try:
            return tensor.array(data, locate(tensor.storage))
        except WeightsError as error:
            raise WeightsError(f"tensor {quoted(name)}: {error}") from None

    tensors = _state_dict(pickled)
    return dict(zip(tensors, in_threads(array, tensors.items(), len(data)), strict=True))


def _refuse_other_file(start: bytes) -> NoReturn:
    for prefix, kind in _OTHER_FILES:
        if start.lstrip().startswith(prefix):
            raise WeightsError(f"is not a file of torch.save, but {kind}")
    if start[8:10] == b'{"':
        raise WeightsError("is not a file of torch.save, but safetensors: name it so")
    raise WeightsError(f"is not a file of torch.save: it starts with {start[:8]!r}")


def _state_dict(pickled: object) -> dict[str, Tensor]:
    """The mapping of names to tensors in a checkpoint, without prefixes."""
    if not isinstance(pickled, dict):
        raise WeightsError(f"holds no state_dict but {quoted(pickled)}")
    nested = (pickled[key] for key in _NESTED if isinstance(pickled.get(key), dict))
    found = next(nested, pickled)
    tensors: dict[str, Tensor] = {}
    for key, value in found.items():
        tensor = _plain(value)
        if not isinstance(key, str) or tensor is None:
            raise WeightsError(
                f"holds no state_dict: {quoted(key)} is {quoted(value)}, not a named tensor"
            )
        tensors[key] = tensor
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _plain(value: object) -> Tensor | None:
    """The tensor that an entry is; None if it is something else."""
    if isinstance(value, Parameter):
        return value.tensor
    return value if isinstance(value, Tensor) else None
