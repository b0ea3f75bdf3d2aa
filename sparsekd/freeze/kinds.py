"""What counts as a layer that can be frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import BlockSparseLayer, SparseConv1d, SparseConv2d, SparseConv3d, SparseConvTranspose2d, SparseLinear
from ..nn.layer import computes_as

TRANSPOSED = (nn.ConvTranspose2d, SparseConvTranspose2d)
CONVS = (nn.Conv2d, SparseConv2d, *TRANSPOSED)
LAYERS = (*CONVS, nn.Linear, SparseLinear)
LIFTED = (nn.Conv1d, nn.Conv3d, SparseConv1d, SparseConv3d)  # which lift.py makes Conv2d of, where they are


def kind_of(module: Any) -> type[nn.Module] | None:
    """Which of `LAYERS` a module is: of that very type, or a subclass that inherits all of its forward pass; not where
    hooks hang on it, or its weight is no Parameter of its own."""
    if type(module) in (SparseConv2d, SparseConvTranspose2d, SparseLinear):
        return None if hooked(module) else type(module)
    for kind in (nn.Conv2d, nn.ConvTranspose2d, nn.Linear):
        if isinstance(module, kind) and not isinstance(module, BlockSparseLayer) and computes_as(module, kind):
            own = module._parameters.get("weight") is not None and module._parameters.keys() <= {"weight", "bias"}
            return kind if own and not hooked(module) else None
    return None


def is_conv(module: Any) -> bool:
    return kind_of(module) in CONVS


def is_transposed(module: Any) -> bool:
    return kind_of(module) in TRANSPOSED


def hooked(module: nn.Module) -> bool:
    """Whether something of the user's runs at every call of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
