"""ReLU that also does what stands before it: in training a batch norm, a residual and the ReLU are one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import cpu
from ..ops import norm_relu


class NormReLU(nn.ReLU):
    """``relu(norm(x) + residual)``: an ``nn.ReLU`` that is given the batch norm before it, too.

        self.bn1, self.relu1 = nn.BatchNorm2d(64), sparsekd.nn.NormReLU()
        y = self.relu1(self.conv1(x), self.bn1)                  # for self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.conv2(y), self.bn2, residual=x)      # for self.relu2(self.bn2(self.conv2(y)) + x)

    The norm stays a module and a state of its own, and who looks at this module's output (taps, hooks) sees what stood
    behind ``nn.ReLU``. One kernel runs where the norm is a plain ``nn.BatchNorm2d`` in training, without hooks, and x
    is float32 in channels_last on a CPU: it reads and writes the maps about half as often, in either direction (op
    ``sparsekd.ops.norm_relu``). Everywhere else these are the three calls one after the other, with the same results
    up to rounding.
    """

    one_op = True  # False: the three calls everywhere, to compare with

    def forward(self, x: Tensor, norm: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x, residual: [B, C, H, W]; without a norm, ReLU of x + residual."""
        if isinstance(norm, nn.BatchNorm2d) and self.one_op and _takes(x, norm, residual):
            y, mean, variance = norm_relu(x, norm.weight, norm.bias, norm.eps, residual)
            _remember(norm, mean, variance, x.numel() // x.shape[1])
            return y
        y = x if norm is None else norm(x)
        return F.relu(y if residual is None else y + residual)


def _takes(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None) -> bool:
    """Whether the op stands for the three calls here, and has a kernel. What the norm would refuse it gets to see."""
    if type(x) is not Tensor or type(norm) is not nn.BatchNorm2d or not norm.training or torch.compiler.is_compiling():
        return False
    plain = (x, norm.weight, norm.bias) if residual is None else (x, norm.weight, norm.bias, residual)
    return (
        cpu.native is not None
        and not _has_hooks(norm)
        and all(t is not None and t.dtype == torch.float32 and t.is_cpu for t in plain)
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] == norm.num_features
        and x.numel() > norm.num_features
        and (residual is None or residual.shape == x.shape)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@torch.no_grad()
def _remember(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running averages, as ``nn.BatchNorm2d`` keeps them: of the variance divided by count - 1."""
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(variance * (count / (count - 1)), share)
