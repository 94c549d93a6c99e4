"""Convolutions of 3x3 kernels with strides of 1 by fewer products, as `winograd.c` has them.

In float32, where a processor has AVX2 and no AVX-512: with that they were not compared with
oneDNN's.

Milliseconds of oneDNN / so, oneDNN 3.2 on 2 cores of an AMD EPYC (family 25, model 1), medians of
11 rounds in turns, batch 8: 56x56 64->64 15.3 / 9.0, 28x28 128->128 11.6 / 7.6, 14x14 256->256
12.9 / 7.3, 7x7 512->512 21.4 / 13.2, 56x56 128->256 92 / 57, 14x14 16->48 0.26 / 0.19; gradients of
their kernels 24.8 / 10.1, 24.9 / 10.0, 23.3 / 11.0, 22.0 / 13.7, 179 / 69, 0.26 / 0.22, and of
224x224 64->64 696 / 199. Batch 128, 8x8 64->64, 5.6 / 3.3 and 8.5 / 4.5.

Values are nearer to those in float64 than oneDNN's: 14x14 256->256, 0.6 of the root mean square.
A NaN or an infinity in an image reaches the outputs that see it and no others; of an infinity they
may be NaN.
"""

from typing import Any, NamedTuple

import numpy as np

from flaxcnn.cpu import compiled, onednn
from flaxcnn.cpu.geometry import Geometry
from flaxcnn.cpu.plans import Call, Function, Plan, rounded
from flaxcnn.operators.bilinear import Kind, Shape, Shapes

_LANES, _PANEL = 8, 16  # as in the C file: float32 in a register, columns of a product
_PLACES = 16  # of a tile of 4x4
_WIDEST = 1 << 14  # channels of a pixel of padding there
_ITEM = 4  # bytes
# Tiles that are multiplied at once: so many that their parts of images and outputs stay in a core's
# caches, and that the kernel, which does not, is read seldom.
_TILES, _TILES_OF_GRADIENT = 24, 256
_SMALLEST, _FEWEST_TILES, _FEWEST_PRODUCTS = 4, 32, 512  # of a map's side, tiles, channels
_FEWEST_OF_THREAD = 8  # tiles, for which it reads a whole kernel
_MOST = 512 << 20  # bytes of memory for work, which stay with the process


