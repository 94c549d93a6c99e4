"""How a convolution's kernel moves over its images, in numbers that XLA's calls can carry."""

from collections.abc import Sequence
from typing import NamedTuple


class Geometry(NamedTuple):
    """A convolution but for the shapes of its arrays."""

    strides: tuple[int, int]
    dilation: tuple[int, int]
    low: tuple[int, int]  # rows and columns of zeros before the image
    high: tuple[int, int]  # and after it
    groups: int

    def as_numbers(self) -> tuple[int, ...]:
        """For `from_numbers`."""
        return (*self.strides, *self.dilation, *self.low, *self.high, self.groups)

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> "Geometry":
        """Of `as_numbers`.

        Raises:
            ValueError: there are more or fewer, in a program that another version made.
        """
        *steps, groups = numbers
        strides, dilation, low, high = zip(steps[::2], steps[1::2], strict=True)
        return cls(strides, dilation, low, high, groups)
