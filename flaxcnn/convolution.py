"""Two-dimensional convolution with CPU paths of its own, chosen from the shapes.

In float32, and in bfloat16 on processors with instructions for it, oneDNN computes it
(`onednn_convolution`), as it does for torch, but where the map is tiny. XLA's own convolution does
half of what the processor can, and collapses in places: where the output map is smaller than the
kernel (every deep network at 32 pixels), in the input gradient of strided convolutions on small
maps, in weight gradients of 1x1 kernels, and for every kind of grouped convolution. There, and in
other types and where oneDNN is not installed, the same sum is written as shifted slices and matrix
products; elsewhere, and on every platform but the CPU, it stays `jax.lax.conv_general_dilated`.
The choice is made when the program is lowered, so lowering for TPU on a CPU host gives the plain
convolution.

All derivatives are JAX's own, of the formulation chosen; of oneDNN's, those of `bilinear`.

Where a choice cites times, they are milliseconds of plain / chosen, XLA:CPU of jaxlib 0.10.2 with
its default flags, 2 cores of a Xeon (model 207, AVX-512), float32, medians of interleaved rounds;
"both ways" is the forward pass and both gradients. The machine was shared, so single figures move
by tens of per cent; the collapses are factors. The thresholds were measured on this machine alone.

`FLAXCNN_PLAIN_CONVOLUTION=1` in the environment, read at import, leaves every convolution plain,
and every pooling layer (`pooling`), dense layer (`matrix_product`), batch norm (`normalisation`),
ReLU and bias (`blocks`).
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike

from flaxcnn.cpu import onednn, onednn_choice
from flaxcnn.cpu.geometry import Geometry
from flaxcnn.cpu.onednn_convolution import NHWC_HWIO, convolution
from flaxcnn.operators import space_to_depth
from flaxcnn.operators.kernel_groups import merge_groups
from flaxcnn.operators.primitives import explicitly_sharded

PLAIN = os.environ.get("FLAXCNN_PLAIN_CONVOLUTION", "") not in ("", "0")

Padding = str | Sequence[tuple[int, int]]


class _Axis(NamedTuple):
    """One spatial axis of a convolution, in elements."""

    size: int
    kernel: int
    stride: int
    dilation: int
    low: int  # zeros before
    high: int  # and after

    @property
    def span(self) -> int:
        return (self.kernel - 1) * self.dilation + 1

    @property
    def outputs(self) -> int:
        return (self.size + self.low + self.high - self.span) // self.stride + 1

    @property
    def taps(self) -> range:
        """The kernel's elements from the first to the last that meets data, not only padding."""
        used = [
            tap
            for tap in range(self.kernel)
            for output in range(self.outputs)
            if 0 <= output * self.stride + tap * self.dilation - self.low < self.size
        ]
        return range(min(used), max(used) + 1) if used else range(0)

    def window(self, output: int) -> tuple[slice, slice]:
        """What one output sees without dilation: that part of the axis, and of the kernel."""
        start = output * self.stride - self.low
        stop = min(start + self.kernel, self.size)
        return slice(max(start, 0), stop), slice(max(-start, 0), stop - start)


class _Case(NamedTuple):
    """All that is known of a convolution when it is traced."""

    rows: _Axis
    columns: _Axis
    batch: int
    in_channels: int
    out_channels: int
    groups: int
    precision: Any

    @property
    def outputs(self) -> tuple[int, int]:
        return self.rows.outputs, self.columns.outputs

    @property
    def strides(self) -> tuple[int, int]:
        return self.rows.stride, self.columns.stride


