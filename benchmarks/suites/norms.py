"""Batch norm, residual and ReLU in training, forward and backward, in channels_last.

`plain` are torch's ops one after the other; `compiled` (--compile) is torch.compile of ours.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.contest import Case, Contest, Setup, contest_of_gradients
from sparsekd.ops import norm_relu

# Images, channels and side: of our rating network, WRN-16-2 and ResNet-18.
_SHAPES = ((512, 32, 8), (512, 64, 4), (64, 32, 32), (64, 128, 8), (64, 64, 32), (64, 512, 4))
_QUICK = ((8, 16, 8),)
_EPS = 1e-5


def cases(setup: Setup) -> list[Case]:
    names = ("plain", "ours", *(("compiled",) if setup.compile else ()))
    return [
        Case(f"norm-{'sum-' * with_sum}relu-{c}x{side}-n{n}", names, partial(_build, setup, (n, c, side), with_sum))
        for n, c, side in (_QUICK if setup.quick else _SHAPES)
        for with_sum in (False, True)
    ]


def _build(setup: Setup, shape: tuple[int, int, int], with_sum: bool) -> Contest:
    n, c, side = shape

    def maps() -> Tensor:
        return torch.randn(n, c, side, side, device=setup.device).to(memory_format=torch.channels_last)

    x, gradient = maps().requires_grad_(), maps()
    residual = maps().requires_grad_() if with_sum else None
    weight, bias = (torch.rand(c, device=setup.device, requires_grad=True) for _ in range(2))

    def summed() -> Tensor:
        y = F.batch_norm(x, None, None, weight, bias, training=True, eps=_EPS)
        return y if residual is None else y + residual

    def plain() -> Tensor:
        return F.relu(summed())

    def ours() -> Tensor:
        return norm_relu(x, weight, bias, _EPS, residual)[0]

    # What rounding may put on either side of 0 has no gradient to compare.
    gradient.masked_fill_(summed().detach().abs() < 1e-3, 0.0)
    wanted = [x, weight, bias, *([] if residual is None else [residual])]
    return contest_of_gradients(setup, {"plain": plain, "ours": ours}, wanted, gradient)
