"""ZFNet: "Visualizing and Understanding Convolutional Networks".

Zeiler and Fergus, ECCV 2014, arXiv:1311.2901, figure 3: AlexNet in one tower, with a first layer of
7x7 at stride 2 where AlexNet has 11x11 at stride 4, and a second layer at stride 2.

Deviations from the paper:
- "contrast normalized across feature maps" is taken to be AlexNet's local response normalisation;
- figure 3 gives sizes but no padding; padding and rounding here are those that give its 110, 55,
  26, 13 and 6 pixels;
- weights start from N(0, 0.01) in deviation; section 3.1 sets all of them to 0.01, from which no
  two maps could ever differ;
- the filters' norms are not bounded during training (section 3.1);
- an adaptive average pool before the classifier admits any image size.
"""

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from flaxcnn import blocks, pooling
from flaxcnn.network import FeatureMaps, Network, Variants


class ZFNet(Network, kw_only=True):
    """Five convolutions and three dense layers (figure 3).

    Images [N, H, W, C] of at least 63x63 -> logits [N, num_classes]; `num_classes=0` gives the
    pooled features [N, 9216]. Stages: `pool1` to `pool3`, the output of each max pool, the first
    two normalised.
    """

    dropout_rate: float = 0.5  # section 3.1

    min_size: ClassVar[int] = 63

    @property
    def stages(self) -> tuple[str, ...]:
        return ("pool1", "pool2", "pool3")

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        init = nn.initializers.normal(0.01)
        conv = partial(blocks.conv, use_bias=True, kernel_init=init, dtype=self.dtype)
        x = blocks.relu(conv(96, 7, strides=2, padding=1, name="conv1")(x))  # [N, 110, 110, 96]
        x = blocks.local_response_norm(pooling.max_pool(x, 3, 2, ceil_mode=True))
        yield "pool1", x  # [N, 55, 55, 96]
        x = blocks.relu(conv(256, 5, strides=2, name="conv2")(x))  # [N, 26, 26, 256]
        x = blocks.local_response_norm(pooling.max_pool(x, 3, 2, ceil_mode=True))
        yield "pool2", x  # [N, 13, 13, 256]
        x = blocks.relu(conv(384, 3, padding=1, name="conv3")(x))
        x = blocks.relu(conv(384, 3, padding=1, name="conv4")(x))
        x = blocks.relu(conv(256, 3, padding=1, name="conv5")(x))
        x = pooling.max_pool(x, 3, 2)
        yield "pool3", x  # [N, 6, 6, 256]

    def head(self, maps: FeatureMaps, train: bool) -> jax.Array:
        x = pooling.adaptive_avg_pool(maps["pool3"], 6)
        x = x.reshape(x.shape[0], -1)  # [N, 9216]
        if self.num_classes == 0:
            return x
        dense = partial(blocks.dense, kernel_init=nn.initializers.normal(0.01))
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        x = dropout(blocks.relu(dense(4096, dtype=self.dtype, name="fc6")(x)))
        x = dropout(blocks.relu(dense(4096, dtype=self.dtype, name="fc7")(x)))
        return dense(self.num_classes, dtype=blocks.at_least_float32(self.dtype), name="fc8")(x)


VARIANTS: Variants = {"zfnet": partial(ZFNet)}
