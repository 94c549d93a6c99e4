"""EfficientNet: "Rethinking Model Scaling for Convolutional Neural Networks", and its successors.

- B0 to B7: Tan and Le, ICML 2019, arXiv:1905.11946. One baseline (table 1), its depth, width and
  image size multiplied by what the authors' code gives for each network;
- V2 S, M and L: "EfficientNetV2: Smaller Models and Faster Training", Tan and Le, ICML 2021,
  arXiv:2104.00298. S is table 4; M and L are in the authors' code alone;
- Lite0 to Lite4: the networks for phones that the authors published without a paper, in
  https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. No
  squeeze-and-excitation, ReLU6 in place of SiLU, stem and head of one width.

What the blocks are made of: "Squeeze-and-Excitation Networks", Hu et al., CVPR 2018,
arXiv:1709.01507; "Deep Networks with Stochastic Depth", Huang et al., ECCV 2016, arXiv:1603.09382;
depthwise convolutions between 1x1 ones as in MobileNetV2, Sandler et al. 2018, arXiv:1801.04381.

Deviations of B0 to B7 and of V2, all torchvision's:
- a convolution of stride 2 is padded equally on both sides; the authors' TensorFlow pads more at
  the end, which Lite keeps;
- batch norm keeps 0.9 of its running values in B0 to B4 and, as in the authors' code, in V2, where
  both papers say 0.99; in B0 to B4 its epsilon is 1e-5, in the authors' code 1e-3;
- a depthwise kernel starts from He's normal initialisation with all output channels in the fan;
  the authors' code counts one, so theirs start sqrt(channels) times as large;
- SiLU inside the squeeze-and-excitation, as in the authors' code; its own paper has ReLU.
Lite has no twin in torchvision: it starts as the others do and keeps the authors' batch norm.

Training as in the papers (RMSProp, AutoAugment, larger images from epoch to epoch) is no matter of
the networks. A published parameter count that differs: B2 has 9.1 million, table 2 says 9.2.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn import blocks, pooling
from flaxcnn.network import FeatureMaps, Network, Variants


# --------------------------------------------------------------------------------------- scaling
class CompoundScaling(NamedTuple):
    """By what a network of the baseline's shape is deeper, wider and sees larger images."""

    depth: float
    width: float
    resolution: float


def compound_scaling(phi: float) -> CompoundScaling:
    """The multipliers of equation 3 for about 2**phi times the baseline's multiply-adds.

    The constants are section 4's. Rounded to 0.1, depth and width are the published ones of B0 to
    B3 (phi = 0, 0.5, 1, 2) and of B4 (phi = 3.25); no phi gives those of B5, B6 or B7. `VARIANTS`
    holds what was published.
    """
    return CompoundScaling(depth=1.2**phi, width=1.1**phi, resolution=1.15**phi)


