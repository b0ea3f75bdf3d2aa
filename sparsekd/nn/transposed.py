"""``nn.ConvTranspose2d`` with a block-sparse weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..blocks import BlockPattern
from ..ops.conv_transpose2d import output_size
from .layer import BlockSparseLayer


class SparseConvTranspose2d(BlockSparseLayer):
    """``nn.ConvTranspose2d`` with a block-sparse weight: ``[N, C, H, W] -> [N, K, P, Q]`` (or without N).

    It runs on the kernel of the gradient of ``SparseConv2d`` to its input, which is the same map. As in torch the rows
    of the weight ``[C, K/groups, R, S]`` are input channels: a block is ``bh`` inputs by ``bw`` outputs.

    Args:
        in_channels .. dtype: as ``nn.ConvTranspose2d``; initialised as torch does, then cut to blocks. With
            ``groups > 1`` the inputs of a group must be a multiple of the block height.
        pattern: block shape; default ``BlockPattern.for_device``.
        density: share of the blocks to keep, in (0, 1]; or
        mask: bool block mask ``[ceil(C/bh), ceil(K/groups/bw), R, S]``.
    """

    dense_type = nn.ConvTranspose2d
    geometry = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
        "padding_mode",
    )
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    groups: int
    dilation: tuple[int, int]
    padding_mode: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: BlockPattern | None = None,
        density: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        given = (
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            padding_mode,
        )
        dense: dict[str, Any] = dict(zip(self.geometry, given, strict=True))
        self._build({**dense, "bias": bias, "device": device, "dtype": dtype}, pattern, density, mask)

    @classmethod
    def misfit(cls, dense: Any, pattern: BlockPattern) -> str | None:
        rows = dense.in_channels // dense.groups
        if dense.groups == 1 or rows % pattern.bh == 0:
            return None
        return (
            f"with groups = {dense.groups} the {rows} inputs of a group must be a multiple of the block height, got "
            f"pattern {pattern}; use a lower block or stay dense"
        )

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0), output_size).squeeze(0)
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise ValueError(
                f"SparseConvTranspose2d: expected [N, {self.in_channels}, H, W], got shape {tuple(input.shape)}"
            )
        return ops.conv_transpose2d(
            input,
            self.values,
            self.row_ptr,
            self.col_idx,
            self.bias,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding if output_size is None else self._padding_for(input, output_size),
            dilation=self.dilation,
            groups=self.groups,
        )

    def _padding_for(self, input: Tensor, wanted: Sequence[int]) -> tuple[int, ...]:
        """The output padding that gives an output of the ``wanted`` size: (P, Q), as in torch also behind N and K."""
        least = output_size(input.shape[2:], self.kernel_size, self.stride, self.padding, (0, 0), self.dilation)
        padding = tuple(want - low for want, low in zip(wanted[-2:], least, strict=True))
        if not all(0 <= extra < step for extra, step in zip(padding, self.stride, strict=True)):
            most = tuple(low + step - 1 for low, step in zip(least, self.stride, strict=True))
            raise ValueError(
                f"SparseConvTranspose2d: output_size must lie between {least} and {most} for an input of "
                f"{tuple(input.shape[2:])}, got {tuple(wanted)}"
            )
        return padding

    def dead_outputs(self) -> Tensor:
        """Bool ``[K]``: output channels that no kept block writes. Blocks lie across: rows are inputs."""
        blocks, groups = self.blocks, self.groups
        inputs, outputs, *_ = blocks.pattern.grid(self.matrix_shape)
        kept = torch.zeros(groups, outputs, dtype=torch.bool, device=self.col_idx.device)
        group = blocks.row_block() // (inputs // groups)
        kept[group, self.col_idx.long() % outputs] = True
        of_channel = kept.repeat_interleave(blocks.pattern.bw, 1)[:, : self.matrix_shape[1]]
        return ~of_channel.flatten()

    def extra_repr(self) -> str:
        described = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        plain = {"padding": (0, 0), "output_padding": (0, 0), "groups": 1, "dilation": (1, 1)}
        for name, value in plain.items():
            if getattr(self, name) != value:
                described += f", {name}={getattr(self, name)}"
        return f"{described}, {self._describe_weight()}"
