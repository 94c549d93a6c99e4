"""What several commands read from their command lines."""

import argparse
import math
from typing import Any

from flaxcnn import tables
from flaxcnn.accounting.counting import LARGEST

Commands = Any  # argparse calls it `_SubParsersAction[ArgumentParser]`

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_BYTE_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}


def positive(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def size(text: str) -> int:
    """Of one side of a batch of images."""
    found = positive(text)
    if found > LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is more than {LARGEST:,}")
    return found


def number(text: str) -> float:
    """ "10M" -> 10,000,000."""
    return _scaled(text, _SCALES, "no number such as 10M")


def bytes_number(text: str) -> float:
    """ "100MB" -> 100,000,000; "1GiB" -> 2**30."""
    without_unit = text[:-1] if text[-1:] in "bB" else text
    return _scaled(without_unit, _BYTE_SCALES, "no size such as 100MB", text)


def _scaled(text: str, scales: dict[str, float], complaint: str, told: str | None = None) -> float:
    digits = text.rstrip("kmgibKMGIB")
    scale = scales.get(text[len(digits) :].lower())
    try:
        found = float(digits) * scale if scale else math.nan
    except ValueError:
        found = math.nan
    if not found >= 0:
        raise argparse.ArgumentTypeError(f"{told or text!r} is {complaint}")
    return found


def add_format(parser: argparse.ArgumentParser) -> None:
    """`--format`: how a table is printed."""
    parser.add_argument(
        "--format", choices=tables.FORMATS, default="table", help="how it is printed (table)"
    )
