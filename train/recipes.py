"""Recipes: how each family of networks is trained, one row each.

Learning rates are per 256 images; a run scales them to its batch size (Goyal et al. 2017,
arXiv:1706.02677, section 2.1). A flag of the same name overrules a row's field.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from flaxcnn.registry import FAMILIES

Schedule = Literal["step", "cosine"]
Augmentation = Literal["none", "pad_crop", "resized_crop"]
ConvInit = Literal["network", "he"]
HeadInit = Literal["network", "lecun", "zero"]
Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of one training run."""

    epochs: float
    batch_size: int  # images, over all devices
    learning_rate_per_256: float  # peak, at a batch of 256 images
    schedule: Schedule  # after the warm-up: x0.1 after each third, or half a cosine to zero
    warmup_epochs: float = 0.0  # linear, from zero
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float  # added to the gradient, as torch's SGD does
    decay_norm_and_bias: bool = True  # whether weight decay reaches norm parameters and biases
    label_smoothing: float = 0.0
    dropout_rate: float | None = None  # None: the network's own
    ema_decay: float = 0.0  # per step, of the average that is evaluated and kept; 0: none
    clip_norm: float = 0.0  # largest global norm of the gradient; 0: no limit
    conv_init: ConvInit = "network"  # "he": convolutions start from N(0, 2 / fan_in)
    # "lecun": dense layers start from N(0, 1 / fan_in). "zero": with trained weights, a last layer
    # that is new starts from zero.
    head_init: HeadInit = "network"
    freeze_bn: bool = False  # with trained weights, whether their batch normalisation stays
    augmentation: Augmentation


# torchvision's references: 8 x 32 images, 90 epochs, x0.1 every 30.
_CLASSIC = Recipe(
    epochs=90,
    batch_size=256,
    learning_rate_per_256=0.1,
    schedule="step",
    weight_decay=1e-4,
    augmentation="resized_crop",
)
# Images of 64 pixels and fewer. Without a bound on the gradient the loss of resnet18 on
# Fashion-MNIST leapt to 3.9 as the warm-up ended.
_SMALL = Recipe(
    epochs=20,
    batch_size=128,
    learning_rate_per_256=0.2,
    schedule="cosine",
    warmup_epochs=0.5,
    nesterov=True,
    weight_decay=5e-4,
    decay_norm_and_bias=False,
    clip_norm=1.0,
    augmentation="none",
)

# N(0, 0.01) of 2012 and 2013 was for pixels of 0 to 255: of normalised ones a thousandth is left
# behind ZFNet's convolutions, and its loss did not move in 230 steps. From He's start 90 steps on
# digits reach 90 % of the test images, alexnet's 93 %, alexnet_2012's 76 %, without dropout, whose
# noise these few steps would have to average.
_SMALL_FROM_HE = dataclasses.replace(
    _SMALL,
    batch_size=32,
    learning_rate_per_256=0.08,
    dropout_rate=0.0,
    conv_init="he",
    head_init="lecun",
)

# From trained weights. The statistics of a few hundred steps on few images are worse than those of
# ImageNet: EfficientNet-Lite0 on 500 images of Fashion-MNIST reached 69 to 74 % with the former and
# 81 % with the latter (96 px, ten to fifteen epochs, one run each).
_TRANSFER = Recipe(
    epochs=20,
    batch_size=64,
    learning_rate_per_256=0.2,
    schedule="cosine",
    warmup_epochs=1,
    nesterov=True,
    weight_decay=1e-4,
    decay_norm_and_bias=False,
    clip_norm=1.0,
    head_init="zero",
    freeze_bn=True,
    augmentation="none",
)
# The last layer alone, from zero: features cost nothing, so that a low rate may take its time.
_PROBE = dataclasses.replace(
    _TRANSFER,
    epochs=100,
    learning_rate_per_256=0.012,
    warmup_epochs=0,
    clip_norm=0.0,
    freeze_bn=False,  # it has no training mode anyway
)

# (recipe, family) -> row.
RECIPES: Mapping[tuple[str, str], Recipe] = {
    **{("transfer", family): _TRANSFER for family in FAMILIES},
    **{("probe", family): _PROBE for family in FAMILIES},
    ("classic", "lenet"): dataclasses.replace(_CLASSIC, learning_rate_per_256=0.01),
    ("classic", "alexnet"): dataclasses.replace(_CLASSIC, learning_rate_per_256=0.01),
    ("classic", "zfnet"): dataclasses.replace(_CLASSIC, learning_rate_per_256=0.01),
    ("classic", "googlenet"): dataclasses.replace(_CLASSIC, learning_rate_per_256=0.01),
    ("classic", "resnet"): _CLASSIC,
    ("classic", "resnet_v2"): _CLASSIC,
    ("classic", "efficientnet"): _CLASSIC,
    ("classic", "vgg"): dataclasses.replace(_CLASSIC, learning_rate_per_256=0.01),
    ("small", "lenet"): dataclasses.replace(_SMALL, batch_size=32, learning_rate_per_256=0.1),
    ("small", "alexnet"): _SMALL_FROM_HE,
    ("small", "zfnet"): _SMALL_FROM_HE,
    ("small", "googlenet"): _SMALL,
    ("small", "resnet"): _SMALL,
    ("small", "resnet_v2"): _SMALL,
    ("small", "efficientnet"): _SMALL,
    # Sixteen layers without batch norm learn within a few hundred steps where the dense layers pass
    # the signal on from the first, and the gradient is bounded at a rate as high as this.
    ("small", "vgg"): dataclasses.replace(
        _SMALL,
        epochs=5,
        batch_size=32,
        learning_rate_per_256=0.24,
        dropout_rate=0.0,
        head_init="lecun",
    ),
}