Formulation = Callable[[jax.Array, jax.Array, _Case], jax.Array]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: PrecisionLike = None,
    **others: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, fast on the CPU too; for `nn.Conv(conv_general_dilated=...)`.

    Shapes: lhs [N, H, W, C], rhs [h, w, C / groups, O] -> [N, H', W', O] in their common dtype. Any
    other layout, rank, dtype or argument is passed on to `jax.lax.conv_general_dilated` as it came.

    Raises:
        TypeError, ValueError: as `jax.lax.conv_general_dilated` does.
    """
    plain = partial(
        cast(Callable[..., jax.Array], lax.conv_general_dilated),
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
        **others,
    )
    if PLAIN or lhs.ndim != 4 or rhs.ndim != 4 or any(v not in (None, 1) for v in others.values()):
        return plain(lhs, rhs)
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    floating = jnp.issubdtype(lhs.dtype, jnp.floating)
    if layout != NHWC_HWIO or lhs.dtype != rhs.dtype or not floating:
        return plain(lhs, rhs)
    # A program for any size has a symbol there.
    if not all(isinstance(size, int) for size in (*lhs.shape, *rhs.shape)):
        return plain(lhs, rhs)
    if explicitly_sharded(lhs, rhs):
        return plain(lhs, rhs)
    if any(d != 1 for d in lhs_dilation or ()):
        return plain(lhs, rhs)
    case = _case(
        lhs.shape, rhs.shape, window_strides, padding, rhs_dilation, feature_group_count, precision
    )
    if case is None or (_formulation(case, lhs.dtype) is _plain and not _in_blocks_on_tpu(case)):
        return plain(lhs, rhs)
    if _is_plain_elsewhere(case, lhs.dtype, rhs.shape):
        return _by_onednn(lhs, rhs, case)
    return _by_platform(lhs, rhs, case)


def _case(
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    rhs_dilation: Sequence[int] | None,
    groups: int,
    precision: Any,
) -> _Case | None:
    """The convolution in numbers; None where it is unusual, or wrong and for `lax` to refuse."""
    dilation = tuple(rhs_dilation or (1, 1))
    batch, height, width, in_channels = lhs_shape
    out_channels = rhs_shape[3]
    if len(strides) != 2 or len(dilation) != 2 or min(*strides, *dilation, *lhs_shape) < 1:
        return None
    if groups < 1 or in_channels != rhs_shape[2] * groups or out_channels % groups:
        return None
    if isinstance(padding, str):
        spans = [(k - 1) * d + 1 for k, d in zip(rhs_shape[:2], dilation, strict=True)]
        padding = lax.padtype_to_pads((height, width), spans, strides, padding)
    if len(padding) != 2:
        return None
    rows, columns = (
        _Axis(lhs_shape[i + 1], rhs_shape[i], strides[i], dilation[i], *padding[i]) for i in (0, 1)
    )
    for axis in (rows, columns):
        # Every window must meet some data: the formulations rely on it.
        padded = max(axis.low, axis.high) < axis.span and min(axis.low, axis.high) >= 0
        if not padded or axis.outputs < 1 or not axis.taps:
            return None
    precision = tuple(precision) if isinstance(precision, list) else precision
    return _Case(rows, columns, batch, in_channels, out_channels, groups, precision)


def _is_plain_elsewhere(case: _Case, dtype: Any, kernel: tuple[int, ...]) -> bool:
    """Whether it is oneDNN's primitive alone, which other platforms compute as it is written."""
    if _formulation(case, dtype) is not _by_onednn or _in_blocks_on_tpu(case):
        return False
    if onednn_choice.groups_at_once(kernel, case.groups) > 1 or case.precision is not None:
        return False
    return dtype == jnp.float32 or not _is_depthwise(case)


@partial(jax.jit, static_argnums=2)  # so that outside a jit it is compiled once per case
def _by_platform(x: jax.Array, kernel: jax.Array, case: _Case) -> jax.Array:
    platforms = {"cpu": partial(_on_cpu, case=case)}
    if _in_blocks_on_tpu(case):
        platforms["tpu"] = partial(_in_blocks, case=case)
    return lax.platform_dependent(x, kernel, **platforms, default=partial(_plain, case=case))


def _in_blocks_on_tpu(case: _Case) -> bool:
    usual = case.groups == case.rows.dilation == case.columns.dilation == 1
    suits = space_to_depth.suits(case.in_channels, case.strides)
    return space_to_depth.WANTED and usual and suits and case.precision is None


def _in_blocks(x: jax.Array, kernel: jax.Array, case: _Case) -> jax.Array:
    padding = [(axis.low, axis.high) for axis in (case.rows, case.columns)]
    return space_to_depth.convolution(x, kernel, case.strides, padding)


def _on_cpu(x: jax.Array, kernel: jax.Array, case: _Case) -> jax.Array:
    return _formulation(case, x.dtype)(x, kernel, case)


def _formulation(case: _Case, dtype: Any) -> Formulation:
    """The function of (x, kernel, case) that computes this convolution fastest on a CPU."""
    if onednn.computes(dtype) and _suits_onednn(case, dtype):
        return _by_onednn
    return _formulation_by_xla(case)


def _suits_onednn(case: _Case, dtype: Any) -> bool:
    """Whether it is faster than what is written for XLA.

    Both ways, ms, the best for XLA / oneDNN, on 2 cores of a Xeon (model 167, AVX-512), XLA's flags
    as `train.cpu` sets them: 2x2 256->256 3x3, batch 128 3.3 / 7.9, which multiplies padding too;
    4x4 64->64 5x5, batch 128 5.5 / 2.5; 32x32 16->16, batch 128 27 / 7; 56x56 64->64, batch 8
    28 / 18; 1x1 kernels, batch 8: 7x7 2048->512 6.5 / 7.7, 14x14 256->1024 6.7 / 6.0, 56x56 64->256
    10.8 / 6.8; depthwise 4x4x480 3x3, batch 128 9.4 / 0.9; 32 groups of 512, 4x4 stride 2, batch
    128 12 / 2.7. In bfloat16, by this processor's AMX: 56x56 64->64 3x3, batch 8 30 / 3.8; 1x1
    kernels, batch 8: 7x7 2048->512 8.6 / 4.6, 14x14 256->1024 8.9 / 2.7; 2x2 256->256 3x3, batch
    128 6.6 / 8.1.
    """
    outputs = math.prod(case.outputs)
    if case.rows.span == case.columns.span == 1 and case.groups == 1:
        return case.batch * outputs >= (1024 if dtype == jnp.float32 else 256)
    return outputs > 4


