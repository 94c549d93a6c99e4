"""ResNet: "Deep Residual Learning for Image Recognition".

He, Zhang, Ren and Sun, CVPR 2016, arXiv:1512.03385: the ImageNet networks of table 1, the CIFAR-10
networks of section 4.2, and the plain networks without shortcuts that both are compared with. Two
papers that change no more than a bottleneck's widths are here as well:

- ResNeXt, "Aggregated Residual Transformations for Deep Neural Networks", Xie et al., CVPR 2017,
  arXiv:1611.05431: the 3x3 convolution is grouped (32x4d: 32 groups, 4 channels in each);
- "Wide Residual Networks", Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146, section 4.2 on
  ImageNet: the 3x3 convolution has twice the channels.

Deviations from the papers, all torchvision's but the last:
- "v1.5": a bottleneck that halves the map does so in its 3x3 convolution, not in its first 1x1;
- the dense layer starts from torch's default initialisation;
- `zero_init_residual` (Goyal et al. 2017, arXiv:1706.02677, section 5.1) is an option;
- weights start from He's normal initialisation by fan-out; the paper's reference 13 goes by fan-in.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn import blocks, pooling
from flaxcnn.network import FeatureMaps, Network, Variants

ONES = nn.initializers.ones


# ---------------------------------------------------------------------------------------- blocks
class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (figure 5, left).

    [N, H, W, C] -> [N, H / strides, W / strides, channels].
    """

    channels: int
    strides: int
    norm: blocks.NormFactory  # knows already whether it trains, and its dtype
    dtype: DTypeLike
    last_scale_init: blocks.Initializer = ONES  # of the norm that ends the residual branch

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(blocks.conv, dtype=self.dtype)
        y = conv(self.channels, 3, strides=self.strides, padding=1, name="conv1")(x)
        y = blocks.norm_relu(self.norm(name="bn1"), y)
        y = conv(self.channels, 3, padding=1, name="conv2")(y)
        y = self.norm(scale_init=self.last_scale_init, name="bn2")(y)
        if self.strides != 1 or x.shape[-1] != self.channels:  # option B of section 3.3
            x = conv(self.channels, 1, strides=self.strides, name="downsample_0")(x)
            x = self.norm(name="downsample_1")(x)
        return blocks.relu(x + y)


class Bottleneck(nn.Module):
    """1x1 to fewer channels, 3x3, 1x1 to four times as many, beside a shortcut (figure 5, right).

    [N, H, W, C] -> [N, H / strides, W / strides, 4 * channels].
    """

    channels: int
    strides: int
    norm: blocks.NormFactory  # knows already whether it trains, and its dtype
    dtype: DTypeLike
    last_scale_init: blocks.Initializer = ONES  # of the norm that ends the residual branch
    groups: int = 1  # ResNeXt's cardinality
    width_per_group: int = 64  # of the 3x3 convolution, in the stage with 64 channels

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(blocks.conv, dtype=self.dtype)
        width = self.channels * self.width_per_group // 64 * self.groups
        y = conv(width, 1, name="conv1")(x)
        y = blocks.norm_relu(self.norm(name="bn1"), y)
        y = conv(
            width, 3, strides=self.strides, padding=1, groups=self.groups, name="conv2"
        )(y)  # fmt: skip
        y = blocks.norm_relu(self.norm(name="bn2"), y)
        y = conv(4 * self.channels, 1, name="conv3")(y)
        y = self.norm(scale_init=self.last_scale_init, name="bn3")(y)
        if self.strides != 1 or x.shape[-1] != 4 * self.channels:  # option B of section 3.3
            x = conv(4 * self.channels, 1, strides=self.strides, name="downsample_0")(x)
            x = self.norm(name="downsample_1")(x)
        return blocks.relu(x + y)


