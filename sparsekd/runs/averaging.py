"""The average of a network's weights over its latest steps, which errs less than the weights of any one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AveragedWeights:
    """An exponential moving average of what trains in ``model``: what is scored and kept, while the weights train on.

    average <- decay * average + (1 - decay) * weights after every step, with the smaller decay (1 + n) / (10 + n) after
    the first n steps, so that the start is forgotten (as in Tan and Le, EfficientNet, ICML 2019, whose code does both).
    After a prune it begins anew (``restart``): the model has parameters of other sizes then.

    decay: 0 averages nothing, and ``in_place`` leaves the model as it is.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.average: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Call after every step of the optimizer."""
        if not self.decay:
            return
        trained = _trained(self.model)
        self.steps += 1
        if self.steps == 1:
            self.average = [parameter.detach().clone() for parameter in trained]
        else:
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, trained, 1 - decay)

    def restart(self) -> None:
        """Forget what was: call after a prune."""
        self.steps, self.average = 0, []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights."""
        trained = _trained(self.model) if self.steps else []
        before = [parameter.detach().clone() for parameter in trained]
        _copy(trained, self.average)
        try:
            yield
        finally:
            _copy(trained, before)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, **{f"average.{place}": tensor for place, tensor in enumerate(self.average)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the average is of another model."""
        self.steps = int(state["steps"])
        self.average = [state[f"average.{place}"] for place in range(len(state) - 1)]
        trained = _trained(self.model) if self.steps else []
        if [tensor.shape for tensor in self.average] != [parameter.shape for parameter in trained]:
            raise ValueError("AveragedWeights.load_state_dict: the state is of a model with other parameters")
        self.average = [torch.empty_like(p).copy_(t) for p, t in zip(trained, self.average, strict=True)]


def _trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def _copy(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
