"""Copies of a model that keep its shapes while it is pruned: averages of its weights (EMA, SWA)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim.swa_utils import AveragedModel

from .units import Units


def attach_copy(layers: Sequence[Units], copy: nn.Module) -> None:
    """From now on every layer of ``copy`` drops, and gets back, what the layer of its name does.

    Raises ValueError, before anything has changed, for a copy that lacks a layer or has other blocks.
    """
    modules = dict((copy.module if isinstance(copy, AveragedModel) else copy).named_modules())
    missing = [units.name for units in layers if units.name not in modules]
    if missing:
        raise ValueError(f"Pruner.attach: the copy has no {', '.join(missing)}; attach a deepcopy of the model")
    for units in layers:
        units.check_copy(modules[units.name])
    for units in layers:
        if not any(modules[units.name] is known for known in units.copies):
            units.copies.append(modules[units.name])
