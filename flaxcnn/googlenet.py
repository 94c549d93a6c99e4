"""GoogLeNet: "Going Deeper with Convolutions".

Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke and Rabinovich, CVPR 2015,
arXiv:1409.4842: `googlenet_v1` is the network of table 1 and figure 3, `googlenet` torchvision's.

Deviations of `googlenet_v1` from the paper:
- weights start from He's normal initialisation by fan-in; the paper does not say how its start;
- the auxiliary classifiers' pools, 5x5 at stride 3 of 14x14 maps, are followed by adaptive ones
  where other image sizes give other maps.

Deviations of `googlenet` from the paper, all torchvision's:
- batch normalisation behind each convolution, which then has no bias, and no response
  normalisation;
- the 5x5 convolutions are 3x3 (https://github.com/pytorch/vision/issues/906);
- the fourth max pool is 2x2, and dropout before the classifier 0.2 where the paper has 0.4;
- with `transform_input` images normalised by ImageNet's mean and deviation are normalised to
  [-1, 1] instead, as the published weights want (https://github.com/pytorch/vision/issues/4136).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn import blocks, pooling
from flaxcnn.network import FeatureMaps, Network, Variants


class GoogLeNetOutput(NamedTuple):
    """What training returns, each [N, num_classes]; the order is torchvision's."""

    logits: jax.Array
    aux_logits2: jax.Array | None
    aux_logits1: jax.Array | None


class Widths(NamedTuple):
    """Output channels of an inception's convolutions: a row of table 1."""

    conv1: int
    reduce3: int  # the 1x1 convolution before the 3x3
    conv3: int
    reduce5: int  # the 1x1 convolution before the 5x5
    conv5: int
    pool_proj: int  # the 1x1 convolution behind the max pool


# Table 1.
INCEPTIONS: Mapping[str, Widths] = {
    "inception3a": Widths(64, 96, 128, 16, 32, 32),
    "inception3b": Widths(128, 128, 192, 32, 96, 64),
    "inception4a": Widths(192, 96, 208, 16, 48, 64),
    "inception4b": Widths(160, 112, 224, 24, 64, 64),
    "inception4c": Widths(128, 128, 256, 24, 64, 64),
    "inception4d": Widths(112, 144, 288, 32, 64, 64),
    "inception4e": Widths(256, 160, 320, 32, 128, 128),
    "inception5a": Widths(256, 160, 320, 32, 128, 128),
    "inception5b": Widths(384, 192, 384, 48, 128, 128),
}
STAGES = (
    *("conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
    *("inception5a", "inception5b"),
)
AUX_DROPOUT_RATE = 0.7  # section 5

ConvFactory = Callable[..., nn.Module]  # (channels, size, strides=, padding=, name=)


# ------------------------------------------------------------------------- blocks with batch norm
class BasicConv2d(nn.Module):
    """Convolution, batch norm and ReLU: [N, H, W, C] -> [N, H', W', channels]."""

    channels: int
    size: int
    norm: blocks.NormFactory  # knows already whether it trains, and its dtype
    dtype: DTypeLike
    strides: int = 1
    padding: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = blocks.conv(
            self.channels,
            self.size,
            strides=self.strides,
            padding=self.padding,
            kernel_init=nn.initializers.normal(0.01),
            dtype=self.dtype,
            name="conv",
        )(x)
        return blocks.norm_relu(self.norm(name="bn"), x)


class Inception(nn.Module):
    """Four branches side by side (figure 2b), its 5x5 convolution a 3x3.

    [N, H, W, C] -> [N, H, W, conv1 + conv3 + conv5 + pool_proj].
    """

    widths: Widths
    conv: ConvFactory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths, conv = self.widths, self.conv
        branch1 = conv(widths.conv1, 1, name="branch1")(x)
        branch2 = conv(widths.reduce3, 1, name="branch2_0")(x)
        branch2 = conv(widths.conv3, 3, padding=1, name="branch2_1")(branch2)
        branch3 = conv(widths.reduce5, 1, name="branch3_0")(x)
        branch3 = conv(widths.conv5, 3, padding=1, name="branch3_1")(branch3)
        branch4 = pooling.max_pool(x, 3, 1, padding=1, ceil_mode=True)
        branch4 = conv(widths.pool_proj, 1, name="branch4_1")(branch4)
        return jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1)


class InceptionAux(nn.Module):
    """An auxiliary classifier (section 5): [N, H, W, C] -> logits [N, num_classes]."""

    num_classes: int
    conv: ConvFactory
    dropout: nn.Module
    dtype: DTypeLike

    flattened: ClassVar[tuple[int, int, int]] = (128, 4, 4)  # (C, H, W) before fc1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = pooling.adaptive_avg_pool(x, 4)  # [N, 4, 4, 512]
        x = self.conv(128, 1, name="conv")(x)
        x = x.reshape(x.shape[0], -1)  # [N, 2048]
        x = blocks.relu(_dense(x, 1024, dtype=self.dtype, name="fc1"))
        x = self.dropout(x)
        return _dense(x, self.num_classes, dtype=blocks.at_least_float32(self.dtype), name="fc2")


