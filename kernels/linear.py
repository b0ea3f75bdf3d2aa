"""Launchers of the block-sparse linear layer: a 1x1 convolution whose pixels are the rows of a matrix."""

from __future__ import annotations

from torch import Tensor

from ._block_products import block_products
from ._gather_gemm import Walk, gather_gemm
from ._index import StepTable
from ._tiles import Tile


def forward(
    x: Tensor,
    values: Tensor,
    table: StepTable,
    tile: Tile,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Fill ``out [rows, out_features]`` with ``act(x W^T + bias + residual)``; ``activation`` as in ACTIVATIONS."""
    return gather_gemm(
        x, values, table, _walk(x), tile, out,
        transposed=False, bias=bias, residual=residual, activation=activation, precision=precision,
    )  # fmt: skip


def grad_input(
    grad: Tensor, values: Tensor, table: StepTable, tile: Tile, out: Tensor, *, precision: str = "ieee"
) -> Tensor:
    """Fill ``out [rows, in_features]`` with ``grad W``; ``table`` is a transposed one."""
    return gather_gemm(grad, values, table, _walk(grad), tile, out, transposed=True, precision=precision)


def grad_values(
    grad: Tensor, x: Tensor, table: StepTable, tile: Tile, out: Tensor, *, precision: str = "ieee"
) -> Tensor:
    """Fill ``out [nnzb, bh, bw]`` with the kept blocks of ``grad^T x``; ``table`` is a forward one."""
    return block_products(grad, x, table, _walk(x), tile, out, precision=precision)


def _walk(rows: Tensor) -> Walk:
    return Walk(images=rows.shape[0], grid=(1, 1), gathered=(1, 1), out=(1, 1), pointwise=True)
