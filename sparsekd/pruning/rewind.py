"""theta0: what a model goes back to, and the state of a Pruner that has to be saved with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .surgery import state_slots
from .units import Units


class Theta0:
    """Values of a whole model at one moment: of the pruned weights in ``units.theta0``, of all else by name.

    Buffers with ``persistent=False`` are not among them: a saved training has none of them to go on from, and what they
    hold may belong to the blocks that are left.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Units]) -> None:
        self._model, self._layers = model, layers
        self.rest: dict[str, Tensor] | None = None

    @torch.no_grad()
    def remember(self) -> None:
        for units in self._layers:
            units.theta0 = units.parameter.detach().clone()
        self.rest = {name: tensor.clone() for name, tensor in self._rest_of_model()}

    @torch.no_grad()
    def restore(self, weights_only: bool) -> None:
        if self.rest is None:
            raise RuntimeError("Pruner.rewind: there is no theta0; make the Pruner with rewindable=True or snapshot()")
        for units in self._layers:
            assert units.theta0 is not None
            units.parameter.copy_(units.theta0)
        if not weights_only:
            for name, tensor in self._rest_of_model():
                tensor.copy_(self.rest[name])

    def state(self) -> dict[str, Tensor]:
        weights = {f"theta0.{u.name}": u.theta0 for u in self._layers if u.theta0 is not None}
        return weights | {f"rest0.{name}": tensor for name, tensor in (self.rest or {}).items()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave; the layers hold the blocks of then."""
        for units in self._layers:
            theta0 = state.get(f"theta0.{units.name}")
            units.theta0 = None if theta0 is None else theta0.to(units.parameter.device, copy=True)
        rest = {name.removeprefix("rest0."): tensor for name, tensor in state.items() if name.startswith("rest0.")}
        complete = all(units.theta0 is not None for units in self._layers)
        self.rest = {name: tensor.clone() for name, tensor in rest.items()} if complete else None

    def shapes(self) -> dict[str, torch.Size]:
        """Of all that is no pruned weight, under the names of :meth:`state`."""
        return {f"rest0.{name}": tensor.shape for name, tensor in self._rest_of_model()}

    def _rest_of_model(self) -> Iterator[tuple[str, Tensor]]:
        """Everything of the model's state that is not the weight of a pruned layer. Shares memory with the model."""
        own = {id(tensor) for units in self._layers for tensor in units.own_tensors}
        for name, tensor in self._model.state_dict(keep_vars=True).items():  # a layer may have several names
            if id(tensor) not in own and isinstance(tensor, Tensor):
                yield name, tensor.detach()


def check_state(
    state: dict[str, Any],
    settings: dict[str, Any],
    layers: Sequence[Units],
    theta0: Theta0,
    optimizers: Sequence[Optimizer],
) -> None:
    """Raise ValueError unless a Pruner of these settings and layers can go on from ``state``."""
    saved = state.get("settings")
    if saved != settings:
        key = next((key for key in settings if not saved or saved.get(key) != settings[key]), "settings")
        got = saved.get(key) if saved else None
        raise ValueError(
            f"Pruner.load_state_dict: this state belongs to another model or another Pruner: expected {key} "
            f"{settings.get(key)}, got {got}; build the model and the Pruner as they were when it was saved"
        )
    shapes = {f"mask.{units.name}": units.mask().shape for units in layers}
    if any(name.startswith("rest0.") for name in state):
        shapes |= theta0.shapes()
    for name, shape in shapes.items():
        if name not in state or state[name].shape != shape:
            got = tuple(state[name].shape) if name in state else "nothing"
            raise ValueError(f"Pruner.load_state_dict: expected {name} of shape {tuple(shape)}, got {got}")
    for units in layers:
        list(state_slots(units.parameter, optimizers))
        if bool((state[f"mask.{units.name}"].cpu() & ~units.mask().cpu()).any()):
            raise ValueError(
                f"Pruner.load_state_dict: layer {units.name!r} no longer has all the blocks of this state; load it "
                "into a Pruner of the freshly built dense model, or load the model's state first"
            )
