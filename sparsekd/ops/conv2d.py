"""Block-sparse 2-D convolution: the weight is stored as kept blocks (layout: sparsekd/blocks.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor

from ..blocks import BlockPattern, BlockSparse, gather_blocks
from ._schema import autocast, call, check_operands, check_weight, define, differentiate

Pair = Sequence[int]


class Geometry(NamedTuple):
    """How a convolution walks over an image; pairs are (height, width). The ops take its fields in this order."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Geometry:
        """From what an op was given: lists become tuples, so that a geometry can be the key of a cache."""
        return cls(_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation), groups)

    @property
    def steps(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """(stride, padding, dilation, groups): what torch's functions take when the kernel's size is a weight's."""
        return self[1:]

    def weight_shape(self, out_channels: int, in_channels: int) -> tuple[int, int, int, int]:
        """[K, C / groups, R, S] of the dense weight."""
        return (out_channels, in_channels // self.groups, *self.kernel_size)

    def output_size(self, image: Pair) -> tuple[int, int]:
        """(P, Q) of a convolution over an image of (H, W) pixels."""
        height, width = (
            (size + 2 * pad - dilation * (taps - 1) - 1) // step + 1
            for size, taps, step, pad, dilation in zip(image, *self[:4], strict=True)
        )
        return height, width


def _pair(sizes: Pair) -> tuple[int, int]:
    """As it is, if not a pair: ``_check`` refuses it by name."""
    return tuple(sizes)  # type: ignore[return-value]


def conv2d(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve ``x`` with a block-sparse weight.

    Equivalent to::

        weight = BlockSparse(values, row_ptr, col_idx, (K, C // groups, R, S), pattern).to_dense()
        F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    Args:
        x: ``[N, C, H, W]``, contiguous or channels_last (others are copied).
        values, row_ptr, col_idx: the weight, ``[nnzb, bh, bw]``, ``[ceil(K / bh) + 1]``, ``[nnzb]``.
        bias: ``[K]`` or None.
        out_channels: K. With ``groups > 1``, ``K / groups`` must be a multiple of bh.
        kernel_size: (R, S).
        stride, padding, dilation: in pixels, (height, width).

    Returns:
        ``[N, K, P, Q]`` in the dtype and memory format of ``x``.
    """
    x, values, bias = autocast(x, values, bias)
    geometry = Geometry.of(kernel_size, stride, padding, dilation, groups)
    _check(x, values, row_ptr, col_idx, bias, out_channels, geometry)
    return call("conv2d", x, values, row_ptr, col_idx, bias, out_channels, *geometry)


def conv2d_reference(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    bias: Tensor | None,
    out_channels: int,
    *fields: Any,
) -> Tensor:
    geometry = Geometry.of(*fields)
    shape = geometry.weight_shape(out_channels, x.shape[1])
    weight = _weight(values, row_ptr, col_idx, shape).to_dense()
    out = F.conv2d(x, weight, bias, *geometry.steps)
    return out.contiguous(memory_format=memory_format(x))


def conv2d_grad_input_reference(
    grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, input_shape: Sequence[int], *fields: Any
) -> Tensor:
    geometry = Geometry.of(*fields)
    shape = geometry.weight_shape(grad.shape[1], input_shape[1])
    weight = _weight(values, row_ptr, col_idx, shape).to_dense()
    dx = torch.nn.grad.conv2d_input(list(input_shape), weight, grad, *geometry.steps)
    return dx.contiguous(memory_format=memory_format(grad))


def conv2d_grad_values_reference(
    grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int, *fields: Any
) -> Tensor:
    geometry = Geometry.of(*fields)
    shape = geometry.weight_shape(grad.shape[1], x.shape[1])
    kept = _weight(grad.new_empty(col_idx.shape[0], bh, bw), row_ptr, col_idx, shape).mask()
    dense = torch.nn.grad.conv2d_weight(x, list(shape), grad, *geometry.steps)
    return gather_blocks(dense, BlockPattern(bh, bw), kept)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if ``x`` is laid out so and not also contiguous, otherwise contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _weight(values: Tensor, row_ptr: Tensor, col_idx: Tensor, shape: tuple[int, ...]) -> BlockSparse:
    return BlockSparse(values, row_ptr, col_idx, shape, BlockPattern(values.shape[1], values.shape[2]))


def _check(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    bias: Tensor | None,
    out_channels: int,
    geometry: Geometry,
) -> None:
    if x.dim() != 4:
        raise ValueError(f"sparsekd.conv2d: input must be [N, C, H, W], got shape {tuple(x.shape)}; x.unsqueeze(0)?")
    groups = geometry.groups
    if x.shape[1] % groups or out_channels % groups:
        raise ValueError(
            f"sparsekd.conv2d: input channels {x.shape[1]} and output channels {out_channels} must be multiples of "
            f"groups = {groups}"
        )
    check_weight("conv2d", values, row_ptr, col_idx, out_channels)
    if groups > 1 and (out_channels // groups) % values.shape[1]:
        raise ValueError(
            f"sparsekd.conv2d: with groups = {groups} the {out_channels // groups} outputs of a group must be a "
            f"multiple of the block height {values.shape[1]}; use a lower block or leave this layer dense"
        )
    check_operands("conv2d", x, values, bias, out_channels)
    for name in ("kernel_size", "stride", "dilation"):
        pair = getattr(geometry, name)
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"sparsekd.conv2d: {name} must be two positive ints, got {pair}")
    if len(geometry.padding) != 2 or min(geometry.padding) < 0:
        raise ValueError(f"sparsekd.conv2d: padding must be two ints >= 0, got {geometry.padding}")
    if min(geometry.output_size(x.shape[2:])) < 1:
        raise ValueError(
            f"sparsekd.conv2d: a {geometry.kernel_size} kernel with dilation {geometry.dilation} and padding "
            f"{geometry.padding} does not fit an image of {tuple(x.shape[2:])} pixels; pad the image?"
        )


def _fake(
    x: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, bias: Tensor | None, out_channels: int, *fields: Any
) -> Tensor:
    geometry = Geometry.of(*fields)
    _check(x, values, row_ptr, col_idx, bias, out_channels, geometry)
    out = x.new_empty(x.shape[0], out_channels, *geometry.output_size(x.shape[2:]))
    return out.contiguous(memory_format=memory_format(x))


def _fake_grad_input(
    grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, input_shape: Sequence[int], *_fields: object
) -> Tensor:
    return grad.new_empty(list(input_shape)).contiguous(memory_format=memory_format(grad))


def _fake_grad_values(
    grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int, *_fields: object
) -> Tensor:
    return x.new_empty(col_idx.shape[0], bh, bw)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, row_ptr, col_idx, bias, _, *ctx.geometry = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, values, row_ptr, col_idx)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, row_ptr, col_idx = ctx.saved_tensors
    need_x, need_values, *_ = ctx.needs_input_grad
    # Autograd may hand in a grad of another layout; both gradients run best in the layout of the forward pass.
    grad = grad.contiguous(memory_format=memory_format(x))
    weight = (row_ptr, col_idx)
    grad_x = call("conv2d_grad_input", grad, values, *weight, x.shape, *ctx.geometry) if need_x else None
    grad_values = (
        call("conv2d_grad_values", grad, x, *weight, *values.shape[1:], *ctx.geometry) if need_values else None
    )
    grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias and ctx.needs_input_grad[4] else None
    return grad_x, grad_values, None, None, grad_bias, *(None,) * 6


def _save_two(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Both gradients are linear in their two operands: what autograd needs to differentiate them once more."""
    ctx.save_for_backward(*inputs[:4])
    ctx.geometry = inputs[-5:]


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple:
    """Of grad_input, which is linear in the gradient of y and in the values."""
    grad_y, values, row_ptr, col_idx = ctx.saved_tensors
    grad = grad.contiguous(memory_format=memory_format(grad_y))
    index = (row_ptr, col_idx)
    return (
        call("conv2d", grad, values, *index, None, grad_y.shape[1], *ctx.geometry),
        call("conv2d_grad_values", grad_y, grad, *index, *values.shape[1:], *ctx.geometry),
        *(None,) * 8,
    )


def _backward_grad_values(ctx: Any, grad: Tensor) -> tuple:
    """Of grad_values, which is linear in the gradient of y and in x."""
    grad_y, x, row_ptr, col_idx = ctx.saved_tensors
    index = (row_ptr, col_idx)
    return (
        call("conv2d", x, grad, *index, None, grad_y.shape[1], *ctx.geometry),
        call("conv2d_grad_input", grad_y, grad, *index, x.shape, *ctx.geometry),
        *(None,) * 9,
    )


# The fields of Geometry, as torch's schemas write them.
_GEOMETRY = "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
define(
    "conv2d",
    "(Tensor x, Tensor values, Tensor row_ptr, Tensor col_idx, Tensor? bias, SymInt out_channels, "
    f"{_GEOMETRY}) -> Tensor",
    conv2d_reference,
    _fake,
)
define(
    "conv2d_grad_input",
    f"(Tensor grad, Tensor values, Tensor row_ptr, Tensor col_idx, SymInt[] input_shape, {_GEOMETRY}) -> Tensor",
    conv2d_grad_input_reference,
    _fake_grad_input,
)
define(
    "conv2d_grad_values",
    f"(Tensor grad, Tensor x, Tensor row_ptr, Tensor col_idx, SymInt bh, SymInt bw, {_GEOMETRY}) -> Tensor",
    conv2d_grad_values_reference,
    _fake_grad_values,
)
differentiate("conv2d", _backward, _save)
differentiate("conv2d_grad_input", _backward_grad_input, _save_two)
differentiate("conv2d_grad_values", _backward_grad_values, _save_two)