def round_channels(channels: float) -> int:
    """The multiple of 8 nearest to `channels`, but no less than nine tenths of it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


# ---------------------------------------------------------------------------------------- blocks
def conv_norm(
    x: jax.Array,
    channels: int,
    kernel_size: int,
    *,
    strides: int = 1,
    padding: int | None = None,
    groups: int = 1,
    norm: blocks.NormFactory,
    activation: blocks.Activation | None = None,
    dtype: DTypeLike,
    name: str,
) -> jax.Array:
    """A convolution, `name`_0, its norm, `name`_1, and what acts on that, if anything.

    Half a kernel of zeros on each side.
    """
    x = blocks.conv(
        channels,
        kernel_size,
        strides=strides,
        padding=kernel_size // 2 if padding is None else padding,
        groups=groups,
        dtype=dtype,
        name=f"{name}_0",
    )(x)
    normalise = norm(name=f"{name}_1")
    return blocks.norm_act(normalise, x, activation) if activation else normalise(x)


def same_padding(size: int, kernel_size: int, strides: int) -> tuple[int, int]:
    """The zeros before and after an axis of TensorFlow's "SAME": ceil(size / strides) outputs."""
    outputs = -(size // -strides)
    total = max((outputs - 1) * strides + kernel_size - size, 0)
    return total // 2, total - total // 2


def conv_norm_same(
    x: jax.Array, channels: int, kernel_size: int, *, strides: int = 1, **others: Any
) -> jax.Array:
    """`conv_norm` with the padding of TensorFlow's "SAME", which depends on the map's size."""
    pads = [same_padding(size, kernel_size, strides) for size in x.shape[1:3]]
    everywhere = min(min(pad) for pad in pads)  # as much the convolution pads by itself
    rest = [(before - everywhere, after - everywhere) for before, after in pads]
    x = jnp.pad(x, [(0, 0), *rest, (0, 0)])
    return conv_norm(x, channels, kernel_size, strides=strides, padding=everywhere, **others)


class SqueezeExcite(nn.Module):
    """Weighs each channel by what the averages of all of them say (Hu et al., figure 1).

    [N, H, W, C] -> [N, H, W, C], times a number between 0 and 1 per example and channel.
    """

    squeezed: int  # channels between the two layers
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(blocks.conv, kernel_size=1, use_bias=True, dtype=self.dtype)
        y = pooling.global_avg_pool(x)[:, None, None, :]
        y = nn.silu(conv(self.squeezed, name="fc1")(y))
        return x * nn.sigmoid(conv(x.shape[-1], name="fc2")(y))


class StochasticDepth(nn.Dropout):
    """Leaves out a residual branch with probability `rate`, for each example on its own.

    [N, H, W, C] -> [N, H, W, C]: zeros, or `x / (1 - rate)`. Huang et al. draw once per batch and
    multiply by 1 - rate in evaluation. Draws from the rng stream "stochastic_depth", so that
    dropout is the same with it and without.

    Raises:
        flax.errors.InvalidRngError: in training without that stream, if `rate` is not 0.
    """

    broadcast_dims: Sequence[int] = (1, 2, 3)
    rng_collection: str = "stochastic_depth"


class Block(nn.Module):
    """A branch that is added to its input if it keeps the shape, at random if it trains.

    [N, H, W, C] -> [N, H / strides, W / strides, channels], sizes rounded up.
    """

    channels: int
    kernel_size: int  # of the convolution that is not 1x1
    strides: int  # of the same
    expansion: int  # the channels between, as a multiple of the input's
    stochastic_depth_rate: float
    train: bool
    norm: blocks.NormFactory  # knows already whether it trains, and its dtype
    dtype: DTypeLike

    def branch(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H / strides, W / strides, channels]."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.branch(x)
        if self.strides == 1 and self.channels == x.shape[-1]:
            y = x + StochasticDepth(self.stochastic_depth_rate, deterministic=not self.train)(y)
        return y


class MBConv(Block):
    """Mobile inverted bottleneck: 1x1 to more channels, depthwise, squeeze-and-excitation, 1x1."""

    def branch(self, x: jax.Array) -> jax.Array:
        conv = partial(conv_norm, norm=self.norm, dtype=self.dtype)
        wide = x.shape[-1] * self.expansion
        squeezed = max(1, x.shape[-1] // 4)  # a quarter of the input, not of the channels between
        names = iter([f"block_{i}" for i in range(4)])  # torchvision numbers those that are there
        active = partial(conv, activation=nn.silu)
        if self.expansion != 1:
            x = active(x, wide, 1, name=next(names))
        depthwise = partial(active, strides=self.strides, groups=wide)
        x = depthwise(x, wide, self.kernel_size, name=next(names))
        x = SqueezeExcite(squeezed, dtype=self.dtype, name=next(names))(x)
        return conv(x, self.channels, 1, name=next(names))


class FusedMBConv(Block):
    """V2's block of the early stages: one full convolution for MBConv's first two (figure 2)."""

    def branch(self, x: jax.Array) -> jax.Array:
        conv = partial(conv_norm, norm=self.norm, dtype=self.dtype)
        active = partial(conv, activation=nn.silu, name="block_0")
        fused = partial(active, kernel_size=self.kernel_size, strides=self.strides)
        if self.expansion == 1:
            return fused(x, self.channels)
        x = fused(x, x.shape[-1] * self.expansion)
        return conv(x, self.channels, 1, name="block_1")


class LiteMBConv(Block):
    """MBConv without squeeze-and-excitation, with ReLU6 and TensorFlow's "SAME" padding.

    Numbered as torchvision would: the projection is block_2, in the first stage block_1.
    """

    def branch(self, x: jax.Array) -> jax.Array:
        conv = partial(conv_norm_same, norm=self.norm, dtype=self.dtype)
        wide = x.shape[-1] * self.expansion
        names = iter([f"block_{i}" for i in range(3)])
        active = partial(conv, activation=nn.relu6)
        if self.expansion != 1:
            x = active(x, wide, 1, name=next(names))
        depthwise = partial(active, strides=self.strides, groups=wide)
        x = depthwise(x, wide, self.kernel_size, name=next(names))
        return conv(x, self.channels, 1, name=next(names))


# ---------------------------------------------------------------------------------------- tables
class Stage(NamedTuple):
    """One row of a paper's table: `layers` blocks, the first of them with `strides`."""

    block: Callable[..., nn.Module]
    expansion: int
    kernel_size: int
    strides: int
    channels: int
    layers: int


# Table 1 of the first paper: stages 2 to 8, behind a stem of 32 channels.
TABLE_1 = (  # [N, 112, 112, 32] for images of 224x224
    Stage(MBConv, 1, 3, 1, 16, 1),  # [N, 112, 112, 16]
    Stage(MBConv, 6, 3, 2, 24, 2),  # [N, 56, 56, 24]
    Stage(MBConv, 6, 5, 2, 40, 2),  # [N, 28, 28, 40]
    Stage(MBConv, 6, 3, 2, 80, 3),  # [N, 14, 14, 80]
    Stage(MBConv, 6, 5, 1, 112, 3),  # [N, 14, 14, 112]
    Stage(MBConv, 6, 5, 2, 192, 4),  # [N, 7, 7, 192]
    Stage(MBConv, 6, 3, 1, 320, 1),  # [N, 7, 7, 320]
)
LITE = tuple(stage._replace(block=LiteMBConv) for stage in TABLE_1)

# Table 4 of the second paper: stages 1 to 6, behind a stem of 24 channels.
V2_S = (
    Stage(FusedMBConv, 1, 3, 1, 24, 2),
    Stage(FusedMBConv, 4, 3, 2, 48, 4),
    Stage(FusedMBConv, 4, 3, 2, 64, 4),
    Stage(MBConv, 4, 3, 2, 128, 6),
    Stage(MBConv, 6, 3, 1, 160, 9),
    Stage(MBConv, 6, 3, 2, 256, 15),
)
# https://github.com/google/automl/blob/master/efficientnetv2/effnetv2_configs.py
V2_M = (
    Stage(FusedMBConv, 1, 3, 1, 24, 3),
    Stage(FusedMBConv, 4, 3, 2, 48, 5),
    Stage(FusedMBConv, 4, 3, 2, 80, 5),
    Stage(MBConv, 4, 3, 2, 160, 7),
    Stage(MBConv, 6, 3, 1, 176, 14),
    Stage(MBConv, 6, 3, 2, 304, 18),
    Stage(MBConv, 6, 3, 1, 512, 5),
)
V2_L = (
    Stage(FusedMBConv, 1, 3, 1, 32, 4),
    Stage(FusedMBConv, 4, 3, 2, 64, 7),
    Stage(FusedMBConv, 4, 3, 2, 96, 7),
    Stage(MBConv, 4, 3, 2, 192, 10),
    Stage(MBConv, 6, 3, 1, 224, 19),
    Stage(MBConv, 6, 3, 2, 384, 25),
    Stage(MBConv, 6, 3, 1, 640, 7),
)


# -------------------------------------------------------------------------------------- networks
class Scaled(NamedTuple):
    """A table for one width and depth, and the channels of the convolutions around it."""

    stem_channels: int
    table: tuple[Stage, ...]
    head_channels: int


class EfficientNet(Network, kw_only=True):
    """A stem, stages of blocks, a 1x1 convolution, global average pooling and one dense layer.

    Images [N, H, W, C] of any size -> logits [N, num_classes]; `num_classes=0` gives the pooled
    features [N, 1280 times `width`]. Stages: `features_0`, the stem, to `features_8`, the 1x1
    convolution (V2-S: `features_7`). In training the rng streams "dropout" and "stochastic_depth"
    are needed, each unless its rate is 0.
    """

    table: Sequence[Stage] = TABLE_1
    stem_channels: int = 32  # like those in the table, for a `width` of 1
    head_channels: int = 1280
    width: float = 1.0  # multiplies channels
    depth: float = 1.0  # multiplies layers
    published_image_size: int = 224  # pixels
    dropout_rate: float = 0.2  # section 5.2: from 0.2 for B0 to 0.5 for B7
    stochastic_depth_rate: float = 0.2  # section 5.2; of n blocks block i, from 0 on, has i/n of it
    norm: blocks.NormFactory = blocks.BatchNorm
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9

    # What Lite has others of.
    conv_norm: ClassVar[Callable[..., jax.Array]] = staticmethod(conv_norm)
    activation: ClassVar[Callable[..., jax.Array]] = staticmethod(nn.silu)

    @property
    def default_image_size(self) -> int:
        return self.published_image_size

    @property
    def scaled(self) -> Scaled:
        """The table with its channels multiplied by `width`, its layers by `depth`, rounded up."""
        table = tuple(
            stage._replace(
                channels=round_channels(stage.channels * self.width),
                layers=math.ceil(stage.layers * self.depth),
            )
            for stage in self.table
        )
        return Scaled(
            stem_channels=round_channels(self.stem_channels * self.width),
            table=table,
            head_channels=round_channels(self.head_channels * self.width),
        )

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(f"features_{i}" for i in range(len(self.table) + 2))

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        norm = partial(
            self.norm,
            use_running_average=not train,
            epsilon=self.norm_epsilon,
            momentum=self.norm_momentum,
            dtype=self.dtype,
        )
        conv = partial(self.conv_norm, norm=norm, activation=self.activation, dtype=self.dtype)
        scaled = self.scaled
        stem, *names, top = self.stages
        x = conv(x, scaled.stem_channels, 3, strides=2, name=stem)
        yield stem, x
        rates = self.block_rates(scaled.table)
        for name, stage in zip(names, scaled.table, strict=True):
            for i in range(stage.layers):
                x = stage.block(
                    channels=stage.channels,
                    kernel_size=stage.kernel_size,
                    strides=stage.strides if i == 0 else 1,
                    expansion=stage.expansion,
                    stochastic_depth_rate=next(rates),
                    train=train,
                    norm=norm,
                    dtype=self.dtype,
                    name=f"{name}_{i}",
                )(x)
            yield name, x  # shapes: TABLE_1
        x = conv(x, scaled.head_channels, 1, name=top)
        yield top, x  # [N, 7, 7, 1280]

    def block_rates(self, table: Sequence[Stage]) -> Iterator[float]:
        """The stochastic depth rate of each block in turn: linear, as Huang et al. recommend."""
        blocks_in_all = sum(stage.layers for stage in table)
        return (self.stochastic_depth_rate * i / blocks_in_all for i in range(blocks_in_all))

    def head(self, maps: FeatureMaps, train: bool) -> jax.Array:
        x = pooling.global_avg_pool(maps[self.stages[-1]])  # [N, 1280]
        if self.num_classes == 0:
            return x
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        init = blocks.uniform_fan_in(self.num_classes)  # the outputs are the fan here
        wide = blocks.at_least_float32(self.dtype)
        return blocks.dense(self.num_classes, kernel_init=init, dtype=wide, name="classifier_1")(x)


class EfficientNetLite(EfficientNet, kw_only=True):
    """EfficientNet of `LiteMBConv`, whose stem, head and outermost stages are not scaled."""

    table: Sequence[Stage] = LITE
    norm_epsilon: float = 1e-3
    norm_momentum: float = 0.99

    conv_norm: ClassVar[Callable[..., jax.Array]] = staticmethod(conv_norm_same)
    activation: ClassVar[Callable[..., jax.Array]] = staticmethod(nn.relu6)

    @property
    def scaled(self) -> Scaled:
        """The table with channels multiplied by `width`, layers within by `depth`, rounded up."""
        first, *middle, last = super().scaled.table
        first = first._replace(layers=self.table[0].layers)
        last = last._replace(layers=self.table[-1].layers)
        return Scaled(
            stem_channels=self.stem_channels,
            table=(first, *middle, last),
            head_channels=self.head_channels,
        )


def published(width: float, depth: float, image_size: int, dropout: float) -> dict[str, Any]:
    """The four numbers of a network as the authors' code lists them, as arguments."""
    return {
        "width": width,
        "depth": depth,
        "published_image_size": image_size,
        "dropout_rate": dropout,
    }


# From B5 on torchvision has the batch norm of the authors' code, which its weights came with.
B5_ON = partial(EfficientNet, norm_epsilon=1e-3, norm_momentum=0.99)
V2 = partial(EfficientNet, norm_epsilon=1e-3)

# Images in pixels. V2: those of its evaluation; it trains on smaller ones (table 6).
VARIANTS: Variants = {
    "efficientnet_b0": partial(EfficientNet, **published(1.0, 1.0, 224, 0.2)),
    "efficientnet_b1": partial(EfficientNet, **published(1.0, 1.1, 240, 0.2)),
    "efficientnet_b2": partial(EfficientNet, **published(1.1, 1.2, 260, 0.3)),
    "efficientnet_b3": partial(EfficientNet, **published(1.2, 1.4, 300, 0.3)),
    "efficientnet_b4": partial(EfficientNet, **published(1.4, 1.8, 380, 0.4)),
    "efficientnet_b5": partial(B5_ON, **published(1.6, 2.2, 456, 0.4)),
    "efficientnet_b6": partial(B5_ON, **published(1.8, 2.6, 528, 0.5)),
    "efficientnet_b7": partial(B5_ON, **published(2.0, 3.1, 600, 0.5)),
    "efficientnet_v2_s": partial(V2, table=V2_S, stem_channels=24, **published(1, 1, 384, 0.2)),
    "efficientnet_v2_m": partial(V2, table=V2_M, stem_channels=24, **published(1, 1, 480, 0.3)),
    "efficientnet_v2_l": partial(V2, table=V2_L, stem_channels=32, **published(1, 1, 480, 0.4)),
    "efficientnet_lite0": partial(EfficientNetLite, **published(1.0, 1.0, 224, 0.2)),
    "efficientnet_lite1": partial(EfficientNetLite, **published(1.0, 1.1, 240, 0.2)),
    "efficientnet_lite2": partial(EfficientNetLite, **published(1.1, 1.2, 260, 0.3)),
    "efficientnet_lite3": partial(EfficientNetLite, **published(1.2, 1.4, 280, 0.3)),
    "efficientnet_lite4": partial(EfficientNetLite, **published(1.4, 1.8, 300, 0.3)),
}
