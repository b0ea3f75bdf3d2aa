"""What the networks share."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..nn import NormReLU


class Classifier(nn.Module):
    """Images [B, 3, H, W] -> logits [B, classes]; the last layer is `head`.

    `tap_names` are the modules whose outputs are the post-activation feature maps to distil, shallow to deep.
    `not_pruned` are the first and the last layer: small, and everything else depends on them.
    """

    not_pruned: tuple[str, ...] = ("stem", "head")

    @property
    def tap_names(self) -> tuple[str, ...]:
        raise NotImplementedError


class ConvNormReLU(nn.Sequential):
    """A convolution, its batch norm and ReLU, which gets the norm; a slice of it is a sequence as any other."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if len(self) != 3:
            return super().forward(x)
        conv, norm, relu = self
        return relu(conv(x), norm)


def conv_norm_relu(conv: nn.Conv2d) -> ConvNormReLU:
    return ConvNormReLU(conv, nn.BatchNorm2d(conv.out_channels), NormReLU())


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)): [B, C, H, W] -> [B, K, H/stride, W/stride] (He et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = NormReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = NormReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu1(self.conv1(x), self.bn1))
        return self.relu2(y, self.bn2, self.shortcut(x))


def start_he(model: nn.Module) -> None:
    """Convolutions normal, variance 2 / (outputs x kernel area) (He et al. 2015, fan out); the bias of `head` zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