def _dense(x: jax.Array, features: int, *, dtype: DTypeLike, name: str) -> jax.Array:
    """torchvision draws the weights anew and leaves torch's default in the biases."""
    return blocks.dense(
        features,
        kernel_init=nn.initializers.normal(0.01),
        bias_init=blocks.uniform_fan_in(x.shape[-1]),
        dtype=dtype,
        name=name,
    )(x)


class GoogLeNet(Network, kw_only=True):
    """torchvision's GoogLeNet, with batch normalisation.

    Images [N, H, W, C] of at least 15x15 -> logits [N, num_classes]; in training a
    `GoogLeNetOutput`, whose auxiliary logits are None without `aux_logits`. `num_classes=0` gives
    the pooled features [N, 1024], always. Stages: torchvision's modules, `conv1` to `inception5b`.

    `init` makes the auxiliary classifiers' parameters whatever `train` is.

    Raises:
        ValueError: for smaller images, and with `transform_input` for other than three channels.
    """

    aux_logits: bool = True
    transform_input: bool = False
    dropout_rate: float = 0.2
    aux_dropout_rate: float = AUX_DROPOUT_RATE
    norm: blocks.NormFactory = blocks.BatchNorm

    min_size: ClassVar[int] = 15
    flattened: ClassVar[Mapping[str, tuple[int, int, int]]] = {
        "aux1.fc1": InceptionAux.flattened,
        "aux2.fc1": InceptionAux.flattened,
    }

    @property
    def stages(self) -> tuple[str, ...]:
        return STAGES

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        conv, pool = self._conv(train), partial(pooling.max_pool, ceil_mode=True)
        if self.transform_input:
            x = _renormalised(x)
        x = conv(64, 7, strides=2, padding=3, name="conv1")(x)
        yield "conv1", x  # [N, 112, 112, 64]
        x = pool(x, 3, 2)
        yield "maxpool1", x  # [N, 56, 56, 64]
        x = conv(64, 1, name="conv2")(x)
        yield "conv2", x
        x = conv(192, 3, padding=1, name="conv3")(x)
        yield "conv3", x
        x = pool(x, 3, 2)
        yield "maxpool2", x  # [N, 28, 28, 192]
        for stage in STAGES[5:]:
            if stage == "maxpool3":
                x = pool(x, 3, 2)  # [N, 14, 14, 480]
            elif stage == "maxpool4":
                x = pool(x, 2, 2)  # [N, 7, 7, 832]
            else:
                x = Inception(INCEPTIONS[stage], conv, name=stage)(x)
            yield stage, x

    def head(self, maps: FeatureMaps, train: bool) -> Any:
        x = pooling.global_avg_pool(maps["inception5b"])  # [N, 1024]
        if self.num_classes == 0:
            return x
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        logits = _dense(
            x, self.num_classes, dtype=blocks.at_least_float32(self.dtype), name="fc"
        )  # fmt: skip
        aux1 = aux2 = None
        if self.aux_logits and (train or self.is_initializing()):
            aux = partial(
                InceptionAux,
                self.num_classes,
                conv=self._conv(train),
                dropout=nn.Dropout(self.aux_dropout_rate, deterministic=not train, parent=None),
                dtype=self.dtype,
            )
            aux1 = aux(name="aux1")(maps["inception4a"])
            aux2 = aux(name="aux2")(maps["inception4d"])
        if not train:
            return logits
        return GoogLeNetOutput(logits=logits, aux_logits2=aux2, aux_logits1=aux1)

    def _conv(self, train: bool) -> ConvFactory:
        norm = partial(
            self.norm, use_running_average=not train, epsilon=1e-3, dtype=self.dtype
        )  # fmt: skip
        return partial(BasicConv2d, norm=norm, dtype=self.dtype)


# From ImageNet's mean and deviation of each channel to mean and deviation 0.5.
_SCALE = np.array([0.229, 0.224, 0.225]) / 0.5
_SHIFT = (np.array([0.485, 0.456, 0.406]) - 0.5) / 0.5


def _renormalised(x: jax.Array) -> jax.Array:
    if x.shape[-1] != 3:
        raise ValueError(f"transform_input is for images of three channels; got {x.shape[-1]}")
    return (x * _SCALE + _SHIFT).astype(x.dtype)


