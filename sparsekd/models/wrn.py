"""Wide residual networks for 32-pixel images (Zagoruyko & Komodakis, arXiv 1605.07146): WRN-40-2, WRN-16-2 and others.

A block adds to a sum that no activation has touched; what a layer really sees of it is relu(bn(sum)), so these are the
taps: the sum after every block, through the batch norm and ReLU of what comes next (arXiv 2102.02973 taps the same).
"""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import NormReLU
from .layers import Classifier, start_he


class WideBlock(nn.Module):
    """Pre-activation block: [B, C, H, W] -> [B, K, H/stride, W/stride]; a changed shape is projected after the ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = NormReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = NormReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(x, self.bn1)
        y = self.conv2(self.relu2(self.conv1(active), self.bn2))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(Classifier):
    """WRN-depth-width: images [B, 3, H, W] -> logits [B, classes]; depth = 6 n + 4 for n blocks a stage."""

    def __init__(self, depth: int, width: int, classes: int = 100):
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        if rest or count < 1:
            raise ValueError(f"sparsekd.models: the depth of a WRN is 6 n + 4 (16, 22, 28, 40), got {depth}")
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks, channels = [], 16
        for stage in range(3):
            for place in range(count):
                wide = 16 * width * 2**stage
                blocks.append(WideBlock(channels, wide, stride=2 if stage and not place else 1))
                channels = wide
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = NormReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)
        start_he(self)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return (*(f"blocks.{i}.relu1" for i in range(1, len(self.blocks))), "relu")

    def forward(self, x: Tensor) -> Tensor:
        features = self.relu(self.blocks(self.stem(x)), self.bn)
        return self.head(self.pool(features).flatten(1))
