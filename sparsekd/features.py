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

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.attention import layer_stats

__all__ = ["channels_first", "check_rank", "common_depth", "map_sizes", "stats"]


def check_rank(function: str, what: str, feature: Tensor) -> None:
    """Raise ValueError unless the feature has 2 to 5 dimensions."""
    if not 2 <= feature.dim() <= 5:
        raise ValueError(
            f"sparsekd.{function}: {what} must be [B, F], [B, C, T], [B, C, H, W] or [B, C, D, H, W], "
            f"got {tuple(feature.shape)}; tap another layer, or reshape what it returns"
        )


def common_depth(*sides: Sequence[Tensor]) -> int:
    """How many maps under each other the 5-D features of all sides are pooled to: the fewest that one of them has, and
    1 beside features without depth."""
    return min([feature.shape[2] if feature.dim() == 5 else 1 for features in sides for feature in features] or [1])


def map_sizes(features: Sequence[Tensor], depth: int) -> list[tuple[int, int]]:
    """(height, width) of the energy map of each feature, as `stats` lays it out."""
    return [_map_size(feature, depth) for feature in features]


def _map_size(feature: Tensor, depth: int) -> tuple[int, int]:
    if feature.dim() in (2, 3):
        return 1, feature.shape[-1]
    return (depth if feature.dim() == 5 else 1) * feature.shape[-2], feature.shape[-1]


def stats(features: Sequence[Tensor], depth: int) -> tuple[Tensor, Tensor]:
    """Means [B, sum of channels] and energies [B, sum of map sizes], layers side by side: see `ops.layer_stats`."""
    means, energy = layer_stats([_as_image(feature) for feature in features])
    if all(feature.dim() in (3, 4) for feature in features):
        return means, energy
    pixels = [math.prod(f.shape[2:]) for f in features]
    parts = [_energy(f, part, depth) for f, part in zip(features, energy.split(pixels, 1), strict=True)]
    return means, torch.cat(parts, 1)


def _as_image(feature: Tensor) -> Tensor:
    """As [B, C, H, W]; a unit of [B, F] is a channel of one pixel."""
    if feature.dim() == 2:
        return feature[:, :, None, None]
    if feature.dim() == 3:
        return feature.unsqueeze(2)
    return feature.flatten(2, 3) if feature.dim() == 5 else feature


def _energy(feature: Tensor, energy: Tensor, depth: int) -> Tensor:
    if feature.dim() == 2:
        return feature.to(energy.dtype).square()
    if feature.dim() == 5 and feature.shape[2] != depth:
        slices = energy.unflatten(1, (feature.shape[2], -1)).transpose(1, 2)  # [B, H * W, D]
        return F.adaptive_avg_pool1d(slices, depth).transpose(1, 2).flatten(1)
    return energy


def channels_first(feature: Tensor, last: bool | None) -> Tensor:
    """The feature with its channels as dimension 1, if they are the ``last``."""
    return feature.movedim(-1, 1) if last and feature.dim() > 2 else feature
