"""``nn.Linear`` with a block-sparse weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..blocks import BlockPattern
from .layer import BlockSparseLayer


class SparseLinear(BlockSparseLayer):
    """``nn.Linear`` with a block-sparse weight: ``[..., in_features] -> [..., out_features]``.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``; initialised as torch does, then cut to blocks.
        pattern: block shape; default ``BlockPattern.for_device``.
        density: share of the blocks to keep, in (0, 1]; or
        mask: bool block mask ``[ceil(out/bh), ceil(in/bw)]``.
    """

    dense_type = nn.Linear
    geometry = ("in_features", "out_features")
    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: BlockPattern | None = None,
        density: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        dense = {"in_features": in_features, "out_features": out_features, "bias": bias}
        self._build({**dense, "device": device, "dtype": dtype}, pattern, density, mask)

    def forward(self, input: Tensor) -> Tensor:
        if (output := self._again(input)) is not None:
            return output
        if input.shape[-1] != self.in_features:
            raise ValueError(f"SparseLinear: expected [..., {self.in_features}], got shape {tuple(input.shape)}")
        if self.computes_densely:
            return F.linear(input, self.weight, self.bias)
        output = ops.linear(input, self.values, self.row_ptr, self.col_idx, self.bias, out_features=self.out_features)
        self._remember(input, "linear", self.out_features)
        return output

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe_weight()}"