class CifarBlock(nn.Module):
    """A basic block whose shortcut has no parameters (section 4.2: "option A").

    [N, H, W, C] -> [N, H / strides, W / strides, channels].
    """

    channels: int
    strides: int
    norm: blocks.NormFactory
    dtype: DTypeLike
    last_scale_init: blocks.Initializer = ONES

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(blocks.conv, dtype=self.dtype)
        y = conv(self.channels, 3, strides=self.strides, padding=1, name="conv1")(x)
        y = blocks.norm_relu(self.norm(name="bn1"), y)
        y = conv(self.channels, 3, padding=1, name="conv2")(y)
        y = self.norm(scale_init=self.last_scale_init, name="bn2")(y)
        x = x[:, :: self.strides, :: self.strides]
        zeros = self.channels - x.shape[-1]  # channels that come new are zero
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (zeros // 2, zeros - zeros // 2)))
        return blocks.relu(x + y)


class PlainBlock(nn.Module):
    """Two 3x3 convolutions and no shortcut: what section 4 compares residual blocks with.

    [N, H, W, C] -> [N, H / strides, W / strides, channels].
    """

    channels: int
    strides: int
    norm: blocks.NormFactory
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(blocks.conv, dtype=self.dtype)
        x = conv(self.channels, 3, strides=self.strides, padding=1, name="conv1")(x)
        x = blocks.norm_relu(self.norm(name="bn1"), x)
        x = conv(self.channels, 3, padding=1, name="conv2")(x)
        return blocks.norm_relu(self.norm(name="bn2"), x)


# -------------------------------------------------------------------------------------- networks
class ResNet(Network, kw_only=True):
    """A stem, stages of blocks, global average pooling and one dense layer.

    Images [N, H, W, C] of any size -> logits [N, num_classes]; `num_classes=0` gives the pooled
    features [N, 512 or 2048]. Stages: `stem` (behind its max pool), `layer1` to `layer4`.

    Raises:
        ValueError: for `zero_init_residual` with plain blocks, which would never learn.
    """

    block: Callable[..., nn.Module]
    stage_sizes: Sequence[int]  # blocks per stage
    zero_init_residual: bool = False  # each block starts as the identity
    norm: blocks.NormFactory = blocks.BatchNorm

    def __post_init__(self) -> None:
        if self.zero_init_residual and self.block is PlainBlock:
            raise ValueError(
                "zero_init_residual is for networks with shortcuts; a plain one has none"
            )
        super().__post_init__()

    @property
    def stages(self) -> tuple[str, ...]:
        return ("stem", *(f"layer{i + 1}" for i in range(len(self.stage_sizes))))

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        norm = partial(self.norm, use_running_average=not train, dtype=self.dtype)
        block = partial(self.block, norm=norm, dtype=self.dtype)
        if self.zero_init_residual:
            block = partial(block, last_scale_init=nn.initializers.zeros)
        x = self.stem(x, norm)  # [N, 56, 56, 64]; CIFAR: [N, 32, 32, 16]
        yield "stem", x
        channels = x.shape[-1]
        for stage, size in enumerate(self.stage_sizes):
            for i in range(size):
                strides = 2 if stage > 0 and i == 0 else 1
                x = block(channels * 2**stage, strides, name=f"layer{stage + 1}_{i}")(x)
            yield f"layer{stage + 1}", x

    def stem(self, x: jax.Array, norm: blocks.NormFactory) -> jax.Array:
        """[N, H, W, C] -> [N, H / 4, W / 4, 64]."""
        x = blocks.conv(64, 7, strides=2, padding=3, dtype=self.dtype, name="conv1")(x)
        x = blocks.norm_relu(norm(name="bn1"), x)  # [N, 112, 112, 64]
        return pooling.max_pool(x, 3, 2, padding=1)

    def head(self, maps: FeatureMaps, train: bool) -> jax.Array:
        x = pooling.global_avg_pool(maps[self.stages[-1]])
        if self.num_classes == 0:
            return x
        init = blocks.uniform_fan_in(x.shape[-1])
        wide = blocks.at_least_float32(self.dtype)
        return blocks.dense(
            self.num_classes, kernel_init=init, bias_init=init, dtype=wide, name="fc"
        )(x)


class CifarResNet(ResNet, kw_only=True):
    """The networks of section 4.2, of depth 6n + 2: three stages of n blocks, for small images.

    Images [N, H, W, C] of any size -> logits [N, num_classes]; `num_classes=0` gives the pooled
    features [N, 64]. Stages: `stem`, `layer1` to `layer3`.
    """

    num_classes: int = 10
    block: Callable[..., nn.Module] = CifarBlock

    @property
    def default_image_size(self) -> int:
        return 32

    def stem(self, x: jax.Array, norm: blocks.NormFactory) -> jax.Array:
        """[N, H, W, C] -> [N, H, W, 16]."""
        x = blocks.conv(16, 3, padding=1, dtype=self.dtype, name="conv1")(x)
        return blocks.norm_relu(norm(name="bn1"), x)


RESNEXT_32X4D = partial(Bottleneck, groups=32, width_per_group=4)
RESNEXT_32X8D = partial(Bottleneck, groups=32, width_per_group=8)
RESNEXT_64X4D = partial(Bottleneck, groups=64, width_per_group=4)
WIDE = partial(Bottleneck, width_per_group=128)

# Table 1; for CIFAR-10 section 4.2, n = 3, 5, 7, 9, 18.
VARIANTS: Variants = {
    "plain18": partial(ResNet, block=PlainBlock, stage_sizes=(2, 2, 2, 2)),
    "plain34": partial(ResNet, block=PlainBlock, stage_sizes=(3, 4, 6, 3)),
    "plain20": partial(CifarResNet, block=PlainBlock, stage_sizes=(3,) * 3),
    "plain56": partial(CifarResNet, block=PlainBlock, stage_sizes=(9,) * 3),
    "resnet18": partial(ResNet, block=BasicBlock, stage_sizes=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block=BasicBlock, stage_sizes=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, block=Bottleneck, stage_sizes=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, block=Bottleneck, stage_sizes=(3, 4, 23, 3)),
    "resnet152": partial(ResNet, block=Bottleneck, stage_sizes=(3, 8, 36, 3)),
    "resnet20": partial(CifarResNet, stage_sizes=(3,) * 3),
    "resnet32": partial(CifarResNet, stage_sizes=(5,) * 3),
    "resnet44": partial(CifarResNet, stage_sizes=(7,) * 3),
    "resnet56": partial(CifarResNet, stage_sizes=(9,) * 3),
    "resnet110": partial(CifarResNet, stage_sizes=(18,) * 3),
    "resnext50_32x4d": partial(ResNet, block=RESNEXT_32X4D, stage_sizes=(3, 4, 6, 3)),
    "resnext101_32x8d": partial(ResNet, block=RESNEXT_32X8D, stage_sizes=(3, 4, 23, 3)),
    "resnext101_64x4d": partial(ResNet, block=RESNEXT_64X4D, stage_sizes=(3, 4, 23, 3)),
    "wide_resnet50_2": partial(ResNet, block=WIDE, stage_sizes=(3, 4, 6, 3)),
    "wide_resnet101_2": partial(ResNet, block=WIDE, stage_sizes=(3, 4, 23, 3)),
}
