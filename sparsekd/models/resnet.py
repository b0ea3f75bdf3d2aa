"""ResNet-18 and ResNet-34 (He et al., arXiv 1512.03385) for 32-pixel images: a 3x3 stem of stride 1, no pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .layers import BasicBlock, Classifier, conv_norm_relu, start_he


class ResNet(Classifier):
    """Images [B, 3, H, W] -> logits [B, classes]; `blocks` says how many blocks each stage has. Taps: every block."""

    not_pruned = ("stem.0", "head")

    def __init__(self, blocks: Sequence[int], classes: int = 100, widths: Sequence[int] = (64, 128, 256, 512)):
        super().__init__()
        self.stem = conv_norm_relu(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False))
        layers, channels = [], widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for place in range(count):
                layers.append(BasicBlock(channels, width, stride=2 if stage and not place else 1))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)
        start_he(self)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return tuple(f"blocks.{i}.relu2" for i in range(len(self.blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))
