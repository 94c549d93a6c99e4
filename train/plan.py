"""What will be run: every value concrete, nothing left to a recipe."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from train.errors import UsageError
from train.recipes import Augmentation, ConvInit, HeadInit, Precision, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides the result of a run. A checkpoint fits only the plan it was made under.

    Fields with defaults came later: a plan from before had those.
    """

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
    ema_decay: float = 0.0  # of the average that is evaluated; 0: none
    conv_init: ConvInit = "network"
    head_init: HeadInit
    augmentation: Augmentation
    flip: bool
    seed: int
    precision: Precision
    bn: str  # local, sync or group:N
    # Whether blocks are computed a second time for the gradient; the result is the same.
    remat: bool = dataclasses.field(default=False, compare=False)
    weights: str | None = None  # what it starts from
    transfer: str | None = None  # linear_probe, finetune, layerwise or from:STAGE; with weights
    freeze_bn: bool = False  # whether all batch normalisation stays as in the weights
    head_lr_scale: float = 1.0  # multiplies the learning rate of the last layer
    lr_decay: float = 0.7  # of layerwise: multiplies it from stage to stage towards the image

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """By name, what differs in the plan that a checkpoint says it was made under."""
        fields = dataclasses.fields(self)
        later = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        saved, ours = {**later, **saved}, dataclasses.asdict(self)
        free = {f.name for f in fields if not f.compare}
        return [
            f"{name} {saved.get(name)!r} there, {ours.get(name)!r} here"
            for name in sorted({*saved, *ours} - free)
            if saved.get(name) != ours.get(name)
        ]

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
