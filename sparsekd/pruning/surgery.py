"""Shrinking a layer together with everything that has its shape: gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..nn import BlockSparseLayer


@torch.no_grad()
def drop_blocks(layer: BlockSparseLayer, keep: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
    """Drop the blocks that ``keep [nnzb]`` (bool) does not name: values, gradient and optimizer state shrink together.

    Works for every optimizer whose state tensors have their parameter's shape (SGD, Adam and its family, RMSprop,
    Adagrad). Raises TypeError, before anything has changed, for one that keeps something else (Adafactor, LBFGS).
    """
    values = layer.values
    slots = list(state_slots(values, optimizers))
    grad = values.grad
    layer.keep_(keep)
    values.grad = None if grad is None else grad[keep]
    for state, key in slots:
        state[key] = state[key][keep]


def state_slots(parameter: Tensor, optimizers: Iterable[Optimizer]) -> Iterator[tuple[dict[str, Any], str]]:
    """(state, key) of every optimizer state tensor that follows the shape of ``parameter`` (step counters do not)."""
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, (Tensor, list)) or (isinstance(value, Tensor) and value.dim() == 0):
                continue
            if isinstance(value, list) or value.shape != parameter.shape:
                raise TypeError(
                    f"sparsekd.pruning: the state {key!r} of {type(optimizer).__name__} does not have the parameter's "
                    f"shape {tuple(parameter.shape)}, so it cannot shrink along; use SGD, Adam, AdamW or the like, and "
                    "load an optimizer's state last"
                )
            yield state, key
