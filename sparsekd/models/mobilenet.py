"""A MobileNetV2 (Sandler et al., arXiv 1801.04381) for 32-pixel images: three strides of 2 instead of five."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import Classifier, start_he

# Expansion, output channels, blocks, stride of the first: Table 2 of the paper, with stride 1 in the second row.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down without activation: [B, C, H, W] -> [B, K, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        wide = in_channels * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion > 1:
            self.expand = _conv(in_channels, wide, 1)
        self.depthwise = _conv(wide, wide, 3, stride, groups=wide)
        self.project = nn.Conv2d(wide, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.project(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class MobileNetV2(Classifier):
    """Images [B, 3, H, W] -> logits [B, classes]; `width` scales all channels (to multiples of 8).

    Taps: block outputs have no activation, so what is tapped is the ReLU6 after the expansion that reads the last block
    of each stage, and the one of the last convolution.
    """

    # A depthwise convolution has one input for each output: a block of 16 x 1 would be one sixteenth full.
    not_pruned = ("stem.0", "*.depthwise.0", "head")

    def __init__(self, classes: int = 100, width: float = 1.0):
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, int(channels * width + 4) // 8 * 8)

        channels = scaled(32)
        self.stem = _conv(3, channels, 3)
        blocks: list[nn.Module] = []
        self._stage_starts: list[int] = []
        for expansion, out, count, stride in STAGES:
            self._stage_starts.append(len(blocks))
            for place in range(count):
                blocks.append(InvertedResidual(channels, scaled(out), 1 if place else stride, expansion))
                channels = scaled(out)
        self.blocks = nn.Sequential(*blocks)
        self.last = _conv(channels, scaled(1280), 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(scaled(1280), classes)
        start_he(self)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return (*(f"blocks.{start}.expand.2" for start in self._stage_starts[2:]), "last.2")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.last(self.blocks(self.stem(x)))).flatten(1))


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )
