"""One CNN for every rating task: interaction maps, a small residual network on them, one rating out.

Maps: two sides are projected to C vectors of length S each; their outer products are C maps of S x S, in which a
convolution sees every pair of dimensions (ConvNCF: He et al., Outer Product-based Neural Collaborative Filtering,
IJCAI 2018, equation 2). Rating tasks put the user on one side and the item on the other; tasks with one feature vector
project it to both. The first-order part (running biases, a linear term) goes straight to the output, so that the CNN
starts from the bias predictor and learns what it misses. Where it pays, the linear term is a ridge regression in closed
form and stays fixed.

Unlike ConvNCF there is no table of ids: a user is what they rated so far, an item is its content and what it got. Split
by time, a third (MovieTweetings) to nine tenths (MovieLens) of the test ratings come from users no table has seen, and
a table fitted on train only learnt single ratings by heart: it won nothing on MovieTweetings and lost on MovieLens.

`model(*inputs) -> [B]`, in units of the target. `model.tap_names` are the modules whose outputs are the post-ReLU
feature maps to distil, shallow to deep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import BasicBlock, conv_norm_relu


@dataclass(frozen=True)
class Shape:
    """Sizes of a network: C maps of S x S, channels of the stages at S/2 and at S/4, blocks in each."""

    maps: int = 8
    side: int = 16
    widths: tuple[int, int] = (32, 64)
    blocks: tuple[int, int] = (1, 1)


# These layers have one output each (a first-order model, and a sum over channels): a block of 16 outputs would be
# mostly padding.
NOT_PRUNED = ("linear", "cnn.head")


class MapCNN(nn.Module):
    """Residual network on interaction maps: left [B, C*S], right [B, C*S] -> [B]."""

    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        self.shape = shape
        self.channels_last = False  # whether evaluation has this layout; training always has
        self.stem = conv_norm_relu(nn.Conv2d(shape.maps, shape.widths[0], 3, 2, 1, bias=False))
        blocks, channels = [], shape.widths[0]
        for stage, (width, count) in enumerate(zip(shape.widths, shape.blocks, strict=True)):
            for place in range(count):
                blocks.append(BasicBlock(channels, width, stride=2 if stage and not place else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return ("stem.2", *(f"blocks.{i}.relu2" for i in range(len(self.blocks))))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        size = (self.shape.maps, self.shape.side)
        left, right = left.unflatten(1, size), right.unflatten(1, size)
        if self.training or self.channels_last:  # what follows keeps this layout, in which large batches are faster
            left, right = left.mT.contiguous(), right.mT.contiguous()  # [B, S, C]
            maps = (left.unsqueeze(2) * right.unsqueeze(1)).permute(0, 3, 1, 2)
        else:
            maps = left.unsqueeze(3) * right.unsqueeze(2)  # [B, C, S, S]
        pooled = self.pool(self.blocks(self.stem(maps))).flatten(1)
        return self.head(self.dropout(pooled)).squeeze(1)


@contextmanager
def in_training_layout(model: nn.Module) -> Iterator[None]:
    """Evaluation in the layout of training: of large batches in half the time. Networks without maps are left alone."""
    cnns = [module for module in model.modules() if isinstance(module, MapCNN)]
    before = [cnn.channels_last for cnn in cnns]
    for cnn in cnns:
        cnn.channels_last = True
    try:
        yield
    finally:
        for cnn, layout in zip(cnns, before, strict=True):
            cnn.channels_last = layout


class RatingCNN(nn.Module):
    """Rating of an item: (user_features [B, Fu], item_features [B, Fi], prior [B]) -> [B]."""

    not_pruned = NOT_PRUNED

    def __init__(self, sizes: dict[str, int], shape: Shape, dropout: float = 0.0):
        super().__init__()
        width = shape.maps * shape.side
        self.user_side = nn.Linear(sizes["user_features"], width)
        self.item_side = nn.Linear(sizes["item_features"], width)
        self.linear = _zeroed(nn.Linear(sizes["user_features"] + sizes["item_features"], 1))
        self.cnn = MapCNN(shape, dropout)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return tuple(f"cnn.{name}" for name in self.cnn.tap_names)

    def forward(self, user_features: Tensor, item_features: Tensor, prior: Tensor) -> Tensor:
        first_order = prior + self.linear(torch.cat([user_features, item_features], 1)).squeeze(1)
        return first_order + self.cnn(self.user_side(user_features), self.item_side(item_features))


class FeatureCNN(nn.Module):
    """Target from one feature vector: features [B, F] -> [B]. `mean` is where the prediction starts."""

    not_pruned = NOT_PRUNED

    def __init__(
        self, sizes: dict[str, int], shape: Shape, mean: float, dropout: float = 0.0, input_dropout: float = 0.0
    ):
        super().__init__()
        width = shape.maps * shape.side
        self.input_dropout = nn.Dropout(input_dropout)
        self.left_side = nn.Linear(sizes["features"], width)
        self.right_side = nn.Linear(sizes["features"], width)
        self.linear = _zeroed(nn.Linear(sizes["features"], 1))
        nn.init.constant_(self.linear.bias, mean)
        self.cnn = MapCNN(shape, dropout)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return tuple(f"cnn.{name}" for name in self.cnn.tap_names)

    def forward(self, features: Tensor) -> Tensor:
        seen = self.input_dropout(features)
        return self.linear(features).squeeze(1) + self.cnn(self.left_side(seen), self.right_side(seen))


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
