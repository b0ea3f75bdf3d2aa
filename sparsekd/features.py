"""Features of 2 to 5 dimensions, read as what the losses compare: a mean for each channel and a map of energies.

    [B, C, H, W]      of a convolution: the map is mean_C F^2 over (H, W)
    [B, C, T]         of a 1-D convolution, or of tokens [B, T, C] turned round: a map of one row
    [B, C, D, H, W]   of a 3-D convolution: D maps under each other
    [B, F]            of a linear layer: every unit is a channel, and a position of the map

Channels are dimension 1 throughout; `channels_first` turns what has them last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.attention import layer_stats

__all__ = [
    "FeatureStats",
    "Features",
    "channels_first",
    "check_rank",
    "common_depth",
    "feature_shapes",
    "feature_stats",
    "map_sizes",
    "selected",
    "stats",
    "stats_widths",
    "without_graph",
]


class FeatureStats(NamedTuple):
    """All that the losses read of the tapped features of a network.

    means   [B, sum of channels], layers side by side.
    energy  [B, sum of positions], layers side by side, volumes at their full depth.
    shapes  of each feature without B, channels first.
    """

    means: Tensor
    energy: Tensor
    shapes: tuple[tuple[int, ...], ...]


# What a loss takes of one network: features, channels second, or what was kept of them.
Features = Sequence[Tensor] | FeatureStats


def check_rank(function: str, what: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless a feature of this shape has 2 to 5 dimensions."""
    if not 2 <= len(shape) <= 5:
        raise ValueError(
            f"sparsekd.{function}: {what} must be [B, F], [B, C, T], [B, C, H, W] or [B, C, D, H, W], "
            f"got {tuple(shape)}; tap another layer, or reshape what it returns"
        )


def feature_shapes(features: Features) -> list[tuple[int, ...]]:
    """Of each feature, channels second, whether it is there or only its statistics."""
    if isinstance(features, FeatureStats):
        return [(len(features.means), *shape) for shape in features.shapes]
    return [tuple(feature.shape) for feature in features]


def without_graph(features: Features) -> Features:
    """The same for a side that gets no gradient: a teacher's."""
    return features if isinstance(features, FeatureStats) else [feature.detach() for feature in features]


def common_depth(*sides: Features) -> int:
    """How many maps under each other the 5-D features of all sides are pooled to: the fewest that one of them has, and
    1 beside features without depth."""
    shapes = [shape for features in sides for shape in feature_shapes(features)]
    return min([shape[2] if len(shape) == 5 else 1 for shape in shapes] or [1])


def map_sizes(features: Features, depth: int) -> list[tuple[int, int]]:
    """(height, width) of the energy map of each feature, as `stats` lays it out."""
    return [_map_size(shape, depth) for shape in feature_shapes(features)]


def _map_size(shape: Sequence[int], depth: int) -> tuple[int, int]:
    if len(shape) in (2, 3):
        return 1, shape[-1]
    return (depth if len(shape) == 5 else 1) * shape[-2], shape[-1]


def stats(features: Features, depth: int) -> tuple[Tensor, Tensor]:
    """Means [B, sum of channels] and energies [B, sum of map sizes], layers side by side: see `ops.layer_stats`."""
    taken = features if isinstance(features, FeatureStats) else feature_stats(features)
    if all(len(shape) != 4 or shape[1] == depth for shape in taken.shapes):
        return taken.means, taken.energy
    maps = taken.energy.split([_positions(shape) for shape in taken.shapes], 1)
    parts = [_at_depth(part, shape, depth) for part, shape in zip(maps, taken.shapes, strict=True)]
    return taken.means, torch.cat(parts, 1)


def feature_stats(features: Sequence[Tensor]) -> FeatureStats:
    """The statistics of features, each of which is read once."""
    means, energy = layer_stats([_as_image(feature) for feature in features])
    if any(feature.dim() == 2 for feature in features):
        pixels = [math.prod(feature.shape[2:]) for feature in features]
        parts = zip(features, energy.split(pixels, 1), strict=True)
        # Of [B, F] every unit is a position, and not one map over all of them.
        energy = torch.cat([f.to(part.dtype).square() if f.dim() == 2 else part for f, part in parts], 1)
    return FeatureStats(means, energy, tuple(tuple(feature.shape[1:]) for feature in features))


def selected(taken: FeatureStats, places: Sequence[int]) -> FeatureStats:
    """The statistics of some of the layers, in this order."""
    if list(places) == list(range(len(taken.shapes))):
        return taken
    means = taken.means.split([shape[0] for shape in taken.shapes], 1)
    maps = taken.energy.split([_positions(shape) for shape in taken.shapes], 1)
    return FeatureStats(
        torch.cat([means[place] for place in places], 1),
        torch.cat([maps[place] for place in places], 1),
        tuple(taken.shapes[place] for place in places),
    )


def stats_widths(shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Columns of the means and of the energies of features [B, *shape]."""
    return sum(shape[0] for shape in shapes), sum(_positions(shape) for shape in shapes)


def _positions(shape: Sequence[int]) -> int:
    """Of the whole map of a feature [B, *shape]."""
    return shape[0] if len(shape) == 1 else math.prod(shape[1:])


def _as_image(feature: Tensor) -> Tensor:
    """As [B, C, H, W]; a unit of [B, F] is a channel of one pixel."""
    if feature.dim() == 2:
        return feature[:, :, None, None]
    if feature.dim() == 3:
        return feature.unsqueeze(2)
    return feature.flatten(2, 3) if feature.dim() == 5 else feature


def _at_depth(energy: Tensor, shape: Sequence[int], depth: int) -> Tensor:
    if len(shape) != 4 or shape[1] == depth:
        return energy
    slices = energy.unflatten(1, (shape[1], -1)).transpose(1, 2)  # [B, H * W, D]
    return F.adaptive_avg_pool1d(slices, depth).transpose(1, 2).flatten(1)


def channels_first(feature: Tensor, last: bool | None) -> Tensor:
    """The feature with its channels as dimension 1, if they are the ``last``."""
    return feature.movedim(-1, 1) if last and feature.dim() > 2 else feature
