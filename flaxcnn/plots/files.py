"""Figures as files of SVG or PNG."""

import contextlib
import io
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flaxcnn.errors import InputError
from flaxcnn.plots.drawing import matplotlib_as_it_comes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By the endings that a file can have: neither the time nor the version of matplotlib.
_NO_METADATA: Mapping[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}


def check_path(path: str | os.PathLike[str]) -> None:
    """Whether `save` can write there, as far as it can be told before a figure is drawn.

    Raises:
        InputError: a ValueError, for an ending other than .png and .svg, or a missing folder.
    """
    target = pathlib.Path(path)
    if target.suffix.lower() not in _NO_METADATA:
        raise InputError(f"{target}: a picture is a file of {' or '.join(_NO_METADATA)}")
    if not target.parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.parent}")


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG or SVG, whichever the name ends in; equal figures give equal bytes.

    The file appears under its name only when it is whole.

    Raises:
        InputError: a ValueError, for another ending, or where no file can be written.
    """
    check_path(path)
    target = pathlib.Path(path)
    content = _rendered(figure, target.suffix.lower())
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # not there any more, if all went well
            unfinished.unlink()


@matplotlib_as_it_comes()
def _rendered(figure: "Figure", suffix: str) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=suffix.removeprefix("."), metadata=_NO_METADATA[suffix])
    return content.getvalue()
