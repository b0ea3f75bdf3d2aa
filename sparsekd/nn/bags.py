"""What layers of bags make of their arguments: ids, where bags begin, and what each row counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.embedding_bags import embedding_bag_scale


def bags_and_scale(
    layer: Any, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ids ``[n]``, offsets ``[bags + 1]``, scale ``[n]`` or None) of a call of ``layer``, which has a ``mode``,
    ``include_last_offset`` and ``padding_idx``."""
    if per_sample_weights is not None:
        if layer.mode != "sum":
            raise ValueError(f"{type(layer).__name__}: per_sample_weights need mode='sum', got {layer.mode!r}")
        if per_sample_weights.shape != input.shape:
            raise ValueError(
                f"{type(layer).__name__}: per_sample_weights must have the shape of the ids, {tuple(input.shape)}, "
                f"got {tuple(per_sample_weights.shape)}"
            )
        per_sample_weights = per_sample_weights.reshape(-1)
    ids, offsets = _bags(layer, input, offsets)
    scale = per_sample_weights
    if layer.mode == "mean":
        scale = embedding_bag_scale(ids, offsets, layer.padding_idx)
    return ids, offsets, scale


def _bags(layer: Any, input: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids ``[n]`` and offsets ``[bags + 1]``, int64."""
    kind = type(layer).__name__
    input = input.long() if input.dtype == torch.int32 else input
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError(f"{kind}: 2-D ids are bags of one length and take no offsets")
        bags, length = input.shape
        if not length:
            return input.reshape(-1), input.new_zeros(bags + 1)
        return input.reshape(-1), torch.arange(0, bags * length + 1, length, device=input.device)
    if input.dim() != 1:
        raise ValueError(f"{kind}: ids must be [n] or [bags, length], got shape {tuple(input.shape)}")
    if offsets is None or offsets.dim() != 1 or (layer.include_last_offset and not offsets.shape[0]):
        raise ValueError(f"{kind}: ids of shape [n] need 1-D offsets, where each bag begins")
    if offsets.is_floating_point():
        raise TypeError(f"{kind}: offsets must be int32 or int64, got {offsets.dtype}; use .long()")
    offsets = offsets.long()
    if not layer.include_last_offset:
        offsets = torch.cat([offsets, offsets.new_tensor([input.shape[0]])])
    return input, offsets
