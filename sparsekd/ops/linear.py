"""Block-sparse linear: ``y = x W^T + b`` with the weight stored as kept blocks (layout: sparsekd/blocks.py)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..blocks import BlockPattern, BlockSparse, gather_blocks
from ._schema import autocast, call, check_operands, check_weight, define, differentiate


def linear(
    x: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, bias: Tensor | None = None, *, out_features: int
) -> Tensor:
    """Apply a block-sparse linear map to the last dimension.

    Equivalent to::

        F.linear(x, BlockSparse(values, row_ptr, col_idx, (out_features, x.shape[-1]), pattern).to_dense(), bias)

    Args:
        x: ``[..., in_features]``.
        values, row_ptr, col_idx: the weight, ``[nnzb, bh, bw]``, ``[ceil(out_features / bh) + 1]``, ``[nnzb]``.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]``, in the dtype of ``x``.
    """
    x, values, bias = autocast(x, values, bias)
    _check(x, values, row_ptr, col_idx, bias, out_features)
    return call("linear", x, values, row_ptr, col_idx, bias, out_features)


def linear_reference(
    x: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    return F.linear(x, _weight(values, row_ptr, col_idx, out_features, x.shape[-1]).to_dense(), bias)


def linear_grad_input_reference(
    grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, in_features: int
) -> Tensor:
    return grad @ _weight(values, row_ptr, col_idx, grad.shape[-1], in_features).to_dense()


def linear_grad_values_reference(grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int) -> Tensor:
    dense = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    kept = _weight(dense.new_empty(col_idx.shape[0], bh, bw), row_ptr, col_idx, *dense.shape).mask()
    return gather_blocks(dense, BlockPattern(bh, bw), kept)


def _weight(values: Tensor, row_ptr: Tensor, col_idx: Tensor, out_features: int, in_features: int) -> BlockSparse:
    pattern = BlockPattern(values.shape[1], values.shape[2])
    return BlockSparse(values, row_ptr, col_idx, (out_features, in_features), pattern)


def _check(x: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, bias: Tensor | None, out_features: int) -> None:
    if x.dim() < 1:
        raise ValueError("sparsekd.linear: input must be [..., in_features], got a scalar")
    check_weight("linear", values, row_ptr, col_idx, out_features)
    check_operands("linear", x, values, bias, out_features)


def _fake(
    x: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    _check(x, values, row_ptr, col_idx, bias, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


def _fake_grad_input(grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, in_features: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _fake_grad_values(grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int) -> Tensor:
    return x.new_empty(col_idx.shape[0], bh, bw)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, row_ptr, col_idx, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, values, row_ptr, col_idx)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, row_ptr, col_idx = ctx.saved_tensors
    need_x, need_values, *_ = ctx.needs_input_grad
    grad_x = call("linear_grad_input", grad, values, row_ptr, col_idx, x.shape[-1]) if need_x else None
    grad_values = call("linear_grad_values", grad, x, row_ptr, col_idx, *values.shape[1:]) if need_values else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[4] else None
    return grad_x, grad_values, None, None, grad_bias, None


def _save_two(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Both gradients are linear in their two operands: what autograd needs to differentiate them once more."""
    ctx.save_for_backward(*inputs[:4])


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple:
    """Of ``grad_input = grad_y W``, linear in both."""
    grad_y, values, row_ptr, col_idx = ctx.saved_tensors
    index = (row_ptr, col_idx)
    return (
        call("linear", grad, values, *index, None, grad_y.shape[-1]),
        call("linear_grad_values", grad_y, grad, *index, *values.shape[1:]),
        *(None,) * 3,
    )


def _backward_grad_values(ctx: Any, grad: Tensor) -> tuple:
    """Of ``grad_values = blocks of grad_y^T x``, linear in both."""
    grad_y, x, row_ptr, col_idx = ctx.saved_tensors
    index = (row_ptr, col_idx)
    return (
        call("linear", x, grad, *index, None, grad_y.shape[-1]),
        call("linear_grad_input", grad_y, grad, *index, x.shape[-1]),
        *(None,) * 4,
    )


define(
    "linear",
    "(Tensor x, Tensor values, Tensor row_ptr, Tensor col_idx, Tensor? bias, SymInt out_features) -> Tensor",
    linear_reference,
    _fake,
)
define(
    "linear_grad_input",
    "(Tensor grad, Tensor values, Tensor row_ptr, Tensor col_idx, SymInt in_features) -> Tensor",
    linear_grad_input_reference,
    _fake_grad_input,
)
define(
    "linear_grad_values",
    "(Tensor grad, Tensor x, Tensor row_ptr, Tensor col_idx, SymInt bh, SymInt bw) -> Tensor",
    linear_grad_values_reference,
    _fake_grad_values,
)
differentiate("linear", _backward, _save)
differentiate("linear_grad_input", _backward_grad_input, _save_two)
differentiate("linear_grad_values", _backward_grad_values, _save_two)
