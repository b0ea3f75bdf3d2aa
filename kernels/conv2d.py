"""The block-sparse convolution by its kernels: shapes in, a call out. The choice of tile is the caller's.

All tensors are channels_last maps; a linear layer is a convolution of one pixel a row. What is made here is called with
other tensors of the same shapes and types as often as one likes. The kernels, and what they compute, are in
``gather_gemm.py`` and ``block_products.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .block_products import BlockProducts
from .gather_gemm import GatherGemm, Walk
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
    activation: str | None = None,
    precision: str = "ieee",
) -> GatherGemm:
    """``forward(...)(x, values, out, bias, residual)`` fills ``out [N, K, P, Q]``."""
    walk = _walk(weight, x.shape, out.shape)
    options: Any = {"activation": activation, "precision": precision}
    return GatherGemm(x, values, table, walk, tile, out, transposed=False, **options)


def grad_input(
    grad: Tensor,
    values: Tensor,
    table: StepTable,
    weight: Weight,
    tile: Tile,
    out: Tensor,
    *,
    precision: str = "ieee",
) -> GatherGemm:
    """``grad_input(...)(grad, values, out)`` fills ``out [N, C, H, W]``; ``table`` is a transposed one."""
    phases = tuple(-(-size // step) for size, step in zip(out.shape[2:], weight.stride, strict=True))
    walk = Walk(
        images=out.shape[0],
        grid=(phases[0], phases[1]),
        gathered=(grad.shape[2], grad.shape[3]),
        out=(out.shape[2], out.shape[3]),
        out_step=weight.stride,
        pointwise=_is_pointwise(weight),
    )
    return GatherGemm(grad, values, table, walk, tile, out, transposed=True, precision=precision)


def grad_values(
    grad: Tensor, x: Tensor, table: StepTable, weight: Weight, tile: Tile, out: Tensor, *, precision: str = "ieee"
) -> BlockProducts:
    """``grad_values(...)(grad, x, out)`` fills ``out [nnzb, bh, bw]``; ``table`` is a forward one."""
    return BlockProducts(grad, x, table, _walk(weight, x.shape, grad.shape), tile, out, precision=precision)


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
