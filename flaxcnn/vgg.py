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

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn import blocks, pooling

# Table 1: the channels of each 3x3 convolution, block by block; a max pool ends each block.
CONFIGURATIONS: Mapping[str, Sequence[Sequence[int]]] = {
    "A": ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    "B": ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    "D": ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    "E": ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """Blocks of 3x3 convolutions, each ended by a max pool, then three dense layers.

    Images [N, H, W, C] of at least 32x32 -> logits [N, num_classes] in at least float32;
    `num_classes=0` gives the pooled features [N, 25088] in `dtype`.

    Raises:
        ValueError: for images that are smaller.
    """

    configuration: str
    batch_norm: bool
    num_classes: int = 1000
    dropout_rate: float = 0.5  # section 3.1
    norm: blocks.NormFactory = blocks.BatchNorm
    dtype: DTypeLike = jnp.float32

    min_size: ClassVar[int] = 32  # five halvings leave one pixel
    # The dense layer behind the flatten, and the (C, H, W) that torch flattens there.
    flattened: ClassVar[Mapping[str, tuple[int, int, int]]] = {"classifier_0": (512, 7, 7)}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        blocks.check_image_size(x, self.min_size, "VGG")
        x = x.astype(self.dtype)  # [N, 224, 224, 3]
        x = self._features(x, train)  # [N, 7, 7, 512]
        copies = 49 if x.shape[1:3] == (1, 1) else 1  # of what images below 64x64 leave
        x = pooling.adaptive_avg_pool(x, 7)
        x = x.reshape(x.shape[0], -1)  # [N, 25088]
        if self.num_classes == 0:
            return x
        return self._classifier(x, copies, train)

    def _features(self, x: jax.Array, train: bool) -> jax.Array:
        index = 0  # torchvision numbers every convolution, norm, ReLU and pool in one sequence
        for block in CONFIGURATIONS[self.configuration]:
            for channels in block:
                conv_name, norm_name = f"features_{index}", f"features_{index + 1}"
                x = blocks.conv(
                    channels, 3, padding=1, use_bias=True, dtype=self.dtype, name=conv_name
                )(x)
                if self.batch_norm:
                    x = self.norm(use_running_average=not train, dtype=self.dtype, name=norm_name)(
                        x
                    )
                x = nn.relu(x)
                index += 3 if self.batch_norm else 2
            x = pooling.max_pool(x, 2, 2)
            index += 1
        return x

    def _classifier(self, x: jax.Array, copies: int, train: bool) -> jax.Array:
        init = nn.initializers.normal(0.01)  # torchvision; the paper's variance is 0.01
        dense = partial(blocks.dense, kernel_init=init)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        x = nn.relu(dense(4096, copies=copies, dtype=self.dtype, name="classifier_0")(x))
        x = dropout(x)
        x = nn.relu(dense(4096, dtype=self.dtype, name="classifier_3")(x))
        x = dropout(x)
        wide = blocks.at_least_float32(self.dtype)
        return dense(self.num_classes, dtype=wide, name="classifier_6")(x)


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "vgg11": {"configuration": "A", "batch_norm": False},
    "vgg11_bn": {"configuration": "A", "batch_norm": True},
    "vgg13": {"configuration": "B", "batch_norm": False},
    "vgg13_bn": {"configuration": "B", "batch_norm": True},
    "vgg16": {"configuration": "D", "batch_norm": False},
    "vgg16_bn": {"configuration": "D", "batch_norm": True},
    "vgg19": {"configuration": "E", "batch_norm": False},
    "vgg19_bn": {"configuration": "E", "batch_norm": True},
}
NETWORK = VGG
