"""Block-sparse transposed convolution: the gradient of ``conv2d`` to its input, which is an op with kernels already."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._schema import autocast, call, check_operands, check_weight
from .conv2d import Geometry, Pair


def conv_transpose2d(
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
    output_padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Spread ``x`` through a block-sparse weight.

    Equivalent to::

        weight = BlockSparse(values, row_ptr, col_idx, (C, K // groups, R, S), pattern).to_dense()
        F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)

    Args:
        x: ``[N, C, H, W]``, contiguous or channels_last (others are copied).
        values, row_ptr, col_idx: the weight, ``[nnzb, bh, bw]``, ``[ceil(C / bh) + 1]``, ``[nnzb]``: rows are inputs.
        bias: ``[K]`` or None.
        out_channels: K. With ``groups > 1``, ``C / groups`` must be a multiple of bh.
        kernel_size: (R, S).
        stride, padding, output_padding, dilation: in pixels, (height, width).

    Returns:
        ``[N, K, P, Q]`` in the dtype and memory format of ``x``.
    """
    x, values, bias = autocast(x, values, bias)
    if x.dim() != 4:
        raise ValueError(
            f"sparsekd.conv_transpose2d: input must be [N, C, H, W], got shape {tuple(x.shape)}; x.unsqueeze(0)?"
        )
    if torch.jit.is_tracing():  # it would write the sizes of today's batch into the graph
        raise RuntimeError(
            "sparsekd.conv_transpose2d: torch.jit.trace cannot record a size that depends on the input; use "
            "torch.export, or trace sparsekd.densify(copy.deepcopy(model))"
        )
    check_weight("conv_transpose2d", values, row_ptr, col_idx, x.shape[1])
    check_operands("conv_transpose2d", x, values, None, x.shape[1])
    if bias is not None and (bias.shape != (out_channels,) or bias.dtype != x.dtype):
        raise ValueError(
            f"sparsekd.conv_transpose2d: bias must have shape ({out_channels},) and type {x.dtype}, "
            f"got {tuple(bias.shape)} and {bias.dtype}"
        )
    size = output_size(x.shape[2:], kernel_size, stride, padding, output_padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"sparsekd.conv_transpose2d: padding {tuple(padding)} leaves nothing of an image of {tuple(x.shape[2:])} "
            f"pixels under a {tuple(kernel_size)} kernel; pad less"
        )
    # Output padding of a whole stride or more (a dilated kernel allows it) is what further inputs of zero would write.
    further = [extra // step for extra, step in zip(output_padding, stride, strict=True)]
    if any(further):
        x = F.pad(x, (0, further[1], 0, further[0]))
    shape = (x.shape[0], out_channels, *size)
    geometry = Geometry.of(kernel_size, stride, padding, dilation, groups)
    out = call("conv2d_grad_input", x, values, row_ptr, col_idx, shape, *geometry)
    return out if bias is None else out + bias[:, None, None]


def output_size(
    x_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, output_padding: Pair, dilation: Pair
) -> tuple[int, int]:
    """(P, Q) of a transposed convolution over (H, W)."""
    sides = zip(x_size, kernel_size, stride, padding, output_padding, dilation, strict=True)
    height, width = (
        (size - 1) * step - 2 * pad + dil * (taps - 1) + extra + 1 for size, taps, step, pad, extra, dil in sides
    )
    return height, width
