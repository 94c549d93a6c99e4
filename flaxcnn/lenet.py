"""LeNet-5: "Gradient-Based Learning Applied to Document Recognition".

LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 86(11), 1998; section II.B and figure 2.
Layers bear the paper's names and have its parameter counts: 60,000 up to F6.

Deviations from the paper:
- the output layer is dense (850 parameters for ten classes); the paper's measures distances to
  fixed 7x12 bitmaps of the characters, which other classes do not have;
- weights start from U(+-1 / sqrt(fan_in)); the paper's U(+-2.4 / fan_in) (appendix A) is so small
  in C5 that plain gradient descent hardly starts;
- images may be larger than 32x32: the maps of C5, single values there, are averaged.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn import blocks, pooling
from flaxcnn.convolution import conv_general_dilated

# Table I: the maps of S2 that each of the sixteen maps of C3 sees.
C3_INPUTS: Sequence[Sequence[int]] = (
    *(((i + 0) % 6, (i + 1) % 6, (i + 2) % 6) for i in range(6)),
    *(((i + 0) % 6, (i + 1) % 6, (i + 2) % 6, (i + 3) % 6) for i in range(6)),
    *(((i + 0) % 6, (i + 1) % 6, (i + 3) % 6, (i + 4) % 6) for i in range(3)),
    (0, 1, 2, 3, 4, 5),
)


def squash(x: jax.Array) -> jax.Array:
    """The scaled hyperbolic tangent of appendix A; f(1) = 1 and f(-1) = -1."""
    return 1.7159 * jnp.tanh(2 / 3 * x)


# ---------------------------------------------------------------------------------------- layers
class Subsampling(nn.Module):
    """Sums each 2x2 square, times a coefficient and plus a bias of its map: layers S2 and S4.

    [N, H, W, C] -> [N, H // 2, W // 2, C].
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, wide = (x.shape[-1],), blocks.at_least_float32(self.dtype)
        # A coefficient of 1/4 makes the sum an average.
        scale = self.param("scale", nn.initializers.constant(0.25), channels, wide)
        bias = self.param("bias", nn.initializers.zeros, channels, wide)
        x = 4 * nn.avg_pool(x, (2, 2), (2, 2))
        return x * scale.astype(self.dtype) + bias.astype(self.dtype)


class PartialConv(nn.Module):
    """A 5x5 convolution in which each output map sees some of the input maps: layer C3.

    [N, H, W, 6] -> [N, H - 4, W - 4, 16]. The kernel [5, 5, 60] holds the connections that exist,
    so that the layer has the paper's 1,516 parameters; zeros stand for the others as it is applied.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = blocks.at_least_float32(self.dtype)
        inputs = [i for group in C3_INPUTS for i in group]
        outputs = [o for o, group in enumerate(C3_INPUTS) for _ in group]
        fan_in = 25 * len(inputs) // len(C3_INPUTS)  # 75, 100 or 150; on average 93
        init = blocks.uniform_fan_in(fan_in)
        kernel = self.param("kernel", init, (5, 5, len(inputs)), wide)
        bias = self.param("bias", nn.initializers.zeros, (len(C3_INPUTS),), wide)
        full = jnp.zeros((5, 5, 6, len(C3_INPUTS)), wide).at[:, :, inputs, outputs].set(kernel)
        y = conv_general_dilated(
            x,
            full.astype(self.dtype),
            (1, 1),
            ((0, 0), (0, 0)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias.astype(self.dtype)


# --------------------------------------------------------------------------------------- network
class LeNet5(nn.Module):
    """Convolution and subsampling twice, then C5, F6 and the output layer (figure 2).

    Images [N, H, W, C] of at least 32x32 -> logits [N, num_classes] in at least float32;
    `num_classes=0` gives the features of C5 [N, 120] in `dtype`.

    Raises:
        ValueError: for images that are smaller.
    """

    num_classes: int = 10
    dtype: DTypeLike = jnp.float32

    min_size: ClassVar[int] = 32
    flattened: ClassVar[Mapping[str, tuple[int, int, int]]] = {}  # C5 leaves one value per map

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        del train  # nothing here behaves differently in training
        blocks.check_image_size(x, self.min_size, "LeNet-5")
        x = x.astype(self.dtype)  # [N, 32, 32, 1]
        x = squash(self._conv(6, fan_in=25 * x.shape[-1], name="C1")(x))  # [N, 28, 28, 6]
        x = squash(Subsampling(self.dtype, name="S2")(x))  # [N, 14, 14, 6]
        x = squash(PartialConv(self.dtype, name="C3")(x))  # [N, 10, 10, 16]
        x = squash(Subsampling(self.dtype, name="S4")(x))  # [N, 5, 5, 16]
        x = squash(self._conv(120, fan_in=400, name="C5")(x))  # [N, 1, 1, 120]
        x = pooling.global_avg_pool(x)  # [N, 120]
        if self.num_classes == 0:
            return x
        x = squash(
            blocks.dense(84, kernel_init=blocks.uniform_fan_in(120), dtype=self.dtype, name="F6")(x)
        )  # [N, 84]
        return blocks.dense(
            self.num_classes,
            kernel_init=blocks.uniform_fan_in(84),
            dtype=blocks.at_least_float32(self.dtype),
            name="output",
        )(x)

    def _conv(self, features: int, fan_in: int, name: str) -> nn.Conv:
        init = blocks.uniform_fan_in(fan_in)
        return blocks.conv(
            features, 5, use_bias=True, kernel_init=init, dtype=self.dtype, name=name
        )


VARIANTS: Mapping[str, Mapping[str, Any]] = {"lenet5": {}}
NETWORK = LeNet5
