"""A layer shrinks or grows together with everything that has its shape: gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, Adafactor, Adagrad, Optimizer, Rprop

from ..blocks import spread
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
    for slot in slots:
        slot.write(slot.tensor[keep])


@torch.no_grad()
def grow_blocks(layer: BlockSparseLayer, mask: Tensor, optimizers: Iterable[Optimizer] = ()) -> Tensor:
    """Bring back, as zeros, the blocks that the block mask names: values, gradient and optimizer state grow together.

    The state of what comes back is that of a parameter which has never been stepped; step counters are those of the
    whole parameter and go on. Returns bool ``[nnzb]``: which of the blocks kept now were kept before. Raises as
    :func:`drop_blocks`.
    """
    values = layer.values
    slots = list(state_slots(values, optimizers))
    grad = values.grad
    survives = layer.grow_(mask)
    values.grad = None if grad is None else spread(grad, survives)
    for slot in slots:
        slot.write(spread(slot.tensor, survives))
        slot.tensor[~survives] = slot.fresh
    return survives


def check_optimizer(optimizer: Any) -> Optimizer:
    """It itself; raises TypeError unless its state can follow a parameter that changes its shape."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Pruner.attach: expected a torch optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, (LBFGS, Rprop, ASGD, Adafactor)):
        raise TypeError(
            f"Pruner.attach: the state of {type(optimizer).__name__} can be neither shrunk nor set back; "
            "use SGD, Adam, AdamW or the like"
        )
    return optimizer


class Slot:
    """One tensor of an optimizer's state that has its parameter's shape."""

    def __init__(self, optimizer: Optimizer, parameter: Tensor, key: str):
        self._state, self.key = optimizer.state[parameter], key
        # The one state whose start its constructor is told.
        self.fresh = optimizer.defaults.get("initial_accumulator_value", 0.0) if key == "sum" else 0.0

    @property
    def tensor(self) -> Tensor:
        return self._state[self.key]

    def write(self, tensor: Tensor) -> None:
        self._state[self.key] = tensor


def state_slots(parameter: Tensor, optimizers: Iterable[Optimizer]) -> Iterator[Slot]:
    """Every optimizer state tensor that follows the shape of ``parameter`` (step counters do not)."""
    for optimizer in optimizers:
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, (Tensor, list)) or (isinstance(value, Tensor) and value.dim() == 0):
                continue
            if key in getattr(optimizer, "state_of_rows", ()):
                continue  # one number for each row of a table, which stays
            if isinstance(value, list) or value.shape != parameter.shape:
                raise TypeError(
                    f"sparsekd.pruning: the state {key!r} of {type(optimizer).__name__} does not have the parameter's "
                    f"shape {tuple(parameter.shape)}, so it cannot change along; use SGD, Adam, AdamW or the like, and "
                    "load an optimizer's state last"
                )
            yield Slot(optimizer, parameter, key)


@torch.no_grad()
def forget(parameters: Iterable[Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Set all state of these parameters back, step counters too, as if training began now."""
    every = list(parameters)
    for optimizer in optimizers:
        for parameter in every:
            if isinstance(optimizer, Adagrad) and parameter in optimizer.state:
                # The one whose state is made by its constructor and not by the first step.
                optimizer.state[parameter]["sum"].fill_(optimizer.defaults["initial_accumulator_value"])
                optimizer.state[parameter]["step"].zero_()
            else:
                optimizer.state.pop(parameter, None)


def parameter_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
