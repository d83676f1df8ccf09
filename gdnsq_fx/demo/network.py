"""A small residual network for 8x8 digits."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from gdnsq_fx.demo.seeding import seeded


@final
class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, with ReLU after the sum.

    ReLU stands last, so every convolution of the next block reads values >= 0 (one bit
    then means {0, step}), and every BatchNorm follows a convolution that it folds into.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride=stride, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.shortcut is None else self.shortcut(x)
        return self.relu2(out + identity)


@final
class DigitsNet(nn.Module):
    """A residual network for 8x8 digits: stem, three blocks, mean over space, head.

    Args:
        width: channels of the stem and the first block; the other two have twice as
            many. 32 is enough to stay accurate with one-bit weights and activations.
        seed: fixes the initial weights, whatever the global random state.
    """

    def __init__(self, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(width)
            self.relu = nn.ReLU()
            self.block1 = ResidualBlock(width, width)
            self.block2 = ResidualBlock(width, 2 * width, stride=2)
            self.block3 = ResidualBlock(2 * width, 2 * width)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 1, 8, 8] to logits [B, 10]."""
        x = self.relu(self.bn(self.stem(images)))
        x = self.block3(self.block2(self.block1(x)))
        return self.head(torch.flatten(self.pool(x), 1))
