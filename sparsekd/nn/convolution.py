"""The convolutions: two-dimensional ones run on their own kernels, and what can be laid out as one runs on them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..blocks import BlockPattern
from .layer import BlockSparseLayer


class Convolution(BlockSparseLayer):
    """What the block-sparse convolutions share: arguments, padding and the one op that they run on."""

    geometry = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: BlockPattern | None = None,
        density: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        given = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        dense = dict(zip(self.geometry, given, strict=True))
        self._build({**dense, "bias": bias, "device": device, "dtype": dtype}, pattern, density, mask)

    @classmethod
    def misfit(cls, dense: Any, pattern: BlockPattern) -> str | None:
        rows = dense.out_channels // dense.groups
        if dense.groups == 1 or rows % pattern.bh == 0:
            return None
        return (
            f"with groups = {dense.groups} the {rows} outputs of a group must be a multiple of the block height, got "
            f"pattern {pattern}; use a lower block or stay dense"
        )

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input as ``[N, C, ...]`` with whatever padding the op cannot apply, and what zeros the op shall add."""
        if input.dim() != len(self.kernel_size) + 2 or input.shape[1] != self.in_channels:
            sizes = ", ".join(("D", "H", "W")[-len(self.kernel_size) :] if len(self.kernel_size) > 1 else "L")
            raise ValueError(
                f"{type(self).__name__}: expected [N, {self.in_channels}, {sizes}], got shape {tuple(input.shape)}"
            )
        padding, explicit = split_padding(self)
        if explicit is not None:
            input = F.pad(input, explicit, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        return input, padding

    def _convolved(self, image: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
        if self.computes_densely:
            return F.conv2d(
                image, self.weight.view(self.matrix_shape), self.bias, stride, padding, dilation, self.groups
            )
        return ops.conv2d(
            image,
            self.values,
            self.row_ptr,
            self.col_idx,
            self.bias,
            out_channels=self.out_channels,
            kernel_size=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        described = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        sides = len(self.kernel_size)
        plain = {"padding": (0,) * sides, "dilation": (1,) * sides, "groups": 1, "padding_mode": "zeros"}
        for name, value in plain.items():
            if getattr(self, name) != value:
                described += f", {name}={getattr(self, name)}"
        return f"{described}, {self._describe_weight()}"


class SparseConv2d(Convolution):
    """``nn.Conv2d`` with a block-sparse weight: ``[N, C, H, W] -> [N, K, P, Q]`` (or without N).

    Args:
        in_channels .. dtype: as ``nn.Conv2d``, all of them; initialised as torch does, then cut to blocks. With
            ``groups > 1`` the outputs of a group must be a multiple of the block height.
        pattern: block shape; default ``BlockPattern.for_device``.
        density: share of the blocks to keep, in (0, 1]; or
        mask: bool block mask ``[ceil(K/bh), ceil(C/groups/bw), R, S]``.
    """

    dense_type = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        if (output := self._again(input)) is not None:
            return output
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        image, padding = self._padded(input)
        output = self._convolved(image, self.kernel_size, self.stride, padding, self.dilation)
        if image is input and not self.computes_densely:
            geometry = (self.kernel_size, self.stride, padding, self.dilation, self.groups)
            self._remember(input, "conv2d", self.out_channels, *geometry)
        return output


class SparseConv1d(Convolution):
    """``nn.Conv1d`` with a block-sparse weight: ``[N, C, L] -> [N, K, Q]`` (or without N).

    It runs as a convolution over an image of height 1. Arguments as in :class:`SparseConv2d`; a block mask is
    ``[ceil(K/bh), ceil(C/groups/bw), 1, S]``.
    """

    dense_type = nn.Conv1d

    @classmethod
    def matrix_shape_of(cls, weight_shape: Sequence[int]) -> tuple[int, ...]:
        return (*weight_shape[:2], 1, weight_shape[2])

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        line, padding = self._padded(input)
        kernel, stride, dilation = (1, *self.kernel_size), (1, *self.stride), (1, *self.dilation)
        return self._convolved(line.unsqueeze(2), kernel, stride, (0, *padding), dilation).squeeze(2)


class SparseConv3d(Convolution):
    """A 1x1x1 ``nn.Conv3d`` with a block-sparse weight: ``[N, C, D, H, W] -> [N, K, D', H', W']`` (or without N).

    A kernel of one voxel is the same matrix at every voxel, so that it runs as a 1x1 convolution over D images on top
    of each other. Larger kernels have no block-sparse form. Arguments as in :class:`SparseConv2d`; a block mask is
    ``[ceil(K/bh), ceil(C/groups/bw), 1, 1]``.
    """

    dense_type = nn.Conv3d

    @classmethod
    def misfit(cls, dense: Any, pattern: BlockPattern) -> str | None:
        if dense.kernel_size != (1, 1, 1):
            return f"of Conv3d only 1x1x1 kernels can be block-sparse, got {dense.kernel_size}"
        return super().misfit(dense, pattern)

    @classmethod
    def matrix_shape_of(cls, weight_shape: Sequence[int]) -> tuple[int, ...]:
        return (*weight_shape[:2], 1, 1)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 4:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        volume, padding = self._padded(input)
        if any(padding):
            volume = F.pad(volume, [pad for side in reversed(padding) for pad in (side, side)])
        if self.stride != (1, 1, 1):
            depth, height, width = self.stride
            volume = volume[:, :, ::depth, ::height, ::width]
        image = self._convolved(volume.flatten(2, 3), (1, 1), (1, 1), (0, 0), (1, 1))
        return image.unflatten(2, volume.shape[2:4])


def split_padding(conv: Any) -> tuple[tuple[int, ...], list[int] | None]:
    """(zero padding the op applies, explicit ``F.pad`` before it): the op pads with zeros, both sides alike."""
    if isinstance(conv.padding, str):
        reach = [
            dil * (taps - 1) if conv.padding == "same" else 0
            for dil, taps in zip(conv.dilation, conv.kernel_size, strict=True)
        ]
        sides = [(total // 2, total - total // 2) for total in reach]
    else:
        sides = [(pad, pad) for pad in conv.padding]
    if conv.padding_mode == "zeros" and all(before == after for before, after in sides):
        return tuple(before for before, _ in sides), None
    return (0,) * len(sides), [pad for side in reversed(sides) for pad in side]
