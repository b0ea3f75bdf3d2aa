"""Attention maps of convolutional features: their statistics, their normalised form and their matching.

B images, C channels, H x W pixels, T teacher layers, S student layers.

A distillation loss touches the feature maps themselves only in `feature_stats`; all that follows works on tensors
smaller by a factor of C. `feature_stats` is thus the one step worth a fused kernel, `match_maps` a distant second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-12  # of the L2 norm, as in the published code of both AFD and AT


def feature_stats(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over pixels and energy map of a feature tensor: everything SAD and AT need to know about it.

    features: [B, C, H, W], floating point, contiguous or channels_last.
    Returns means [B, C] and energy [B, H*W]; both in float32 for half types, otherwise in the dtype of `features`.
    The energy is the attention map of Zagoruyko & Komodakis (arXiv 1612.03928), as a mean over channels.

    Equivalent to:

        means = features.mean((2, 3))
        energy = features.square().mean(1).flatten(1)

    Raises ValueError for a tensor that is not 4-D and TypeError for one that is not floating point.
    """
    if features.dim() != 4:
        raise ValueError(
            "sparsekd.feature_stats: features must be [B, C, H, W], "
            f"got {tuple(features.shape)}; add unit dimensions for H or W, or tap another layer"
        )
    if not features.is_floating_point():
        raise TypeError(
            f"sparsekd.feature_stats: features must be floating point, got {features.dtype}; tap another layer"
        )
    means, energy = _FeatureStats.apply(features)
    return means, energy


class _FeatureStats(torch.autograd.Function):
    """Autograd would keep and build full-size tensors for every step; the gradient is one broadcast multiply-add.

    d features = d means / (H*W) + 2 * features * d energy / C
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(features)
        features = _accumulation_dtype(features)
        # A sum divided afterwards: the division then runs over H*W values, not over C*H*W.
        energy = features.square().sum(1) / features.shape[1]
        return features.mean((2, 3)), energy.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad_means, grad_energy = grads
        (features,) = ctx.saved_tensors
        batch, channels, height, width = features.shape
        per_channel = (grad_means / (height * width)).view(batch, channels, 1, 1)
        per_pixel = grad_energy.reshape(batch, 1, height, width)
        grad = torch.addcmul(per_channel, _accumulation_dtype(features), per_pixel, value=2 / channels)
        return grad.to(features.dtype)


def _accumulation_dtype(features: Tensor) -> Tensor:
    """Half types as float32: squares above 255 overflow float16, and bfloat16 sums stop growing after 256 terms."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


def normalize_map(energy: Tensor) -> Tensor:
    """Energy maps [..., H*W] scaled to unit L2 norm over the last dimension; an all-zero map stays zero."""
    return F.normalize(energy, dim=-1, eps=_EPS)


def match_maps(attention: Tensor, teacher_maps: Sequence[Tensor], student_maps: Sequence[Tensor]) -> Tensor:
    """Attention-weighted squared distance between every teacher map and every student map.

    attention: [B, T, S], the weight of each pair. teacher_maps: T energy maps [B, H_t, W_t]; student_maps: S energy
    maps [B, H_s, W_s], floating point. A student map is average-pooled to the size of the teacher map it meets, then
    both are L2-normalised. Returns the scalar of AFD's loss (arXiv 2102.02973):

        sum_t mean_b sum_s attention[b, t, s] * mean_hw (student[b, s -> t] - teacher[b, t])^2

    Pooling runs once for each distinct teacher size, not once for each pair. The teacher maps get no gradient.
    """
    expected = (attention.shape[0], len(teacher_maps), len(student_maps))
    if tuple(attention.shape) != expected:
        raise ValueError(
            f"sparsekd.match_maps: attention must be [B, T, S] = {expected}, got {tuple(attention.shape)}; "
            "pass one teacher map for each T and one student map for each S"
        )
    layers_of_size: dict[tuple[int, int], list[int]] = {}
    for layer, teacher_map in enumerate(teacher_maps):
        layers_of_size.setdefault((teacher_map.shape[1], teacher_map.shape[2]), []).append(layer)

    loss = attention.new_zeros(())
    for (height, width), layers in layers_of_size.items():
        teacher = torch.stack([teacher_maps[layer].detach().flatten(1) for layer in layers], 1)  # [B, T', HW]
        student = torch.stack([_pool(student_map, height, width) for student_map in student_maps], 1)  # [B, S, HW]
        # cdist forms every pair's difference without keeping any of them: [B, T', S], exact also for equal maps,
        # which the cheaper |a|^2 + |b|^2 - 2ab is not.
        distance = torch.cdist(
            normalize_map(teacher), normalize_map(student), compute_mode="donot_use_mm_for_euclid_dist"
        )
        mean_square = distance.square() / (height * width)
        loss = loss + (attention[:, layers] * mean_square).sum()
    return loss / attention.shape[0]


def _pool(energy_map: Tensor, height: int, width: int) -> Tensor:
    if energy_map.shape[1:] != (height, width):
        energy_map = F.adaptive_avg_pool2d(energy_map, (height, width))
    return energy_map.flatten(1)
