"""ResNet: "Deep Residual Learning for Image Recognition".

He, Zhang, Ren and Sun, CVPR 2016, arXiv:1512.03385. The ImageNet networks of table 1.

Deviations from the paper, all torchvision's:
- "v1.5": a bottleneck that halves the map does so in its 3x3 convolution, not in its first 1x1;
- the dense layer starts from torch's default initialisation;
- `zero_init_residual` (Goyal et al. 2017, arXiv:1706.02677, section 5.1) is an option.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn import blocks, pooling


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (figure 5, left).

    [N, H, W, C] -> [N, H / strides, W / strides, channels].
    """

    channels: int
    strides: int
    norm: blocks.NormFactory  # knows already whether it trains, and its dtype
    last_scale_init: blocks.Initializer  # of the norm that ends the residual branch
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(blocks.conv, dtype=self.dtype)
        y = conv(self.channels, 3, strides=self.strides, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = conv(self.channels, 3, padding=1, name="conv2")(y)
        y = self.norm(scale_init=self.last_scale_init, name="bn2")(y)
        if self.strides != 1 or x.shape[-1] != self.channels:  # option B of section 3.3
            x = conv(self.channels, 1, strides=self.strides, name="downsample_0")(x)
            x = self.norm(name="downsample_1")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1 to fewer channels, 3x3, 1x1 to four times as many, beside a shortcut (figure 5, right).

    [N, H, W, C] -> [N, H / strides, W / strides, 4 * channels].
    """

    channels: int
    strides: int
    norm: blocks.NormFactory  # knows already whether it trains, and its dtype
    last_scale_init: blocks.Initializer  # of the norm that ends the residual branch
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(blocks.conv, dtype=self.dtype)
        y = conv(self.channels, 1, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = conv(self.channels, 3, strides=self.strides, padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        y = conv(4 * self.channels, 1, name="conv3")(y)
        y = self.norm(scale_init=self.last_scale_init, name="bn3")(y)
        if self.strides != 1 or x.shape[-1] != 4 * self.channels:  # option B of section 3.3
            x = conv(4 * self.channels, 1, strides=self.strides, name="downsample_0")(x)
            x = self.norm(name="downsample_1")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, global average pooling and one dense layer.

    Images [N, H, W, C] of any size -> logits [N, num_classes] in at least float32;
    `num_classes=0` gives the pooled features [N, 512 or 2048] in `dtype`.
    """

    block: Callable[..., nn.Module]
    stage_sizes: Sequence[int]  # blocks per stage
    zero_init_residual: bool = False  # each block starts as the identity
    num_classes: int = 1000
    norm: blocks.NormFactory = blocks.BatchNorm
    dtype: DTypeLike = jnp.float32

    min_size: ClassVar[int] = 1
    flattened: ClassVar[Mapping[str, tuple[int, int, int]]] = {}  # nothing but pooled features

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        blocks.check_image_size(x, self.min_size, "ResNet")
        norm = partial(self.norm, use_running_average=not train, dtype=self.dtype)
        block = partial(
            self.block,
            norm=norm,
            last_scale_init=jax.nn.initializers.constant(0.0 if self.zero_init_residual else 1.0),
            dtype=self.dtype,
        )
        x = x.astype(self.dtype)  # [N, 224, 224, 3]
        x = blocks.conv(64, 7, strides=2, padding=3, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))  # [N, 112, 112, 64]
        x = pooling.max_pool(x, 3, 2, padding=1)  # [N, 56, 56, 64]
        for stage, size in enumerate(self.stage_sizes, start=1):
            for i in range(size):
                strides = 2 if stage > 1 and i == 0 else 1
                x = block(64 * 2 ** (stage - 1), strides, name=f"layer{stage}_{i}")(x)
        x = pooling.global_avg_pool(x)  # [N, 512] with basic blocks, [N, 2048] with bottlenecks
        if self.num_classes == 0:
            return x
        init = blocks.uniform_fan_in(x.shape[-1])
        wide = blocks.at_least_float32(self.dtype)
        return blocks.dense(
            self.num_classes, kernel_init=init, bias_init=init, dtype=wide, name="fc"
        )(x)


# Table 1.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "resnet18": {"block": BasicBlock, "stage_sizes": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "stage_sizes": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "stage_sizes": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "stage_sizes": (3, 4, 23, 3)},
    "resnet152": {"block": Bottleneck, "stage_sizes": (3, 8, 36, 3)},
}
NETWORK = ResNet
