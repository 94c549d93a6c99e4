"""ResNet v2: "Identity Mappings in Deep Residual Networks".

He, Zhang, Ren and Sun, ECCV 2016, arXiv:1603.05027: "full pre-activation" (figure 4 e). Batch norm
and ReLU come before each convolution, so that nothing but additions lies on the shortcuts' way.

As the appendix has it, the first unit takes the activation that follows `conv1` and has none of its
own, and another one follows the last unit.

Deviations from the paper:
- bottlenecks halve the map in their 3x3 convolution, as in this library's v1 and in
  fb.resnet.torch's preresnet.lua; the authors' own code, for CIFAR, does so in the first 1x1;
- the ImageNet networks of 18, 50 and 101 layers are those of the v1 paper's table 1; this one
  trains 152 and 200;
- the dense layer starts from torch's default initialisation.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn import blocks, pooling
from flaxcnn.network import FeatureMaps, Network, Variants


# ---------------------------------------------------------------------------------------- blocks
class PreactBasicBlock(nn.Module):
    """Two 3x3 convolutions, each behind a norm and a ReLU.

    [N, H, W, C] -> [N, H / strides, W / strides, channels].
    """

    channels: int
    strides: int
    activated: bool  # the input has been normalised and activated: the network's first unit
    norm: blocks.NormFactory  # knows already whether it trains, and its dtype
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(blocks.conv, dtype=self.dtype)
        y = x if self.activated else blocks.norm_relu(self.norm(name="bn1"), x)
        if self.strides != 1 or x.shape[-1] != self.channels:
            # Appendix: projections take what is activated already.
            x = conv(self.channels, 1, strides=self.strides, name="downsample")(y)
        y = conv(self.channels, 3, strides=self.strides, padding=1, name="conv1")(y)
        y = blocks.norm_relu(self.norm(name="bn2"), y)
        return x + conv(self.channels, 3, padding=1, name="conv2")(y)


class PreactBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each behind a norm and a ReLU.

    [N, H, W, C] -> [N, H / strides, W / strides, 4 * channels].
    """

    channels: int
    strides: int
    activated: bool  # the input has been normalised and activated: the network's first unit
    norm: blocks.NormFactory  # knows already whether it trains, and its dtype
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(blocks.conv, dtype=self.dtype)
        y = x if self.activated else blocks.norm_relu(self.norm(name="bn1"), x)
        if self.strides != 1 or x.shape[-1] != 4 * self.channels:
            # Appendix: projections take what is activated already.
            x = conv(4 * self.channels, 1, strides=self.strides, name="downsample")(y)
        y = conv(self.channels, 1, name="conv1")(y)
        y = blocks.norm_relu(self.norm(name="bn2"), y)
        y = conv(self.channels, 3, strides=self.strides, padding=1, name="conv2")(y)
        y = blocks.norm_relu(self.norm(name="bn3"), y)
        return x + conv(4 * self.channels, 1, name="conv3")(y)


# --------------------------------------------------------------------------------------- network
class ResNetV2(Network, kw_only=True):
    """A stem, four stages of pre-activated units, a last activation, pooling and a dense layer.

    Images [N, H, W, C] of any size -> logits [N, num_classes]; `num_classes=0` gives the pooled
    features [N, 512 or 2048]. Stages: `stem` (behind its max pool), `layer1` to `layer4` (sums that
    are not activated yet).
    """

    block: Callable[..., nn.Module]
    stage_sizes: Sequence[int]  # blocks per stage
    norm: blocks.NormFactory = blocks.BatchNorm

    @property
    def stages(self) -> tuple[str, ...]:
        return ("stem", *(f"layer{i + 1}" for i in range(len(self.stage_sizes))))

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        norm = self._norm(train)
        x = blocks.conv(64, 7, strides=2, padding=3, dtype=self.dtype, name="conv1")(x)
        x = blocks.norm_relu(norm(name="bn1"), x)  # [N, 112, 112, 64]
        x = pooling.max_pool(x, 3, 2, padding=1)
        yield "stem", x  # [N, 56, 56, 64]
        for stage, size in enumerate(self.stage_sizes):
            for i in range(size):
                x = self.block(
                    64 * 2**stage,
                    strides=2 if stage > 0 and i == 0 else 1,
                    activated=stage == i == 0,
                    norm=norm,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{i}",
                )(x)
            yield f"layer{stage + 1}", x

    def head(self, maps: FeatureMaps, train: bool) -> jax.Array:
        x = blocks.norm_relu(self._norm(train)(name="bn2"), maps[self.stages[-1]])
        x = pooling.global_avg_pool(x)
        if self.num_classes == 0:
            return x
        init = blocks.uniform_fan_in(x.shape[-1])
        wide = blocks.at_least_float32(self.dtype)
        return blocks.dense(
            self.num_classes, kernel_init=init, bias_init=init, dtype=wide, name="fc"
        )(x)

    def _norm(self, train: bool) -> blocks.NormFactory:
        return partial(self.norm, use_running_average=not train, dtype=self.dtype)


VARIANTS: Variants = {
    "resnet18_v2": partial(ResNetV2, block=PreactBasicBlock, stage_sizes=(2, 2, 2, 2)),
    "resnet50_v2": partial(ResNetV2, block=PreactBottleneck, stage_sizes=(3, 4, 6, 3)),
    "resnet101_v2": partial(ResNetV2, block=PreactBottleneck, stage_sizes=(3, 4, 23, 3)),
    "resnet152_v2": partial(ResNetV2, block=PreactBottleneck, stage_sizes=(3, 8, 36, 3)),
}