def _formulation_by_xla(case: _Case) -> Formulation:
    """The fastest without oneDNN."""
    rows, columns = case.rows, case.columns
    if case.groups > 1:
        # Both ways, depthwise, batch 2: 112x112x32 3x3 65 / 12, 14x14x480 3x3 30 / 2,
        # 7x7x1152 5x5 198 / 5, 112x112x96 3x3 stride 2 297 / 11; batch 32, 1x1x1152 5x5 172 / 1.
        return _depthwise if _is_depthwise(case) else _grouped
    if rows.dilation > 1 or columns.dilation > 1:
        return _plain
    if rows.span == columns.span == 1:
        # Both ways, batch 8: 56x56 64->256 115 / 29, 14x14 256->1024 38 / 19, 56x56 256->512
        # stride 2 228 / 45. Forward alone 0.6 to 1.06 times the plain time.
        return _matrix_product
    if case.in_channels <= 4:
        # A network's first layer: no input gradient is asked for, and the rest is best plain
        # (forward and weight gradient, 7x7 stride 2, 32x32x3, batch 128: 20, im2col 38).
        return _plain
    outputs = math.prod(case.outputs)
    if rows.outputs < rows.kernel and columns.outputs < columns.kernel:
        # Both ways: 2x2 256->256 3x3, batch 128 177 / 4.5 (im2col 9.2); 1x1 512->512 43 / 1.6;
        # 4x4 128->256 3x3 stride 2 79 / 4.3; 4x4 64->64 5x5 132 / 5.7. With few images the
        # copies of the kernel cost more: 2x2 512->512, batch 8 112 / 7.2, im2col 3.7.
        dense = outputs == 1 or (outputs <= 16 and 16 * case.batch >= case.out_channels)
        return _dot_per_output if dense else _im2col
    if (rows.stride > 1 or columns.stride > 1) and outputs <= 64:
        # Both ways: 16x16 64->128 3x3 stride 2, batch 32 7.6 / 5.2; 14x14 256->512, batch 8
        # 30 / 24; 8x8 64->96 5x5 stride 2, batch 32 72 / 7. Not always: 8x8 64->128, batch 128
        # was 8.4 / 5.3, 9.5 / 5.6 and 9.7 / 10.8 in three runs. On larger maps training gains less
        # and forward alone loses: 56x56 64->128 3x3 stride 2, batch 8 8.7 / 14.
        return _im2col
    return _plain


def _by_onednn(x: jax.Array, kernel: jax.Array, case: _Case) -> jax.Array:
    """As torch computes it."""
    rows, columns = case.rows, case.columns
    merged = onednn_choice.groups_at_once(kernel.shape, case.groups)
    kernel = merge_groups(kernel, case.groups, merged)
    geometry = Geometry(
        strides=case.strides,
        dilation=(rows.dilation, columns.dilation),
        low=(rows.low, columns.low),
        high=(rows.high, columns.high),
        groups=case.groups // merged,
    )
    if _is_depthwise(case):
        # Both ways, 14x14x672 5x5, batch 8, ms: 25 in bfloat16, 6.9 in float32.
        y = convolution(x.astype(jnp.float32), kernel.astype(jnp.float32), geometry, case.outputs)
        return y.astype(x.dtype)
    return convolution(x, kernel, geometry, case.outputs)


def _is_depthwise(case: _Case) -> bool:
    return case.groups == case.in_channels == case.out_channels


def _plain(x: jax.Array, kernel: jax.Array, case: _Case) -> jax.Array:
    axes = (case.rows, case.columns)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=[axis.stride for axis in axes],
        padding=[(axis.low, axis.high) for axis in axes],
        rhs_dilation=[axis.dilation for axis in axes],
        dimension_numbers=NHWC_HWIO,
        feature_group_count=case.groups,
        precision=case.precision,
    )


def _dot(a: jax.Array, b: jax.Array, case: _Case) -> jax.Array:
    """[n, k] x [k, m], summed in at least float32. Two-dimensional: XLA transposes more axes."""
    total = jnp.promote_types(a.dtype, jnp.float32)
    y = jnp.dot(a, b, precision=case.precision, preferred_element_type=total)
    return y.astype(a.dtype)


