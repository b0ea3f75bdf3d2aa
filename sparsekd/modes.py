"""Evaluation mode for a while, a look at a model that leaves no trace in it; and a model without torch.compile."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluation_mode", "uncompiled"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The whole model in evaluation mode; every module is back in its own mode afterwards.

    `model.train()` would not do for the way back: a module that its owner keeps in evaluation mode would train.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def uncompiled(model: nn.Module) -> nn.Module:
    """What `torch.compile` was given, where the model comes from it; any other model itself."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # loaded by the first torch.compile, in seconds
    return model._orig_mod if dynamo is not None and isinstance(model, dynamo.OptimizedModule) else model
