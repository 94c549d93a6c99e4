"""The CIFAR networks of He et al., section 4.2, in PyTorch: torchvision has none.

With the same modules' names as flaxcnn's, so that their weights are the same. Imported in worker
processes alone, where torch is.
"""

import torch
from torch import nn


class Block(nn.Module):
    """A basic block whose shortcut has no parameters ("option A")."""

    def __init__(self, in_channels: int, channels: int, strides: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, strides, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.strides, self.zeros = strides, channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, channels, H / strides, W / strides]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        x = x[:, :, :: self.strides, :: self.strides]
        if self.zeros:
            before = self.zeros // 2
            x = nn.functional.pad(x, (0, 0, 0, 0, before, self.zeros - before))
        return torch.relu(x + y)


class CifarResNet(nn.Module):
    """Depth 6n + 2: a stem and three stages of n blocks; [N, 3, H, W] -> [N, num_classes]."""

    def __init__(self, n: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, n)
        self.layer2 = self._stage(16, 32, 2, n)
        self.layer3 = self._stage(32, 64, 2, n)
        self.fc = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, strides: int, n: int) -> nn.Sequential:
        others = [Block(channels, channels, 1) for _ in range(n - 1)]
        return nn.Sequential(Block(in_channels, channels, strides), *others)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))
