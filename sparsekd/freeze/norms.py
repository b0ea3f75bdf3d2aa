"""Batch norms as a scale and a shift for each channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .kinds import hooked


class ScaleAndShift(nn.BatchNorm1d):
    """What no layer takes in of a BatchNorm1d: ``x * scale + shift`` in one pass.

    It has the state of the norm, which is what files hold.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        mean: Any = norm.running_mean
        super().__init__(norm.num_features, norm.eps, affine=norm.affine, device=mean.device, dtype=mean.dtype)
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.empty_like(mean), persistent=False)
        self.eval().requires_grad_(False).load_state_dict(norm.state_dict())

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        for own, tensor in zip((self.scale, self.shift), scale_and_shift(self), strict=True):
            own.copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C]`` or ``[N, C, L]``."""
        scale, shift = (self.scale, self.shift) if x.dim() == 2 else (self.scale[:, None], self.shift[:, None])
        return torch.addcmul(shift, x, scale)


def scale_and_shift(norm: Any, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scale, shift) of ``bn(y + bias) = scale * y + shift``, in float64."""
    ones, zeros = torch.ones_like(norm.running_mean), torch.zeros_like(norm.running_mean)
    gamma, shift = (ones, zeros) if norm.weight is None else (norm.weight.detach(), norm.bias.detach())
    scale = gamma.double() / (norm.running_var.double() + norm.eps).sqrt()
    centre = (0.0 if bias is None else bias.double()) - norm.running_mean.double()
    return scale, shift.double() + scale * centre


def simpler(module: nn.Module) -> nn.Module:
    """What a frozen network calls in place of a module that is none of its layers."""
    if type(module) is not nn.BatchNorm1d or module.training or module.running_mean is None or hooked(module):
        return module
    return ScaleAndShift(module)


__all__ = ["ScaleAndShift", "scale_and_shift", "simpler"]
