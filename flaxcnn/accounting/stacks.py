"""Stacks of convolutions compared: why two 3x3 convolutions replaced one of 5x5.

Simonyan and Zisserman 2014, section 2.3: two 3x3 layers see as much as one of 5x5, with 18 C^2
weights instead of 25 C^2 and one more nonlinearity; three see as much as one of 7x7.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from flaxcnn.accounting.counting import summarize
from flaxcnn.accounting.summary import Sides, Summary
from flaxcnn.errors import InputError

_SPEC = re.compile(r"(\d+)x(\d+)(?:/(\d+))?(?:@(\d+))?")


class Conv(NamedTuple):
    """A convolution of C channels to C channels, padded so that stride 1 keeps the map's size."""

    kernel: tuple[int, int]
    stride: int = 1
    dilation: int = 1


class StackCost(NamedTuple):
    """What a stack costs; the coefficients are exact where the strides divide the map's size."""

    layers: int
    receptive_field: Sides
    params: int  # without biases
    macs: int
    output_bytes: int  # of all layers, float32
    params_per_c2: Fraction  # the factor of C^2
    macs_per_c2hw: Fraction  # the factor of C^2 H W
    outputs_per_hwc: Fraction  # the factor of H W C


def parse(text: str) -> Conv:
    """ "3x3/2@4": a 3x3 convolution at stride 2 with dilation 4.

    Raises:
        InputError: a ValueError, for what is none.
    """
    match = _SPEC.fullmatch(text)
    numbers = [1 if number is None else int(number) for number in match.groups()] if match else [0]
    if min(numbers) < 1:
        raise InputError(
            f"{text!r} is no convolution such as 3x3, 3x3/2 (stride 2), 3x3@2 (dilation 2) or 1x7"
        )
    rows, columns, stride, dilation = numbers
    return Conv((rows, columns), stride, dilation)


def cost(stack: Sequence[Conv], channels: int, size: int) -> StackCost:
    """What a stack costs on a map [size, size, channels], without biases.

    Raises:
        InputError: a ValueError, for an empty stack, or sizes below 1.
    """
    if not stack:
        raise InputError("a stack has at least one convolution, such as 3x3")
    summary = _summary(stack, channels, size)
    params = macs = outputs = Fraction(0)
    shrunk = 1  # how many pixels of the map there are for one of the output
    for conv in stack:
        weights = conv.kernel[0] * conv.kernel[1]
        shrunk *= conv.stride**2
        params += weights
        macs += Fraction(weights, shrunk)
        outputs += Fraction(1, shrunk)
    return StackCost(
        layers=len(stack),
        receptive_field=summary.layers[-1].receptive_field,
        params=summary.params,
        macs=summary.macs,
        output_bytes=summary.activation_bytes,
        params_per_c2=params,
        macs_per_c2hw=macs,
        outputs_per_hwc=outputs,
    )


class _Stack(nn.Module):
    """The convolutions themselves, to be counted as every other network is."""

    stack: Sequence[Conv]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.stack:
            pads = [(k - 1) * conv.dilation for k in conv.kernel]
            x = nn.Conv(
                x.shape[-1],
                conv.kernel,
                strides=conv.stride,
                kernel_dilation=conv.dilation,
                padding=[(pad // 2, pad - pad // 2) for pad in pads],
                use_bias=False,
            )(x)
        return x


def _summary(stack: Sequence[Conv], channels: int, size: int) -> Summary:
    return summarize(_Stack(tuple(stack)), image_size=size, in_channels=channels)


def symbolic(coefficient: Fraction, symbols: str) -> str:
    """18, "C^2" -> "18 C^2"; 1, "HWC" -> "HWC"; 9/4, "C^2" -> "9/4 C^2"."""
    return symbols if coefficient == 1 else f"{coefficient} {symbols}"


def text(stack: Sequence[Conv]) -> str:
    """As it is written on the command line: "3x3/2, 3x3"."""
    return ", ".join(_text(conv) for conv in stack)


def _text(conv: Conv) -> str:
    marks: list[Any] = [f"{conv.kernel[0]}x{conv.kernel[1]}"]
    marks += [f"/{conv.stride}"] * (conv.stride > 1) + [f"@{conv.dilation}"] * (conv.dilation > 1)
    return "".join(marks)
