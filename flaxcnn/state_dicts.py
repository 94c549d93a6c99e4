"""Files of weights under PyTorch's names: .pth of any age, and safetensors. None is trusted."""

import errno
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from flaxcnn.errors import WeightsError
from flaxcnn.pth import read_pth, write_pth


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays by name of a .pth file or a .safetensors file; its content says which it is.

    Raises:
        WeightsError: for a file that is missing, broken, or neither; it says which and why.
    """
    return read_safetensors(path) if _is_safetensors(path) else read_pth(path)


def write_state_dict(path: str | os.PathLike[str], state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes .safetensors or .pth, as the name ends; the file is there when it is whole.

    Raises:
        WeightsError: for a name that ends otherwise, or a place that cannot be written.
    """
    writers = {".safetensors": write_safetensors, ".pth": write_pth, ".pt": write_pth}
    suffix = pathlib.Path(path).suffix
    if suffix not in writers:
        raise WeightsError(
            f"{path}: weights are written as {', '.join(writers)}; "
            "the name of a model folder has no suffix"
        )
    try:
        writers[suffix](path, state_dict)
    except OSError as error:
        raise WeightsError(f"{path}: not written: {error.strerror}") from error


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file.

    Raises:
        WeightsError: for a file that is missing or broken.
    """
    import safetensors.numpy  # only where such a file is

    try:
        return dict(safetensors.numpy.load_file(path))
    except (  # the package checks the file, but not that numpy has such types and shapes
        *(OSError, safetensors.SafetensorError),
        *(TypeError, KeyError, ValueError, AttributeError),
    ) as error:
        raise WeightsError(f"{path}: no whole safetensors file: {error}") from error


def write_safetensors(path: str | os.PathLike[str], state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, which is there when it is whole.

    Raises:
        OSError: if it cannot be written.
    """
    import safetensors.numpy

    part = pathlib.Path(f"{path}.{os.getpid()}.part")
    part.touch()  # where this fails, safetensors would with an error of its own
    arrays = {key: np.asarray(value, order="C") for key, value in state_dict.items()}
    try:
        # "pt" says that the arrays are PyTorch's, which some readers ask for.
        safetensors.numpy.save_file(arrays, part, metadata={"format": "pt"})
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except safetensors.SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error  # a full disk
    finally:
        part.unlink(missing_ok=True)


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Eight bytes of a length, and JSON: no .pth begins so."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
