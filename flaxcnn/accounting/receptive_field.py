"""What the units of a map see of the image, along one axis.

The arithmetic of Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural
Networks", Distill 2019, https://distill.pub/2019/computing-receptive-fields, kept for every unit,
so that paths of different lengths, averages over uneven bins and crops come out right as well.
"""

from typing import NamedTuple

import numpy as np


class Field(NamedTuple):
    """Unit i sees the image from pixel `first[i]` to pixel `last[i]` of one axis.

    As long as units follow each other at equal distances, fields go on beyond the margins, into the
    padding, as if there were more units there: so their size is the published one, however small
    the image is, and at the margins it is a bound. Behind what sees the whole image, pixels are
    those of the image alone.
    """

    first: np.ndarray  # [units] of int
    last: np.ndarray  # [units] of int
    jump: int | None  # pixels from one unit's field to the next one's; None where they are uneven
    image: int  # pixels

    @property
    def size(self) -> int:
        """Pixels that the unit which sees most can see."""
        return int((self.last - self.first).max()) + 1

    @property
    def offset(self) -> int:
        """Pixels by which the first unit's field begins before the image."""
        return -int(self.first[0])

    def clipped(self) -> "Field":
        """The pixels of the image alone."""
        bound = self.image - 1
        return Field(np.clip(self.first, 0, bound), np.clip(self.last, 0, bound), None, self.image)


def of_image(size: int) -> Field:
    """Each pixel sees itself."""
    pixels = np.arange(size)
    return Field(pixels, pixels, 1, size)


def through_windows(
    field: Field, outputs: int, window: int, stride: int = 1, dilation: int = 1, before: int = 0
) -> Field:
    """What `outputs` windows see, the first of which starts `before` units before unit 0."""
    starts = np.arange(outputs) * stride - before
    if field.jump is not None:
        first = field.first[0] + starts * field.jump
        last = field.last[0] + (starts + (window - 1) * dilation) * field.jump
        return field._replace(first=first, last=last, jump=field.jump * stride)
    taps = starts[:, None] + np.arange(window) * dilation
    return through_units(field, (taps >= 0) & (taps < len(field.first)), taps)


def through_units(field: Field, seen: np.ndarray, units: np.ndarray | None = None) -> Field:
    """What outputs see that see some units each.

    `seen` [outputs, k] says which of `units` [outputs, k] count; without those, k are all units.
    """
    field = field.clipped()
    if units is None:
        units = np.broadcast_to(np.arange(len(field.first)), seen.shape)
    units = np.where(seen, units, 0)
    first = np.where(seen, field.first[units], field.image - 1).min(axis=1)
    last = np.where(seen, field.last[units], 0).max(axis=1)
    return field._replace(first=first, last=last)


def through_matrix(field: Field, matrix: np.ndarray) -> Field:
    """What a constant matrix [outputs, units] makes of an axis: averages over bins, resizing."""
    support = matrix != 0
    starts, widths = support.argmax(axis=1), support.sum(axis=1)
    strides = np.diff(starts)
    even = len(set(widths)) == 1 and len(set(strides)) <= 1 and (strides > 0).all()
    contiguous = all(support[i, s : s + widths[i]].all() for i, s in enumerate(starts))
    if even and contiguous:
        stride = int(strides[0]) if len(strides) else 1
        return through_windows(
            field, len(matrix), int(widths[0]), stride, before=-int(starts[0])
        )  # fmt: skip
    return through_units(field, support)


def whole(field: Field) -> Field:
    """What one unit sees that sees all of them."""
    field = field.clipped()
    return field._replace(first=field.first.min(keepdims=True), last=field.last.max(keepdims=True))


def united(a: Field, b: Field) -> Field:
    """What units see that see the same unit of `a` and of `b`; one of them may have one unit."""
    if a.jump != b.jump:
        a, b = a.clipped(), b.clipped()
    first, last = np.minimum(a.first, b.first), np.maximum(a.last, b.last)
    return Field(first, last, a.jump, a.image)


def every(field: Field, start: int, stop: int, step: int) -> Field:
    """The units from `start` to before `stop`, every `step`-th."""
    jump = None if field.jump is None else field.jump * step
    chosen = slice(start, stop, step)
    return field._replace(first=field.first[chosen], last=field.last[chosen], jump=jump)


def padded(field: Field, before: int, after: int) -> Field:
    """With so many units more on each side, which see padding; or fewer, where negative."""
    outputs = len(field.first) + before + after
    if field.jump is not None:
        return through_windows(field, outputs, 1, before=before)
    units = np.clip(np.arange(outputs) - before, 0, len(field.first) - 1)
    return field._replace(first=field.first[units], last=field.last[units])
