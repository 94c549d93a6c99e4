"""AlexNet: "ImageNet Classification with Deep Convolutional Neural Networks".

Krizhevsky, Sutskever and Hinton, NIPS 2012: `alexnet_2012`. And its one-tower successor of "One
weird trick for parallelizing convolutional neural networks", Krizhevsky 2014, arXiv:1404.5997,
footnote 1, as torchvision builds it: `alexnet`.

Deviations from the papers:
- `alexnet_2012` pads its images by two pixels, so that the 224x224 of the paper's figure 2 give the
  55x55 maps it draws (without padding 227x227 would);
- response normalisation in `alexnet_2012` runs across the border of the towers, as section 3.3's
  formula does and figure 2, where the towers meet in certain layers only, does not;
- `alexnet` has 256 channels in its fourth convolution, and starts from torch's default
  initialisation; both are torchvision's;
- an adaptive average pool before the classifier admits any image size.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn import blocks, pooling
from flaxcnn.network import FeatureMaps, Network, Variants


class AlexNet(Network, kw_only=True):
    """Five convolutions and three dense layers in one tower, as torchvision has them.

    Images [N, H, W, C] of at least 63x63 -> logits [N, num_classes]; `num_classes=0` gives the
    pooled features [N, 9216]. Stages: `pool1` to `pool3`, the output of each max pool.
    """

    dropout_rate: float = 0.5

    min_size: ClassVar[int] = 63
    flattened: ClassVar[Mapping[str, tuple[int, int, int]]] = {"classifier_1": (256, 6, 6)}

    @property
    def stages(self) -> tuple[str, ...]:
        return ("pool1", "pool2", "pool3")

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        x = self._conv(x, 64, 11, strides=4, padding=2, name="features_0")  # [N, 55, 55, 64]
        x = pooling.max_pool(x, 3, 2)
        yield "pool1", x  # [N, 27, 27, 64]
        x = self._conv(x, 192, 5, padding=2, name="features_3")
        x = pooling.max_pool(x, 3, 2)
        yield "pool2", x  # [N, 13, 13, 192]
        x = self._conv(x, 384, 3, padding=1, name="features_6")
        x = self._conv(x, 256, 3, padding=1, name="features_8")
        x = self._conv(x, 256, 3, padding=1, name="features_10")
        x = pooling.max_pool(x, 3, 2)
        yield "pool3", x  # [N, 6, 6, 256]

    def head(self, maps: FeatureMaps, train: bool) -> jax.Array:
        x = pooling.adaptive_avg_pool(maps["pool3"], 6)
        x = x.reshape(x.shape[0], -1)  # [N, 9216]
        if self.num_classes == 0:
            return x
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        x = blocks.relu(self._dense(dropout(x), 4096, self.dtype, name="classifier_1"))
        x = blocks.relu(self._dense(dropout(x), 4096, self.dtype, name="classifier_4"))
        wide = blocks.at_least_float32(self.dtype)
        return self._dense(x, self.num_classes, wide, name="classifier_6")

    def _conv(
        self, x: jax.Array, channels: int, size: int, strides: int = 1, *, padding: int, name: str
    ) -> jax.Array:
        init = blocks.uniform_fan_in(size * size * x.shape[-1])
        conv = blocks.conv(
            channels,
            size,
            strides=strides,
            padding=padding,
            use_bias=True,
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            name=name,
        )
        return blocks.relu(conv(x))

    def _dense(self, x: jax.Array, features: int, dtype: DTypeLike, *, name: str) -> jax.Array:
        init = blocks.uniform_fan_in(x.shape[-1])
        return blocks.dense(features, kernel_init=init, bias_init=init, dtype=dtype, name=name)(x)


class AlexNet2012(Network, kw_only=True):
    """The paper's figure 2: two towers, which meet in the third convolution and the dense layers.

    A convolution within the towers is one of two groups. Images [N, H, W, C] of at least 63x63 ->
    logits [N, num_classes]; `num_classes=0` gives the pooled features [N, 9216]. Stages: `pool1`
    to `pool3`, the output of each max pool.
    """

    dropout_rate: float = 0.5  # section 4.2

    min_size: ClassVar[int] = 63

    @property
    def stages(self) -> tuple[str, ...]:
        return ("pool1", "pool2", "pool3")

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        conv = partial(
            blocks.conv,
            use_bias=True,
            kernel_init=nn.initializers.normal(0.01),  # section 5
            dtype=self.dtype,
        )
        ones = nn.initializers.ones  # section 5: the biases of layers 2, 4 and 5 start from one
        x = blocks.relu(conv(96, 11, strides=4, padding=2, name="conv1")(x))  # [N, 55, 55, 96]
        x = pooling.max_pool(blocks.local_response_norm(x), 3, 2)  # section 3.4: overlapping
        yield "pool1", x  # [N, 27, 27, 96]
        x = blocks.relu(conv(256, 5, padding=2, groups=2, bias_init=ones, name="conv2")(x))
        x = pooling.max_pool(blocks.local_response_norm(x), 3, 2)
        yield "pool2", x  # [N, 13, 13, 256]
        x = blocks.relu(conv(384, 3, padding=1, name="conv3")(x))
        x = blocks.relu(conv(384, 3, padding=1, groups=2, bias_init=ones, name="conv4")(x))
        x = blocks.relu(conv(256, 3, padding=1, groups=2, bias_init=ones, name="conv5")(x))
        x = pooling.max_pool(x, 3, 2)
        yield "pool3", x  # [N, 6, 6, 256]

    def head(self, maps: FeatureMaps, train: bool) -> jax.Array:
        x = pooling.adaptive_avg_pool(maps["pool3"], 6)
        x = x.reshape(x.shape[0], -1)  # [N, 9216]
        if self.num_classes == 0:
            return x
        dense = partial(blocks.dense, kernel_init=nn.initializers.normal(0.01))  # section 5
        hidden = partial(dense, 4096, bias_init=nn.initializers.ones, dtype=self.dtype)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        x = dropout(blocks.relu(hidden(name="fc6")(x)))
        x = dropout(blocks.relu(hidden(name="fc7")(x)))
        return dense(self.num_classes, dtype=blocks.at_least_float32(self.dtype), name="fc8")(x)


VARIANTS: Variants = {
    "alexnet": partial(AlexNet),
    "alexnet_2012": partial(AlexNet2012),
}
