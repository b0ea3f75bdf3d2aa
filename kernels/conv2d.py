"""Launchers of the block-sparse convolution: shapes and layouts in, one kernel out. The choice of tile is the caller's.

All tensors are channels_last. The kernels and what they compute are in ``gather_gemm.py`` and ``block_products.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .block_products import block_products
from .gather_gemm import Walk, gather_gemm
from .index import StepTable, Weight
from .tiles import Tile


def forward(
    x: Tensor,
    values: Tensor,
    table: StepTable,
    weight: Weight,
    tile: Tile,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Fill ``out [N, K, P, Q]`` with ``act(conv(x) + bias + residual)``; ``activation`` as in ACTIVATIONS."""
    walk = _walk(weight, x.shape, out.shape)
    return gather_gemm(
        x, values, table, walk, tile, out,
        transposed=False, bias=bias, residual=residual, activation=activation, precision=precision,
    )  # fmt: skip


def grad_input(
    grad: Tensor,
    values: Tensor,
    table: StepTable,
    weight: Weight,
    tile: Tile,
    out: Tensor,
    *,
    precision: str = "ieee",
) -> Tensor:
    """Fill ``out [N, C, H, W]`` with the gradient of the input; ``table`` is a transposed one."""
    phases = tuple(-(-size // step) for size, step in zip(out.shape[2:], weight.stride, strict=True))
    walk = Walk(
        images=out.shape[0],
        grid=(phases[0], phases[1]),
        gathered=(grad.shape[2], grad.shape[3]),
        out=(out.shape[2], out.shape[3]),
        out_step=weight.stride,
        pointwise=_is_pointwise(weight),
    )
    return gather_gemm(grad, values, table, walk, tile, out, transposed=True, precision=precision)


def grad_values(
    grad: Tensor, x: Tensor, table: StepTable, weight: Weight, tile: Tile, out: Tensor, *, precision: str = "ieee"
) -> Tensor:
    """Fill ``out [nnzb, bh, bw]`` with the gradient of the kept values; ``table`` is a forward one."""
    return block_products(grad, x, table, _walk(weight, x.shape, grad.shape), tile, out, precision=precision)


def _walk(weight: Weight, x_shape: Sequence[int], out_shape: Sequence[int]) -> Walk:
    height, width = out_shape[2:]
    return Walk(
        images=out_shape[0],
        grid=(height, width),
        gathered=(x_shape[2], x_shape[3]),
        out=(height, width),
        in_step=weight.stride,
        pointwise=_is_pointwise(weight),
    )


def _is_pointwise(weight: Weight) -> bool:
    return weight.kernel == (1, 1) and weight.stride == (1, 1) and weight.padding == (0, 0)


def channels_last(x: Tensor) -> Tensor:
    """``x`` itself where its memory is channels_last, else a copy. Sizes of 1 make some strides meaningless."""
    return x.contiguous(memory_format=torch.channels_last)
