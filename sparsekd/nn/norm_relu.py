"""ReLU that also does what stands before it: in training a batch norm, a residual and the ReLU are one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..backends.cpu import runs_norm_relu
from ..ops import norm_relu
from .layer import computes_as

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NormReLU(nn.Module):
    """``relu(norm(x) + residual)``: stands for an ``nn.ReLU``, and is given the batch norm before it, too.

        self.bn1, self.relu1 = nn.BatchNorm2d(64), sparsekd.nn.NormReLU()
        y = self.relu1(self.conv1(x), self.bn1)                  # for self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.conv2(y), self.bn2, residual=x)      # for self.relu2(self.bn2(self.conv2(y)) + x)

    The norm stays a module and a state of its own, and who looks at this module's output (taps, hooks) sees what stood
    behind ``nn.ReLU``. One kernel runs where the norm is a plain affine ``nn.BatchNorm2d`` in training, without hooks,
    and x is float32 in channels_last on a CPU, outside of ``torch.compile``, which fuses by itself: the op
    ``sparsekd.ops.norm_relu``. Everywhere else these are the three calls one after the other, with the same results up
    to rounding.
    """

    one_op = True  # False: the three calls everywhere, to compare with

    def forward(self, x: Tensor, norm: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
        """x, residual: [B, C, H, W]; without a norm, ReLU of x + residual."""
        if self.one_op and not torch.compiler.is_compiling() and _is_plain(norm) and _is_plain_call(x, norm, residual):
            return _in_one(x, norm, residual)
        y = x if norm is None else norm(x)
        return F.relu(y if residual is None else y + residual)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "NormReLU: TorchScript cannot compile a call that is given a module; use torch.jit.trace, torch.export or "
            "torch.compile"
        )


def _is_plain(norm: Any) -> bool:
    """Whether nothing of a norm is beyond what the op does and `_remember` keeps."""
    if not computes_as(norm, nn.BatchNorm2d) or not norm.training:
        return False
    needed = [norm.weight, norm.bias]
    if norm.track_running_stats:
        needed += [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    return (
        all(tensor is not None for tensor in needed)
        and not any(getattr(norm, hooks) for hooks in _HOOKS)
        and not torch_module._has_any_global_hook()
    )


def _is_plain_call(x: Tensor, norm: Any, residual: Tensor | None) -> bool:
    """Whether the op has a kernel for these. What the norm would refuse it gets to see, and so does who records."""
    if type(x) is not Tensor or x.dim() != 4 or x.shape[1] != norm.num_features:
        return False
    return (
        x.numel() > norm.num_features
        and (residual is None or residual.shape == x.shape)
        and runs_norm_relu(x, norm.weight, norm.bias, residual)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def _in_one(x: Tensor, norm: Any, residual: Tensor | None) -> Tensor:
    y, mean, variance = norm_relu(x, norm.weight, norm.bias, norm.eps, residual)
    if norm.track_running_stats:
        _remember(norm, mean, variance, x.numel() // x.shape[1])
    return y


@torch.no_grad()
def _remember(norm: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running averages, as ``nn.BatchNorm2d`` keeps them: of the variance divided by count - 1."""
    norm.num_batches_tracked.add_(1)
    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(variance * (count / (count - 1)), share)
