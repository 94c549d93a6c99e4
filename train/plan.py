"""What will be run: every value concrete, nothing left to a recipe."""

import dataclasses
from typing import Any

from train.errors import UsageError
from train.recipes import Augmentation, ConvInit, HeadInit, Precision, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides the result of a run. A checkpoint fits only the plan it was made under."""

    arch: str
    dataset: str
    data_origin: str  # version and splits
    train_examples: int
    test_examples: int
    num_classes: int
    channels: int
    image_size: int  # pixels
    recipe: str
    batch_size: int  # images, over all devices
    steps: int
    learning_rate: float  # peak
    schedule: Schedule
    warmup_steps: int
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_norm_and_bias: bool
    label_smoothing: float
    dropout_rate: float | None  # None: the network's own
    clip_norm: float  # 0: no limit
    ema_decay: float  # of the average that is evaluated; 0: none
    conv_init: ConvInit = "network"
    head_init: HeadInit
    augmentation: Augmentation
    flip: bool
    seed: int
    precision: Precision
    bn: str  # local, sync or group:N
    remat: bool = False  # whether blocks are computed a second time for the gradient
    weights: str | None = None  # what it starts from
    transfer: str | None = None  # linear_probe, finetune, layerwise or from:STAGE; with weights
    freeze_bn: bool = False  # whether all batch normalisation stays as in the weights
    head_lr_scale: float = 1.0  # multiplies the learning rate of the last layer
    lr_decay: float = 1.0  # of layerwise: multiplies it from stage to stage towards the image

    @classmethod
    def later_fields(cls) -> dict[str, Any]:
        """The fields with defaults: what a plan from before there was one of them had."""
        fields = dataclasses.fields(cls)
        return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}

    @property
    def epochs(self) -> float:
        """Passes over the training images."""
        return self.steps * self.batch_size / self.train_examples

    def bn_group_size(self, devices: int) -> int:
        """How many of the devices share the statistics of batch normalisation.

        Raises:
            UsageError: for anything but local, sync and group:N with N a divisor of `devices`.
        """
        if self.bn == "local":
            return 1
        if self.bn == "sync":
            return devices
        kind, _, number = self.bn.partition(":")
        if kind != "group" or not number.isdecimal() or int(number) < 1:
            raise UsageError(f"--bn={self.bn}: expected local, sync or group:N")
        if devices % int(number):
            they = "1 device" if devices == 1 else f"{devices} devices"
            raise UsageError(f"--bn={self.bn}: {they} cannot be split into groups of {number}")
        return int(number)
