"""Drop-in layers whose weight exists only where a block is kept: parameters, buffers and one op call each.

    conv = sparsekd.nn.SparseConv2d.from_dense(conv, density=0.3)   # keeps the 30 % of blocks of largest norm
    y = conv(x)                                                     # trains and infers like nn.Conv2d

State: ``values [nnzb, bh, bw]`` (Parameter), ``row_ptr``, ``col_idx`` (int32 buffers), ``bias``; see blocks.py.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .blocks import BlockPattern, BlockSparse

Layer = TypeVar("Layer", bound="BlockSparseLayer")


class BlockSparseLayer(nn.Module):
    """What SparseLinear and SparseConv2d share: the block-sparse weight and every change to it."""

    values: nn.Parameter
    row_ptr: Tensor
    col_idx: Tensor
    bias: nn.Parameter | None
    pattern: BlockPattern
    weight_shape: tuple[int, ...]

    def _take(self, dense: Any, pattern: BlockPattern | None, density: float | None, mask: Tensor | None) -> None:
        """Adopt the weight and bias of a dense layer. A parameter shares no memory with the dense one."""
        weight = _float_weight(type(self).__name__, dense)
        pattern = pattern or BlockPattern.for_device(weight.device, weight.dtype)
        blocks = BlockSparse.from_dense(weight, pattern, density=density, mask=mask)
        self.pattern, self.weight_shape = pattern, blocks.shape
        self.values = nn.Parameter(blocks.values, requires_grad=weight.requires_grad)
        self.register_buffer("row_ptr", blocks.row_ptr)
        self.register_buffer("col_idx", blocks.col_idx)
        bias = dense.bias
        copied = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", copied)
        self.train(dense.training)

    @classmethod
    def from_dense(
        cls: type[Layer],
        dense: Any,
        pattern: BlockPattern | None = None,
        *,
        density: float | None = None,
        mask: Tensor | None = None,
    ) -> Layer:
        """Convert a dense layer, keeping the blocks of ``mask`` or the share ``density`` of largest norm (default all).

        Args:
            dense: an ``nn.Conv2d`` (``nn.Linear`` for SparseLinear); left untouched.
            pattern: block shape; default ``BlockPattern.for_device`` of the layer's device and dtype.
            density: share of blocks to keep, in (0, 1].
            mask: bool, ``[ceil(K/bh), ceil(C/groups/bw), R, S]`` (linear ``[ceil(out/bh), ceil(in/bw)]``).
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(dense, pattern, density, mask)
        return layer

    def _adopt(
        self, dense: Any, pattern: BlockPattern | None, density: float | None, mask: Tensor | None
    ) -> None:  # pragma: no cover - abstract
        raise NotImplementedError

    def to_dense(self) -> nn.Module:  # pragma: no cover - abstract
        """The dense layer with the same weight, zeros where no block is kept."""
        raise NotImplementedError

    @property
    def blocks(self) -> BlockSparse:
        """The weight as a BlockSparse that shares this layer's storage."""
        return BlockSparse(self.values.detach(), self.row_ptr, self.col_idx, self.weight_shape, self.pattern)

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads it: a differentiable copy, so writing to it changes nothing."""
        return BlockSparse(self.values, self.row_ptr, self.col_idx, self.weight_shape, self.pattern).to_dense()

    @property
    def num_weights(self) -> int:
        """Weights of the dense layer this one stands for (bias not counted)."""
        return math.prod(self.weight_shape)

    @property
    def num_kept(self) -> int:
        """Weights that exist (padding of ragged blocks not counted)."""
        return int(self.blocks.block_sizes().sum())

    @property
    def density(self) -> float:
        """``num_kept / num_weights``."""
        return self.num_kept / max(self.num_weights, 1)

    def block_mask(self) -> Tensor:
        """Bool block mask of the kept blocks, in the shape that ``from_dense(mask=)`` takes."""
        return self.blocks.mask()

    @torch.no_grad()
    def keep_(self, keep: Tensor) -> None:
        """Drop every block that ``keep [nnzb]`` (bool) does not name. The Parameter ``values`` stays the same object.

        Optimizers hold state of the old size: ``sparsekd.pruning.drop_blocks`` shrinks it along.
        """
        if keep.dtype != torch.bool or keep.shape != self.col_idx.shape:
            raise ValueError(
                f"{type(self).__name__}.keep_: expected one bool for each of the {self.col_idx.shape[0]} blocks, "
                f"got {keep.dtype} of shape {tuple(keep.shape)}"
            )
        kept_before = torch.zeros(keep.shape[0] + 1, dtype=torch.int32, device=keep.device)
        kept_before[1:] = keep.cumsum(0)
        self.row_ptr = kept_before[self.row_ptr.long()]
        self.col_idx = self.col_idx[keep]
        _replace_data(self.values, self.values.data[keep])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        """A state may hold other blocks, and another number of them, than this layer holds now."""
        tensors: list[Any] = [state_dict.get(prefix + name) for name in ("values", "row_ptr", "col_idx")]
        errors: list[str] = rest[-1]
        if all(tensor is not None for tensor in tensors):
            try:
                BlockSparse(tensors[0], tensors[1], tensors[2], self.weight_shape, self.pattern).validate()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix[:-1]}: {error}")
                return
            _replace_data(self.values, self.values.data.new_empty(tensors[0].shape))
            self.col_idx = self.col_idx.new_empty(tensors[2].shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _describe_weight(self) -> str:
        described = f"bias={self.bias is not None}, pattern={self.pattern}"
        return described if self.values.is_meta else f"{described}, density={self.density:.3g}"


class SparseLinear(BlockSparseLayer):
    """``nn.Linear`` with a block-sparse weight: ``[..., in_features] -> [..., out_features]``.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``; initialised as torch does, then cut to blocks.
        pattern: block shape; default ``BlockPattern.for_device``.
        density: share of the blocks to keep, in (0, 1]; or
        mask: bool block mask ``[ceil(out/bh), ceil(in/bw)]``.
    """

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
        device = torch.get_default_device() if device is None else torch.device(device)
        dense = nn.Linear(in_features, out_features, bias, "cpu", dtype)
        self._adopt(dense, pattern or _default_pattern(device, dtype), density, mask)
        self.to(device)

    def _adopt(self, dense: Any, pattern: BlockPattern | None, density: float | None, mask: Tensor | None) -> None:
        if type(dense) is not nn.Linear:  # a subclass may compute something else
            raise TypeError(f"SparseLinear.from_dense: expected nn.Linear, got {type(dense).__name__}")
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self._take(dense, pattern, density, mask)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"SparseLinear: expected [..., {self.in_features}], got shape {tuple(x.shape)}")
        return ops.linear(x, self.values, self.row_ptr, self.col_idx, self.bias, out_features=self.out_features)

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the same weight, zeros where no block is kept."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return _fill(dense, self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe_weight()}"


class SparseConv2d(BlockSparseLayer):
    """``nn.Conv2d`` with a block-sparse weight: ``[N, C, H, W] -> [N, K, P, Q]`` (or without N).

    Args:
        in_channels .. dtype: as ``nn.Conv2d``, all of them; initialised as torch does, then cut to blocks. With
            ``groups > 1`` the outputs of a group must be a multiple of the block height.
        pattern: block shape; default ``BlockPattern.for_device``.
        density: share of the blocks to keep, in (0, 1]; or
        mask: bool block mask ``[ceil(K/bh), ceil(C/groups/bw), R, S]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
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
        geometry: Any = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        geometry |= {"bias": bias, "padding_mode": padding_mode, "dtype": dtype}
        device = torch.get_default_device() if device is None else torch.device(device)
        dense = nn.Conv2d(in_channels, out_channels, kernel_size, device="cpu", **geometry)  # type: ignore[arg-type]
        self._adopt(dense, pattern or _default_pattern(device, dtype), density, mask)
        self.to(device)

    def _adopt(self, dense: Any, pattern: BlockPattern | None, density: float | None, mask: Tensor | None) -> None:
        if type(dense) is not nn.Conv2d:
            raise TypeError(f"SparseConv2d.from_dense: expected nn.Conv2d, got {type(dense).__name__}")
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.kernel_size, self.stride, self.dilation = dense.kernel_size, dense.stride, dense.dilation
        self.padding, self.padding_mode, self.groups = dense.padding, dense.padding_mode, dense.groups
        self._take(dense, pattern, density, mask)
        if self.groups > 1 and (self.out_channels // self.groups) % self.pattern.bh:
            raise ValueError(
                f"SparseConv2d: with groups = {self.groups} the {self.out_channels // self.groups} outputs of a group "
                f"must be a multiple of the block height, got pattern {self.pattern}; use a lower block or stay dense"
            )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"SparseConv2d: expected [N, {self.in_channels}, H, W], got shape {tuple(x.shape)}")
        padding, explicit = split_padding(self)
        if explicit is not None:
            x = F.pad(x, explicit, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        return ops.conv2d(
            x,
            self.values,
            self.row_ptr,
            self.col_idx,
            self.bias,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def to_dense(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` with the same weight, zeros where no block is kept."""
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        dense = nn.Conv2d(**{name: getattr(self, name) for name in names}, bias=self.bias is not None, device="meta")
        return _fill(dense, self)

    def extra_repr(self) -> str:
        described = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, plain in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != plain:
                described += f", {name}={getattr(self, name)}"
        return f"{described}, {self._describe_weight()}"


def _replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape; it stays the same object and loses its gradient.

    Autograd's gradient accumulator remembers the old shape for as long as some graph is alive (the loss of the last
    batch is enough), and the next backward would raise. It is renewed only when the dtype changes: change it between.
    """
    parameter.grad = None
    parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float16 else torch.float16)
    parameter.data = data


def split_padding(conv: nn.Conv2d | SparseConv2d) -> tuple[tuple[int, int], list[int] | None]:
    """(zero padding the op applies, explicit ``F.pad`` before it): the op pads with zeros, both sides alike."""
    if isinstance(conv.padding, str):
        reach = [
            dil * (taps - 1) if conv.padding == "same" else 0
            for dil, taps in zip(conv.dilation, conv.kernel_size, strict=True)
        ]
        top_bottom, left_right = [(total // 2, total - total // 2) for total in reach]
    else:
        top_bottom, left_right = [(pad, pad) for pad in conv.padding]
    if conv.padding_mode == "zeros" and top_bottom[0] == top_bottom[1] and left_right[0] == left_right[1]:
        return (top_bottom[0], left_right[0]), None
    return (0, 0), [*left_right, *top_bottom]


def _fill(dense: Any, layer: BlockSparseLayer) -> Any:
    """Give a dense layer on the meta device this layer's weight and bias."""
    dense.weight = nn.Parameter(layer.blocks.to_dense(), requires_grad=layer.values.requires_grad)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return dense.train(layer.training)


def _float_weight(caller: str, dense: Any) -> Tensor:
    if dense.weight.is_meta:
        raise ValueError(
            f"{caller}.from_dense: expected a layer with values, got one on the meta device; load it first"
        )
    if not dense.weight.is_floating_point():
        raise TypeError(f"{caller}: expected floating-point weights, got {dense.weight.dtype}")
    return dense.weight


def _default_pattern(device: torch.device, dtype: torch.dtype | None) -> BlockPattern:
    return BlockPattern.for_device("cuda" if device.type == "cuda" else "cpu", dtype or torch.get_default_dtype())
