"""Which of oneDNN's implementations computes a convolution, where that is not the first it offers.

The library offers them in one order for all processors, products of small blocks ("brgemm") first.
With AVX2 and no AVX-512 that is slower in places, and the gradient of a kernel, which it has no
such products for then, goes over an image again and again for each block of channels.

Times of the first / of the chosen one are milliseconds, oneDNN 3.2 on 2 cores of an AMD EPYC
(family 25, model 1: AVX2), float32, medians of 9 to 12 rounds in turns, batch 8: 1x1 kernels
56x56 128->256 14.1 / 11.0, its input's gradient 11.7 / 10.7, 14x14 1024->256 6.5 / 5.3, stride 2
28x28 512->1024 12.6 / 9.9; depthwise 14x14x672 5x5 1.4 / 0.9; 32 groups of 14x14x1024, stride 2
4.7 / 3.7, its input's gradient 5.5 / 3.8; gradients of 3x3 kernels 224x224 64->64 1140 / 560,
56x56 256->256 337 / 260, 14x14 256->256 24.8 / 16.4, 7x7 512->512 18.5 / 14.8.
"""

import ctypes
import math
from collections.abc import Callable

from flaxcnn.cpu import onednn
from flaxcnn.cpu.onednn import Library, Query
from flaxcnn.operators.bilinear import Kind, Shape

_LANES = 8  # float32 in one of AVX2's registers
# How the library's names of them begin.
_OF_1X1, _DEPTHWISE, _DIRECT, _PRODUCT = "jit_1x1:", "jit_dw:", "jit:", "x64:gemm:"
# Bytes that a product may have for the images' windows, which stay with the process: for each
# thread those of one image, so that 16 threads and 224x224x64 would want 1.8 GB.
_MOST = 512 << 20


def fastest(
    library: Library,
    describe: Callable[[], ctypes.c_void_p],
    kind: Kind,
    kernel: Shape,
    outputs: Shape,
    groups: int,
) -> ctypes.c_void_p:
    """What `describe` makes, a primitive's description, of the implementation that is fastest here.

    Shapes: kernel [h, w, C / groups, O], outputs [N, H', W', O].
    """
    wanted = _wanted(kind, kernel, outputs, groups) if library.at_most_avx2 else ""
    description = describe()
    if not wanted:
        return description
    while not library.implementation(description).startswith(wanted):
        if not library.next_implementation(description):
            return describe()
    working = library.chosen_layout(description, Query.SCRATCHPAD)
    return describe() if library.size(working) > _MOST else description


def _wanted(kind: Kind, kernel: Shape, outputs: Shape, groups: int) -> str:
    """How its name begins; "" for the first, as where there is none of that name."""
    height, width, channels, features = kernel
    of_kernel = kind is Kind.SECOND_GRADIENT
    if height == width == 1:
        # Gradients, machine code / product: 14x14 512->512 16 / 19, 512->1024 39 / 33, 1024->1024
        # 95 / 44, of batch 32 328 / 170 (the machine was at half its speed).
        product = of_kernel and groups == 1 and channels * features >= 1 << 19
        return _PRODUCT if product else _OF_1X1
    if groups > 1:
        return _DEPTHWISE if channels == 1 and features == groups else _DIRECT
    if not of_kernel:
        return ""
    # First / product: 8x8 64->64, batch 128 6.9 / 8.1, 32x32 16->16, batch 128 4.7 / 15; of few
    # channels and large maps 224x224 3->64 47 / 26, 7x7 of 112x112 3->64 37 / 36.
    many = channels * features >= 8192
    return _PRODUCT if many or math.prod(outputs[1:3]) > 1 << 15 else ""


def groups_at_once(kernel: Shape, groups: int) -> int:
    """How many groups the library had better take for one, between which the kernel is 0.

    With AVX2 it has no machine code for groups of fewer channels than a register holds. Forward,
    56x56x128 of 32 groups 35.3 / of 16 9.0, both ways 61 / 38.

    Shape: kernel [h, w, C / groups, O].
    """
    channels, features = kernel[2], kernel[3] // groups
    merged = _LANES // channels
    narrow = channels == features > 1 and merged > 1 and merged * channels == _LANES
    return merged if narrow and groups % merged == 0 and onednn.at_most_avx2() else 1
