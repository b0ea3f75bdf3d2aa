"""What must be zero after every step: the padding of blocks, masked weights, and all that dies with a filter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .batch_norm import first_batch_norm
from .surgery import state_slots
from .units import Units

# Where a filter starts again. Its weights are zero, so it puts out this alone; at 0, ReLU would pass no gradient, and
# the filter would never move.
ALIVE = 1e-3


class _Zeros(NamedTuple):
    """Entries of a parameter that are zero; ``dead`` if they count as removed parameters."""

    name: str
    parameter: nn.Parameter
    zero: Tensor  # bool, the parameter's shape
    dead: bool


class _Channels(NamedTuple):
    """Entries, one a channel, of a tensor that hangs on the filters of a layer."""

    name: str
    tensor: Tensor
    dead: Tensor  # bool, the tensor's shape
    buried: float  # what a dead channel holds
    alive: float  # what one that comes back to life starts with
    trains: bool  # a parameter, which every step may change


class Held:
    """Knows which batch norm hangs on which layer, holds what is dead at zero, and lets it go when it comes back.

    ``batch_norms``: batch norm -> the layers that feed it, None as long as nobody has looked.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Units]) -> None:
        self.model, self.layers = model, layers
        self.batch_norms: dict[str, list[str]] | None = None
        self._zeros: list[_Zeros] = []

    @property
    def observed(self) -> bool:
        return self.batch_norms is not None or first_batch_norm(self.model) is None

    @property
    def num_dead_parameters(self) -> int:
        return sum(int(zeros.zero.sum()) for zeros in self._zeros if zeros.dead)

    @torch.no_grad()
    def bury(self, optimizers: Sequence[Optimizer]) -> None:
        """Hold what has died, and make the running statistics of dead channels those of a channel that is always 0."""
        self.collect()
        self.zero(optimizers)
        for channels in self._channels():
            if not channels.trains:
                channels.tensor[channels.dead] = channels.buried

    def collect(self) -> None:
        """Look which entries must be zero from now on."""
        padding = [_Zeros(f"{u.name} weight", u.parameter, u.always_zero(), False) for u in self.layers]
        dead = [_Zeros(each.name, each.tensor, each.dead, True) for each in self._channels() if each.trains]  # type: ignore[arg-type]
        self._zeros = [zeros for zeros in (*padding, *dead) if bool(zeros.zero.any())]

    @torch.no_grad()
    def zero(self, optimizers: Sequence[Optimizer]) -> None:
        for _, parameter, zero, _ in self._zeros:
            parameter.masked_fill_(zero, 0)
            for slot in state_slots(parameter, optimizers):
                slot.tensor.masked_fill_(zero, 0)

    def dead(self) -> dict[str, Tensor]:
        """Tensor's name -> bool, its dead channels: what :meth:`revive` compares with."""
        return {channels.name: channels.dead for channels in self._channels()}

    @torch.no_grad()
    def revive(self, dead_before: dict[str, Tensor], remembered: dict[str, Tensor]) -> None:
        """Give every channel that has come back to life values with which it can learn, in ``remembered`` too (name in
        the state dict -> the value to rewind to)."""
        names: dict[int, list[str]] = {}  # of all tensors; a tied one has several
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
        for channels in self._channels():
            back = dead_before[channels.name] & ~channels.dead
            channels.tensor[back] = channels.alive
            for name in names.get(id(channels.tensor), []):
                if name in remembered:
                    remembered[name][back] = channels.alive

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        for zeros in self._zeros:
            state = [slot.tensor for slot in state_slots(zeros.parameter, optimizers)]
            if any(bool((tensor[zeros.zero] != 0).any()) for tensor in (zeros.parameter, *state)):
                raise RuntimeError(
                    f"Pruner.check: {zeros.name} has come back to life; call after_step() after every optimizer.step()"
                )

    def _channels(self) -> Iterator[_Channels]:
        """Biases of convolutions, and of linear layers that feed a batch norm; the batch norms."""
        batch_norms = self.batch_norms or {}
        feeding = {source for sources in batch_norms.values() for source in sources}
        for units in self.layers:
            is_linear = len(units.describe()["shape"]) == 2
            if units.layer.bias is not None and (not is_linear or units.name in feeding):
                alive = 0.0 if units.name in feeding else ALIVE
                yield _Channels(f"{units.name}.bias", units.layer.bias, units.dead_outputs(), 0.0, alive, True)
        for name, sources in batch_norms.items():
            batch_norm: Any = self.model.get_submodule(name)
            dead = self._dead_inputs(sources)
            if batch_norm.affine:
                yield _Channels(f"{name}.weight", batch_norm.weight, dead, 0.0, 1.0, True)
                yield _Channels(f"{name}.bias", batch_norm.bias, dead, 0.0, ALIVE, True)
            if batch_norm.track_running_stats and batch_norm.running_mean is not None:
                yield _Channels(f"{name}.running_mean", batch_norm.running_mean, dead, 0.0, 0.0, False)
                yield _Channels(f"{name}.running_var", batch_norm.running_var, dead, 1.0, 1.0, False)

    def _dead_inputs(self, sources: list[str]) -> Tensor:
        by_name = {units.name: units for units in self.layers}
        return torch.stack([by_name[source].dead_outputs() for source in sources]).all(0)