# ---------------------------------------------------------------------------------- what is asked
class _Problem(NamedTuple):
    """As the C file has it; memory is in bytes."""

    batch: int
    height: int  # of images and outputs; in the gradient of images they change places
    width: int
    channels: int
    out_height: int
    out_width: int
    features: int
    top: int  # rows and columns of zeros before the images
    left: int
    threads: int
    block: int  # how many tiles are multiplied at once
    bias: int = 0
    residual: int = 0
    relu: int = 0

    @classmethod
    def of(cls, kind: Kind, geometry: Geometry, shapes: Shapes) -> "_Problem":
        """Under `lock`."""
        images, _, outputs = shapes
        low = geometry.low
        if kind is Kind.FIRST_GRADIENT:
            images, outputs, low = outputs, images, (2 - low[0], 2 - low[1])
        library = onednn.library()
        threads = library.threads() if library else 1
        (batch, height, width, channels), (out_height, out_width, features) = images, outputs[1:]
        sizes = (batch, height, width, channels, out_height, out_width, features)
        problem = cls(*sizes, *low, threads, _TILES_OF_GRADIENT)
        if kind is Kind.SECOND_GRADIENT:
            return problem._replace(block=min(problem.block, problem.tiles))
        # Blocks of one size, about as many for each thread, of an even number of tiles.
        rounds = max(1, -(problem.tiles // -(threads * _TILES)))
        block = -(problem.tiles // -(threads * rounds))
        return problem._replace(block=block + block % 2)

    @property
    def tiles(self) -> int:
        return self.batch * -(self.out_height // -2) * -(self.out_width // -2)

    @property
    def kernel_size(self) -> int:
        """Elements, transformed."""
        return _PLACES * self.channels * self.features

    @property
    def of_convolution(self) -> int:
        """Memory for work, of all threads, beside the kernel's."""
        return _ITEM * self.threads * _PLACES * self.block * (self.channels + _PANEL)

    @property
    def of_gradient(self) -> int:
        tiles = _PLACES * self.block * (self.channels + self.features)
        return _ITEM * (tiles + self.kernel_size)


def suits(kind: Kind, geometry: Geometry, shapes: Shapes, dtype: Any) -> bool:
    """Whether a convolution in training is one of these, and faster so. Under `lock`.

    Shapes: images [N, H, W, C], kernel [h, w, C / groups, O], outputs [N, H', W', O].
    """
    # A kernel is transformed in each step: 7x7 512->512, batch 1, both gradients 6.1 / 8.3.
    enough = _fits(kind, geometry, shapes, dtype)
    return enough and _Problem.of(kind, geometry, shapes).tiles >= _FEWEST_TILES


def suits_inference(geometry: Geometry, shapes: Shapes, dtype: Any) -> bool:
    """As `suits`, of a layer whose kernel is transformed once and for all."""
    return _fits(Kind.FORWARD, geometry, shapes, dtype)


def _fits(kind: Kind, geometry: Geometry, shapes: Shapes, dtype: Any) -> bool:
    (batch, *sides, channels), kernel, (outputs, *out_sides, features) = shapes
    strides, dilation, low, high, groups = geometry
    if kernel != (3, 3, channels, features) or outputs != batch or groups != 1:
        return False
    if strides != (1, 1) or dilation != (1, 1) or dtype != np.float32:
        return False
    if any(
        out_side != side + before + behind - 2
        for side, out_side, before, behind in zip(sides, out_sides, low, high, strict=True)
    ):
        return False
    if compiled.library() is None or not onednn.at_most_avx2():
        return False
    problem = _Problem.of(kind, geometry, shapes)
    # Tiles of 2x2 leave a part of odd maps unused: 3x3 512->512, batch 128, 38 / 42. Few channels
    # are sums more than products: 32x32 16->16, batch 128, all three kinds 22 / 22.
    smallest = min(problem.out_height, problem.out_width)
    if smallest < _SMALLEST or channels * features < _FEWEST_PRODUCTS:
        return False
    if problem.tiles < max(1, _FEWEST_OF_THREAD * problem.threads):
        return False
    if problem.channels % _LANES or problem.features % _PANEL:
        return False
    most = max(problem.of_convolution + _ITEM * problem.kernel_size, problem.of_gradient)
    return max(channels, features) <= _WIDEST and most <= _MOST


# ---------------------------------------------------------------------------------- how it is done
def plan(kind: Kind, geometry: Geometry, shapes: Shapes) -> Plan:
    """Of a convolution that `suits`, with its arrays in the order of `PLACES`. Under `lock`."""
    problem = _Problem.of(kind, geometry, shapes)
    if kind is Kind.SECOND_GRADIENT:
        return Plan([Call(Function("winograd_gradient", problem, problem.of_gradient), (0, 1, 2))])
    of_gradient = kind is Kind.FIRST_GRADIENT
    images, kernel = (1, 0) if of_gradient else (0, 1)
    transform = "winograd_turned_kernel" if of_gradient else "winograd_kernel"
    convolution = Function("winograd_convolution", problem, problem.of_convolution)
    behind = rounded(convolution.working)
    calls = [
        Call(Function(transform, problem), (kernel, ~behind)),
        Call(convolution, (images, ~behind, 2)),
    ]
    return Plan(calls, behind + _ITEM * problem.kernel_size)


def layer(
    geometry: Geometry, shapes: Shapes, *, bias: bool, residual: bool, relu: bool
) -> tuple[Function, Function]:
    """What transforms a kernel, and what computes with it; it `suits_inference`. Under `lock`.

    The first is of the kernel and 16 C O elements. The second is of images, those, the bias if
    there is one, and the outputs, to which a residual branch is added where it already is.
    """
    problem = _Problem.of(Kind.FORWARD, geometry, shapes)
    behind = problem._replace(bias=bias, residual=residual, relu=relu)
    convolution = Function("winograd_convolution", behind, problem.of_convolution)
    return Function("winograd_kernel", problem), convolution


def kernel_size(kernel: Shape) -> int:
    """Elements, transformed; shape: [3, 3, C, O]."""
    return _PLACES * kernel[2] * kernel[3]
