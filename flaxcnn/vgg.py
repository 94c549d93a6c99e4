"""VGG: "Very Deep Convolutional Networks for Large-Scale Image Recognition".

Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556. Configurations A, B, D and E of table 1, as
torchvision builds them.

Deviations from the paper, all torchvision's:
- convolutions start from He's normal initialisation; the paper draws them from N(0, 0.01) in
  variance and starts the deep networks from a trained configuration A (section 3.1);
- the `_bn` networks normalise the output of each convolution, which the paper, older than batch
  normalisation, does not;
- an adaptive average pool before the classifier admits any image size; the paper applies the dense
  layers as convolutions to larger images (section 3.2).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from flaxcnn import blocks, pooling
from flaxcnn.network import FeatureMaps, Network, Variants

# Table 1: the channels of each 3x3 convolution, block by block; a max pool ends each block.
CONFIGURATIONS: Mapping[str, Sequence[Sequence[int]]] = {
    "A": ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    "B": ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    "D": ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    "E": ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(Network, kw_only=True):
    """Blocks of 3x3 convolutions, each ended by a max pool, then three dense layers.

    Images [N, H, W, C] of at least 32x32 -> logits [N, num_classes]; `num_classes=0` gives the
    pooled features [N, 25088]. Stages: `pool1` to `pool5`, the output of each max pool.
    """

    configuration: str
    batch_norm: bool = False
    local_response_norm: bool = False  # behind the first convolution
    dropout_rate: float = 0.5  # section 3.1
    norm: blocks.NormFactory = blocks.BatchNorm

    min_size: ClassVar[int] = 32  # five halvings leave one pixel
    flattened: ClassVar[Mapping[str, tuple[int, int, int]]] = {"classifier_0": (512, 7, 7)}

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(f"pool{i + 1}" for i in range(len(CONFIGURATIONS[self.configuration])))

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        conv = partial(blocks.conv, padding=1, use_bias=True, dtype=self.dtype)
        norm = partial(self.norm, use_running_average=not train, dtype=self.dtype)
        index = 0  # torchvision numbers every convolution, norm, ReLU and pool in one sequence
        for stage, block in zip(self.stages, CONFIGURATIONS[self.configuration], strict=True):
            for channels in block:
                x = conv(channels, 3, name=f"features_{index}")(x)
                if self.batch_norm:
                    x = blocks.norm_relu(norm(name=f"features_{index + 1}"), x)
                else:
                    x = blocks.relu(x)
                if self.local_response_norm and index == 0:
                    x = blocks.local_response_norm(x)
                index += 3 if self.batch_norm else 2
            x = pooling.max_pool(x, 2, 2)
            index += 1
            yield stage, x  # pool5: [N, 7, 7, 512]

    def head(self, maps: FeatureMaps, train: bool) -> jax.Array:
        x = maps["pool5"]
        copies = 49 if x.shape[1:3] == (1, 1) else 1  # of what images below 64x64 leave
        x = pooling.adaptive_avg_pool(x, 7)
        x = x.reshape(x.shape[0], -1)  # [N, 25088]
        if self.num_classes == 0:
            return x
        init = nn.initializers.normal(0.01)  # torchvision; the paper's variance is 0.01
        dense = partial(blocks.dense, kernel_init=init)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        x = blocks.relu(dense(4096, copies=copies, dtype=self.dtype, name="classifier_0")(x))
        x = dropout(x)
        x = blocks.relu(dense(4096, dtype=self.dtype, name="classifier_3")(x))
        x = dropout(x)
        wide = blocks.at_least_float32(self.dtype)
        return dense(self.num_classes, dtype=wide, name="classifier_6")(x)


VARIANTS: Variants = {
    "vgg11": partial(VGG, configuration="A"),
    "vgg11_bn": partial(VGG, configuration="A", batch_norm=True),
    "vgg11_lrn": partial(VGG, configuration="A", local_response_norm=True),  # "A-LRN"
    "vgg13": partial(VGG, configuration="B"),
    "vgg13_bn": partial(VGG, configuration="B", batch_norm=True),
    "vgg16": partial(VGG, configuration="D"),
    "vgg16_bn": partial(VGG, configuration="D", batch_norm=True),
    "vgg19": partial(VGG, configuration="E"),
    "vgg19_bn": partial(VGG, configuration="E", batch_norm=True),
}