def without_transform_input(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the same network with `transform_input` off: its first layer does that.

    Equal to before, but for the images' margin, where the zeros of the padding are not shifted.
    """
    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    kernel = params["conv1"]["conv"]["kernel"]
    params["conv1"] = {**params["conv1"], "conv": {"kernel": kernel * _SCALE[:, None]}}
    norm = stats["conv1"]["bn"]
    shifted = (kernel * _SHIFT[:, None]).sum((0, 1, 2))
    stats["conv1"] = {"bn": {**norm, "mean": norm["mean"] - shifted}}
    return {**variables, "params": params, "batch_stats": stats}


# ------------------------------------------------------------------------------ blocks of the paper
class InceptionV1(nn.Module):
    """Four branches side by side (figure 2b): [N, H, W, C] -> [N, H, W, sum of the outputs]."""

    widths: Widths
    conv: ConvFactory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths, conv = self.widths, self.conv
        branch1 = blocks.relu(conv(widths.conv1, 1, name="conv1")(x))
        branch3 = blocks.relu(conv(widths.reduce3, 1, name="reduce3")(x))
        branch3 = blocks.relu(conv(widths.conv3, 3, padding=1, name="conv3")(branch3))
        branch5 = blocks.relu(conv(widths.reduce5, 1, name="reduce5")(x))
        branch5 = blocks.relu(conv(widths.conv5, 5, padding=2, name="conv5")(branch5))
        pooled = pooling.max_pool(x, 3, 1, padding=1)
        pooled = blocks.relu(conv(widths.pool_proj, 1, name="pool_proj")(pooled))
        return jnp.concatenate([branch1, branch3, branch5, pooled], axis=-1)


class AuxV1(nn.Module):
    """An auxiliary classifier (section 5): [N, H, W, C] -> logits [N, num_classes]."""

    num_classes: int
    conv: ConvFactory
    dropout: nn.Module
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if min(x.shape[1:3]) >= 5:
            x = nn.avg_pool(x, (5, 5), (3, 3))
        x = pooling.adaptive_avg_pool(x, 4)  # as it is at 224: [N, 4, 4, 512]
        x = blocks.relu(self.conv(128, 1, name="conv")(x))
        x = x.reshape(x.shape[0], -1)  # [N, 2048]
        init = nn.initializers.he_normal()
        x = blocks.relu(blocks.dense(1024, kernel_init=init, dtype=self.dtype, name="fc1")(x))
        x = self.dropout(x)
        wide = blocks.at_least_float32(self.dtype)
        return blocks.dense(self.num_classes, kernel_init=init, dtype=wide, name="fc2")(x)


class GoogLeNetV1(Network, kw_only=True):
    """The paper's network: true 5x5 convolutions, response normalisation, no batch norm.

    Images [N, H, W, C] of at least 31x31 -> logits [N, num_classes]; in training a
    `GoogLeNetOutput`, whose auxiliary logits are None without `aux_logits`. `num_classes=0` gives
    the pooled features [N, 1024], always. Stages: `conv1` to `inception5b`.

    `init` makes the auxiliary classifiers' parameters whatever `train` is.
    """

    aux_logits: bool = True
    dropout_rate: float = 0.4  # table 1
    aux_dropout_rate: float = AUX_DROPOUT_RATE

    min_size: ClassVar[int] = 31

    @property
    def stages(self) -> tuple[str, ...]:
        return STAGES

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        conv, pool = self._conv(), partial(pooling.max_pool, ceil_mode=True)
        x = blocks.relu(conv(64, 7, strides=2, padding=3, name="conv1")(x))
        yield "conv1", x  # [N, 112, 112, 64]
        x = blocks.local_response_norm(pool(x, 3, 2))
        yield "maxpool1", x  # [N, 56, 56, 64]
        x = blocks.relu(conv(64, 1, name="conv2")(x))
        yield "conv2", x
        x = blocks.local_response_norm(blocks.relu(conv(192, 3, padding=1, name="conv3")(x)))
        yield "conv3", x
        x = pool(x, 3, 2)
        yield "maxpool2", x  # [N, 28, 28, 192]
        for stage in STAGES[5:]:
            if stage.startswith("maxpool"):
                x = pool(x, 3, 2)  # [N, 14, 14, 480], [N, 7, 7, 832]
            else:
                x = InceptionV1(INCEPTIONS[stage], conv, name=stage)(x)
            yield stage, x

    def head(self, maps: FeatureMaps, train: bool) -> Any:
        x = pooling.global_avg_pool(maps["inception5b"])  # [N, 1024]
        if self.num_classes == 0:
            return x
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        wide = blocks.at_least_float32(self.dtype)
        init = nn.initializers.he_normal()
        logits = blocks.dense(self.num_classes, kernel_init=init, dtype=wide, name="fc")(x)
        aux1 = aux2 = None
        if self.aux_logits and (train or self.is_initializing()):
            aux = partial(
                AuxV1,
                self.num_classes,
                conv=self._conv(),
                dropout=nn.Dropout(self.aux_dropout_rate, deterministic=not train, parent=None),
                dtype=self.dtype,
            )
            aux1 = aux(name="aux1")(maps["inception4a"])
            aux2 = aux(name="aux2")(maps["inception4d"])
        if not train:
            return logits
        return GoogLeNetOutput(logits=logits, aux_logits2=aux2, aux_logits1=aux1)

    def _conv(self) -> ConvFactory:
        return partial(
            blocks.conv, use_bias=True, kernel_init=nn.initializers.he_normal(), dtype=self.dtype
        )


VARIANTS: Variants = {
    "googlenet": partial(GoogLeNet),
    "googlenet_v1": partial(GoogLeNetV1),
}
