"""Pictures in files, which may come from anywhere: upright, in 8 bits, or refused by name."""

import os
import pathlib
import stat
import warnings
from collections.abc import Callable, Iterable

from PIL import Image, ImageOps

from flaxcnn.errors import PictureError
from flaxcnn.transforms import in_8_bits

FORMATS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",)}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# Longer side over shorter: where the shorter is enlarged to 256 pixels, memory goes with it.
MAX_ASPECT = 100


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file, turned as its camera says, in mode "L" or "RGB".

    Grey pictures of 16 bits are brought to 8; what is transparent shows on black.

    Raises:
        PictureError: for a file that is missing, broken, too large (PIL's limit of 179 million
            pixels), too thin (MAX_ASPECT), or none of JPEG, PNG, WebP and BMP.
    """
    upright = in_8_bits(_decoded(path, ImageOps.exif_transpose))
    if "A" in upright.getbands() or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    return upright.convert("L" if upright.mode in ("1", "L") else "RGB")


def read_as_stored(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file as RGB, neither turned nor blended: as torchvision's data sets read it.

    Published accuracies are of pictures read so.

    Raises:
        PictureError: as `read_picture` does.
    """
    return _decoded(path, lambda image: in_8_bits(image).convert("RGB"))


def _decoded(
    path: str | os.PathLike[str], then: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    name = printable(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise PictureError(f"{name}: not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a size above half the limit, of odd metadata
            with Image.open(path, formats=tuple(FORMATS)) as image:
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise PictureError(
                        f"{name}: {image.width}x{image.height} pixels; one side may be at most "
                        f"{MAX_ASPECT} times the other"
                    )
                image.load()
                return then(image)
    except PictureError:
        raise
    except Image.UnidentifiedImageError:
        raise PictureError(f"{name}: none of {', '.join(FORMATS)}") from None
    except Exception as error:  # PIL's decoders raise whatever a broken file leads them into
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{name}: no whole picture: {reason}") from error


def printable(path: str | os.PathLike[str]) -> str:
    """A path on one line: what cannot be printed, as a line break in it, escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in os.fspath(path)
    )


def picture_files(paths: Iterable[str | os.PathLike[str]]) -> list[pathlib.Path]:
    """The files named, and those in the folders named that are called like pictures, sorted.

    Raises:
        PictureError: for a path that is not there, or a folder without pictures.
    """
    files = []
    for path in map(pathlib.Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise PictureError(f"{path}: no such file")
            files.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise PictureError(f"{path}: no pictures in this folder ({', '.join(SUFFIXES)})")
        files += inside
    return files
