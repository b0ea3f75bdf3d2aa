"""Batch norm by the statistics of the batch, a residual and ReLU, as one op with one gradient.

B images, C channels, H x W pixels. Torch runs these one after the other, and each reads its maps and writes them again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._schema import call, define, differentiate, sum_dtype
from .conv2d import memory_format

_PIXELS = (0, 2, 3)


def norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(weight * (x - mean) / sqrt(variance + eps) + bias + residual), what `nn.BatchNorm2d` in training does (Ioffe
    & Szegedy, arXiv 1502.03167, algorithm 1), the sum of a residual block, and `nn.ReLU`.

    x, residual: [B, C, H, W], floating point; fastest in channels_last and float32. weight, bias: [C].
    Returns the result, and mean and variance [C] of the batch, the variance divided by B*H*W. These two get no
    gradient of their own; they are for running averages.

    Raises ValueError for shapes that do not fit, or fewer than two values per channel, and TypeError for other dtypes.
    """
    _check(x, weight, bias, residual)
    y, mean, variance = call("norm_relu", x, weight, bias, eps, residual)
    return y, mean, variance


def norm_relu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        variance, mean = torch.var_mean(x.to(sum_dtype(x)), _PIXELS, correction=0)
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    y = F.relu(y if residual is None else y + residual)
    return y.contiguous(memory_format=memory_format(x)), mean, variance


def norm_relu_grad_reference(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, residual, weight and bias; that to the residual is empty without one. y: the result, which says
    where it was positive; None where there was no residual, so that x says it."""
    layout, wide = memory_format(x), sum_dtype(x)
    inverse = (variance + eps).rsqrt()[:, None, None]
    apart = x.to(wide) - mean[:, None, None]
    positive = y if y is not None else apart * inverse * weight[:, None, None] + bias[:, None, None]
    passed = torch.where(positive <= 0, 0.0, grad.to(wide))
    to_residual = grad.new_empty(0) if y is None else passed.to(grad.dtype).contiguous(memory_format=layout)
    count = x.numel() // x.shape[1]
    to_bias, to_weight = passed.sum(_PIXELS), (passed * apart * inverse).sum(_PIXELS)
    rest = (to_bias[:, None, None] + apart * inverse * to_weight[:, None, None]) / count
    to_x = ((passed - rest) * inverse * weight[:, None, None]).to(x.dtype)
    return to_x.contiguous(memory_format=layout), to_residual, to_weight.to(weight.dtype), to_bias.to(bias.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"sparsekd.norm_relu: x must be [B, C, H, W], got {tuple(x.shape)}; add unit dimensions")
    if x.numel() < 2 * x.shape[1]:
        raise ValueError(
            f"sparsekd.norm_relu: a channel needs two values or more for a variance, got x of {tuple(x.shape)}; take "
            "larger batches, or put the norm in evaluation mode"
        )
    for name, operand, shape in (
        ("weight", weight, x.shape[1:2]),
        ("bias", bias, x.shape[1:2]),
        ("residual", residual, x.shape),
    ):
        if operand is None:
            continue
        if operand.shape != shape:
            raise ValueError(f"sparsekd.norm_relu: {name} must be {tuple(shape)}, got {tuple(operand.shape)}")
        if operand.dtype != x.dtype:
            raise TypeError(
                f"sparsekd.norm_relu: x and {name} must have one dtype, got {x.dtype} and {operand.dtype}; convert the "
                f"module with .to({x.dtype})"
            )
    if not x.is_floating_point():
        raise TypeError(f"sparsekd.norm_relu: x must be floating point, got {x.dtype}")


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = (x.new_empty(x.shape[1], dtype=sum_dtype(x)) for _ in range(2))
    return torch.empty_like(x, memory_format=memory_format(x)), mean, variance


def _fake_grad(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = memory_format(x)
    to_residual = grad.new_empty(0) if y is None else torch.empty_like(y, memory_format=layout)
    return torch.empty_like(x, memory_format=layout), to_residual, torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, eps, residual = inputs
    y, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.eps = eps
    ctx.save_for_backward(x, None if residual is None else y, weight, bias, mean, variance)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, y, weight, bias, mean, variance = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: what the kernel computes has no derivative
        return _backward_again(ctx, grad, x, y, weight, bias)
    to_x, to_residual, to_weight, to_bias = call("norm_relu_grad", grad, x, y, weight, bias, mean, variance, ctx.eps)
    return to_x, to_weight, to_bias, None, None if y is None else to_residual


def _backward_again(
    ctx: Any, grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor | None, ...]:
    """The same by torch's ops, whose results can be differentiated once more."""
    # Views, so that autograd.grad stops at them: x may itself depend on the weight.
    x, weight, bias = (t.view_as(t) for t in (x, weight, bias))
    normal = F.batch_norm(x, None, None, weight, bias, training=True, eps=ctx.eps)
    passed = torch.where((normal if y is None else y).detach() <= 0, 0.0, grad)
    wanted = [(i, t) for i, t in enumerate((x, weight, bias)) if t.requires_grad]
    grads: list[Tensor | None] = [None, None, None]
    if wanted:
        found = torch.autograd.grad(normal, [t for _, t in wanted], passed, create_graph=True)
        for (i, _), one in zip(wanted, found, strict=True):
            grads[i] = one
    return *grads, None, None if y is None else passed


define(
    "norm_relu",
    "(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? residual) -> (Tensor, Tensor, Tensor)",
    norm_relu_reference,
    _fake,
)
define(
    "norm_relu_grad",
    "(Tensor grad, Tensor x, Tensor? y, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    norm_relu_grad_reference,
    _fake_grad,
)
differentiate("norm_relu", _backward, _save)
