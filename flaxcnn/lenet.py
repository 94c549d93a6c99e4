"""LeNet: the network of 1989, and LeNet-5.

"Backpropagation Applied to Handwritten Zip Code Recognition", LeCun, Boser, Denker, Henderson,
Howard, Hubbard and Jackel, Neural Computation 1(4), 1989; section 3. Layers bear the paper's names
and have its parameter counts, 9,760 in all. "Gradient-Based Learning Applied to Document
Recognition", LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 86(11), 1998; section II.B
and figure 2. Layers bear the paper's names and have its parameter counts: 60,000 up to F6.

Deviations from the papers:
- 1989: the paper leaves open which eight maps of H1 each map of H2 sees; here they go round;
- 1989: the ten outputs are logits, without the last tanh, and the loss is the trainer's;
- 1989: larger images are averaged down to 16x16, as the paper's were before they came in;
- 1998: the output layer is dense (850 parameters for ten classes); the paper's measures distances
  to fixed 7x12 bitmaps of the characters, which other classes do not have;
- weights start from U(+-1 / sqrt(fan_in)); the papers' U(+-2.4 / fan_in) (1998: appendix A) is so
  small in C5 that plain gradient descent hardly starts;
- 1998: images may be larger than 32x32: the maps of C5, single values there, are averaged.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn import blocks, pooling
from flaxcnn.convolution import conv_general_dilated
from flaxcnn.network import FeatureMaps, Network, Variants

# Table I: the maps of S2 that each of the sixteen maps of C3 sees.
C3_INPUTS: Sequence[Sequence[int]] = (
    *(((i + 0) % 6, (i + 1) % 6, (i + 2) % 6) for i in range(6)),
    *(((i + 0) % 6, (i + 1) % 6, (i + 2) % 6, (i + 3) % 6) for i in range(6)),
    *(((i + 0) % 6, (i + 1) % 6, (i + 3) % 6, (i + 4) % 6) for i in range(3)),
    (0, 1, 2, 3, 4, 5),
)


# 1989, section 3.3: each map of H2 sees eight of the twelve maps of H1.
H2_INPUTS: Sequence[Sequence[int]] = tuple(tuple((o + i) % 12 for i in range(8)) for o in range(12))
BACKGROUND = -1.0  # what 1989's images are surrounded with


def squash(x: jax.Array) -> jax.Array:
    """The scaled hyperbolic tangent of 1998's appendix A; f(1) = 1 and f(-1) = -1."""
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


class FeatureExtractor(nn.Module):
    """A 5x5 convolution at stride 2 with a bias for every unit of its maps: layers H1 and H2.

    [N, H, W, C] -> [N, H / 2, W / 2, maps]. Each map sees the inputs that `seen` lists for it; the
    kernel [5, 5, connections] holds those that exist.
    """

    seen: Sequence[Sequence[int]]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        maps, wide = len(self.seen), blocks.at_least_float32(self.dtype)
        inputs = [i for group in self.seen for i in group]
        outputs = [o for o, group in enumerate(self.seen) for _ in group]
        init = blocks.uniform_fan_in(25 * len(self.seen[0]))
        kernel = self.param("kernel", init, (5, 5, len(inputs)), wide)
        full = jnp.zeros((5, 5, x.shape[-1], maps), wide).at[:, :, inputs, outputs].set(kernel)
        x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=BACKGROUND)
        y = conv_general_dilated(
            x,
            full.astype(self.dtype),
            (2, 2),
            ((0, 0), (0, 0)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        bias = self.param("bias", nn.initializers.zeros, y.shape[1:], wide)
        return y + bias.astype(self.dtype)


# -------------------------------------------------------------------------------------- networks
class LeCun1989(Network, kw_only=True):
    """Two layers of feature extractors, then thirty hidden units and the output (figure 2).

    Images [N, H, W, C] of at least 16x16 -> logits [N, num_classes]; `num_classes=0` gives the
    units of H3 [N, 30]. Stages: `H1` and `H2`.
    """

    num_classes: int = 10

    min_size: ClassVar[int] = 16

    @property
    def default_image_size(self) -> int:
        return 16

    @property
    def stages(self) -> tuple[str, ...]:
        return ("H1", "H2")

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        x = pooling.adaptive_avg_pool(x, 16)  # [N, 16, 16, 1]
        all_inputs = (tuple(range(x.shape[-1])),) * 12
        x = squash(FeatureExtractor(all_inputs, self.dtype, name="H1")(x))
        yield "H1", x  # [N, 8, 8, 12]
        x = squash(FeatureExtractor(H2_INPUTS, self.dtype, name="H2")(x))
        yield "H2", x  # [N, 4, 4, 12]

    def head(self, maps: FeatureMaps, train: bool) -> jax.Array:
        x = maps["H2"].reshape(len(maps["H2"]), -1)  # [N, 192]
        init = blocks.uniform_fan_in(192)
        x = squash(blocks.dense(30, kernel_init=init, dtype=self.dtype, name="H3")(x))
        if self.num_classes == 0:
            return x
        return blocks.dense(
            self.num_classes,
            kernel_init=blocks.uniform_fan_in(30),
            dtype=blocks.at_least_float32(self.dtype),
            name="output",
        )(x)


class LeNet5(Network, kw_only=True):
    """Convolution and subsampling twice, then C5, F6 and the output layer (figure 2).

    Images [N, H, W, C] of at least 32x32 -> logits [N, num_classes]; `num_classes=0` gives the
    features of C5 [N, 120]. Stages: `C1`, `S2`, `C3`, `S4`, `C5`.
    """

    num_classes: int = 10

    min_size: ClassVar[int] = 32

    @property
    def default_image_size(self) -> int:
        return 32

    @property
    def stages(self) -> tuple[str, ...]:
        return ("C1", "S2", "C3", "S4", "C5")

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        x = squash(self._conv(6, fan_in=25 * x.shape[-1], name="C1")(x))
        yield "C1", x  # [N, 28, 28, 6]
        x = squash(Subsampling(self.dtype, name="S2")(x))
        yield "S2", x  # [N, 14, 14, 6]
        x = squash(PartialConv(self.dtype, name="C3")(x))
        yield "C3", x  # [N, 10, 10, 16]
        x = squash(Subsampling(self.dtype, name="S4")(x))
        yield "S4", x  # [N, 5, 5, 16]
        x = squash(self._conv(120, fan_in=400, name="C5")(x))
        yield "C5", x  # [N, 1, 1, 120]

    def head(self, maps: FeatureMaps, train: bool) -> jax.Array:
        x = pooling.global_avg_pool(maps["C5"])  # [N, 120]
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


VARIANTS: Variants = {
    "lecun1989": partial(LeCun1989),
    "lenet5": partial(LeNet5),
}
