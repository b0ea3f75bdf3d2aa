"""The dense networks that whole-network figures are quoted for, untrained: `[N, 3, H, W]` -> `[N, classes]`, and one of
ratings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekd import models
from sparsekd.models import ResNet as SmallResNet
from sparsekd.models import classifier
from sparsekd.nn import NormReLU


def norms_by_torch(network: nn.Module) -> nn.Module:
    """The network, batch norms, residuals and ReLUs run by torch in training, too."""
    for module in network.modules():
        if isinstance(module, NormReLU):
            module.one_op = False
    return network


def wrn_16_2() -> nn.Module:
    """The CIFAR student of arXiv 2401.10484: 0.1 G multiply-adds at 32 x 32."""
    return classifier("wrn-16-2")


def small_resnet18() -> nn.Module:
    """A ResNet-18 of 16 to 128 channels for images of 28 x 28: 27 M multiply-adds."""
    return SmallResNet((2, 2, 2, 2), 10, (16, 32, 64, 128))


def conv_norm(
    c: int, k: int, size: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = None
) -> nn.Module:
    layers = [nn.Conv2d(c, k, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(k)]
    return nn.Sequential(*layers, *([act()] if act else []))


class ResNet(nn.Module):
    """A stem, stages of blocks whose first one halves the image from the second stage on, the mean, a linear layer."""

    def __init__(
        self,
        stem: nn.Module,
        channels: int,
        stages: Sequence[tuple[int, int]],
        block: type[Bottleneck] | type[Basic],
        classes: int = 1000,
    ) -> None:
        """stages: (width, how many blocks). channels: what the stem gives."""
        super().__init__()
        self.stem = stem
        blocks, c = [], channels
        for stage, (width, count) in enumerate(stages):
            for place in range(count):
                blocks.append(block(c, width, 2 if stage and not place else 1))
                c = block.widening * width
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


def photo_stem() -> nn.Module:
    """Of 224 x 224 images: 64 channels at 56 x 56."""
    return nn.Sequential(conv_norm(3, 64, 7, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1))


def resnet50() -> nn.Module:
    """arXiv 1512.03385, the stride in the 3x3 layers: 4.1 G multiply-adds at 224 x 224."""
    return ResNet(photo_stem(), 64, [(64, 3), (128, 4), (256, 6), (512, 3)], Bottleneck)


def resnet34() -> nn.Module:
    """arXiv 1512.03385: 3.6 G multiply-adds at 224 x 224."""
    return ResNet(photo_stem(), 64, [(64, 3), (128, 4), (256, 6), (512, 3)], Basic)


def wide_resnet_28_10() -> nn.Module:
    """The widths and depths of WRN-28-10 (arXiv 1605.07146) in blocks that normalise after each convolution."""
    return ResNet(conv_norm(3, 16, 3, act=nn.ReLU), 16, [(160, 4), (320, 4), (640, 4)], Basic)


class Bottleneck(nn.Module):
    """relu(1x1, 3x3, 1x1 of four times the width + shortcut)."""

    widening = 4

    def __init__(self, c: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            conv_norm(c, width, 1, act=nn.ReLU),
            conv_norm(width, width, 3, stride, act=nn.ReLU),
            conv_norm(width, 4 * width, 1),
        )
        self.shortcut = conv_norm(c, 4 * width, 1, stride) if c != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.shortcut(x))


class Basic(nn.Module):
    """relu(3x3, 3x3 + shortcut)."""

    widening = 1

    def __init__(self, c: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(conv_norm(c, width, 3, stride, act=nn.ReLU), conv_norm(width, width, 3))
        plain = stride == 1 and c == width
        self.shortcut = nn.Identity() if plain else conv_norm(c, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.shortcut(x))


def vgg16() -> nn.Module:
    """arXiv 1409.1556 with batch norm, and a mean with one linear layer for its head: 15.3 G multiply-adds at 224."""
    layers, c = list[nn.Module](), 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers.append(conv_norm(c, width, 3, act=nn.ReLU))
            c = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1000))


class MobileNetV2(nn.Module):
    """arXiv 1801.04381, width 1: 0.3 G multiply-adds at 224 x 224."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = conv_norm(3, 32, 3, 2, act=nn.ReLU6)
        blocks, c = [], 32
        table = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        for expand, k, count, stride in table:
            for place in range(count):
                blocks.append(InvertedResidual(c, k, expand, stride if place == 0 else 1))
                c = k
        self.blocks, self.last = nn.Sequential(*blocks), conv_norm(c, 1280, 1, act=nn.ReLU6)
        self.head = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.last(self.blocks(self.stem(x))), 1).flatten(1))


class InvertedResidual(nn.Module):
    """1x1 to `expand` times the channels, depthwise 3x3, linear 1x1 (+ x)."""

    def __init__(self, c: int, k: int, expand: int, stride: int) -> None:
        super().__init__()
        wide = c * expand
        first = [conv_norm(c, wide, 1, act=nn.ReLU6)] if expand > 1 else []
        self.inner = nn.Sequential(
            *first, conv_norm(wide, wide, 3, stride, groups=wide, act=nn.ReLU6), conv_norm(wide, k, 1)
        )
        self.residual = stride == 1 and c == k

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) if self.residual else self.inner(x)


@torch.no_grad()
def settle(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Batch norms normalise these inputs as in training: activations of deep random networks then stay of order one."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, std=0.2)
    # Branches add a little to their residual, as after training, so that bf16 keeps up with the depth.
    for block in model.modules():
        if isinstance(block, (Basic, Bottleneck, InvertedResidual)):
            last: Any = block.inner[-1]
            nn.init.uniform_(last[1].weight, 0.1, 0.3)
    model.train()(*inputs)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


RATINGS = {"user_features": 64, "item_features": 64}
Inputs = tuple[Tensor, ...]
Network = tuple[Callable[[], nn.Module], Callable[[int], Inputs], tuple[str, ...]]


def images(size: int, batch: int) -> Inputs:
    return (torch.randn(batch, 3, size, size),)


def ratings(batch: int) -> Inputs:
    return torch.randn(batch, 64), torch.randn(batch, 64), torch.randn(batch)


# Name -> (the network, its inputs at a batch size, what stays dense).
NETWORKS: dict[str, Network] = {
    "resnet18": (small_resnet18, partial(images, 28), ("stem*",)),
    "resnet50": (resnet50, partial(images, 224), ("stem*",)),
    "wrn-16-2": (wrn_16_2, partial(images, 32), ("stem*",)),
    "mobilenetv2": (MobileNetV2, partial(images, 224), ("stem*",)),
    "rating-cnn": (partial(models.RatingCNN, RATINGS, models.STUDENT), ratings, models.RatingCNN.not_pruned),
}