def _matrix_product(x: jax.Array, kernel: jax.Array, case: _Case) -> jax.Array:
    """A 1x1 kernel: nothing to gather."""
    x = x[:, :: case.rows.stride, :: case.columns.stride]
    y = _dot(x.reshape(-1, case.in_channels), kernel[0, 0], case)
    return y.reshape(case.batch, *case.outputs, case.out_channels)


def _dot_per_output(x: jax.Array, kernel: jax.Array, case: _Case) -> jax.Array:
    """One matrix product for each output position, of what it sees: padding costs nothing."""
    positions = []
    for row in range(case.rows.outputs):
        x_rows, kernel_rows = case.rows.window(row)
        for column in range(case.columns.outputs):
            x_columns, kernel_columns = case.columns.window(column)
            seen = x[:, x_rows, x_columns].reshape(case.batch, -1)
            weights = kernel[kernel_rows, kernel_columns].reshape(-1, case.out_channels)
            positions.append(_dot(seen, weights, case))
    return jnp.stack(positions, axis=1).reshape(case.batch, *case.outputs, case.out_channels)


def _im2col(x: jax.Array, kernel: jax.Array, case: _Case) -> jax.Array:
    """All shifted copies of the image side by side, then one matrix product."""
    kernel = _used_taps(kernel, case).reshape(-1, case.out_channels)
    columns = jnp.concatenate(_shifted(x, case), axis=-1).reshape(-1, kernel.shape[0])
    return _dot(columns, kernel, case).reshape(case.batch, *case.outputs, case.out_channels)


def _depthwise(x: jax.Array, kernel: jax.Array, case: _Case) -> jax.Array:
    """Shifted copies of the image, each times its kernel element, summed in one loop."""
    total = jnp.promote_types(x.dtype, jnp.float32)
    taps = _used_taps(kernel, case).reshape(-1, case.out_channels).astype(total)
    shifted = [image.astype(total) for image in _shifted(x, case)]
    y = shifted[0] * taps[0]
    for image, tap in zip(shifted[1:], taps[1:], strict=True):
        y += image * tap
    return y.astype(x.dtype)


def _grouped(x: jax.Array, kernel: jax.Array, case: _Case) -> jax.Array:
    """`_im2col` of all groups in one batched matrix product, narrow groups merged to 32 channels.

    A merged kernel is block diagonal: more multiplications, but below 32 channels a product takes
    no less time. Both ways, by plain convolutions side by side / so, batch 2: 28x28x256 of 32
    groups 124 / 15, 7x7x1024 of 32 40 / 4.3, 27x27 96->256 5x5 of 2 543 / 50; batch 8: 28x28x512 of
    64 3492 / 217. 64 groups side by side also took 11 s to compile, so 0.3 s.
    """
    width = case.in_channels // case.groups
    fitting = (m for m in range(2, case.groups + 1) if case.groups % m == 0 and m * width <= 32)
    merged = max(fitting, default=1)
    parts = case.groups // merged
    kernel = _used_taps(merge_groups(kernel, case.groups, merged), case)
    taps, channels = kernel.shape[0] * kernel.shape[1], kernel.shape[2]

    columns = jnp.stack(_shifted(x, case)).reshape(taps, -1, parts, channels)
    columns = columns.transpose(2, 1, 0, 3).reshape(parts, -1, taps * channels)
    weights = kernel.reshape(taps, channels, parts, -1).transpose(2, 0, 1, 3)
    y = lax.dot_general(
        columns,
        weights.reshape(parts, taps * channels, -1),
        (((2,), (1,)), ((0,), (0,))),
        precision=case.precision,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    y = y.astype(x.dtype).transpose(1, 0, 2)
    return y.reshape(case.batch, *case.outputs, case.out_channels)


def _used_taps(kernel: jax.Array, case: _Case) -> jax.Array:
    rows, columns = case.rows.taps, case.columns.taps
    return kernel[rows.start : rows.stop, columns.start : columns.stop]


def _shifted(x: jax.Array, case: _Case) -> list[jax.Array]:
    """For each used kernel element, row by row, the image elements it meets: [N, H', W', C]."""
    pads, steps, extents = [], [], []
    for axis in (case.rows, case.columns):
        low = axis.low - axis.taps.start * axis.dilation
        extent = (axis.outputs - 1) * axis.stride + 1
        pads.append((low, extent + (len(axis.taps) - 1) * axis.dilation - axis.size - low, 0))
        steps.append([tap * axis.dilation for tap in range(len(axis.taps))])
        extents.append(extent)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    return [
        x[:, i : i + extents[0] : case.rows.stride, j : j + extents[1] : case.columns.stride]
        for i in steps[0]
        for j in steps[1]
    ]
