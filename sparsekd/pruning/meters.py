"""What counts in each unit, for the layers of one Pruner."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .budget import UNITS, Linear
from .choice import Meter
from .cost import CostTable, Timed
from .observe import check_called
from .units import Units


class Meters:
    """``uses``: layer -> multiply-adds of each of its weights for one example, None as long as nobody has looked."""

    def __init__(
        self, model: nn.Module, layers: Sequence[Units], costs: CostTable | None, floor: float, makes_faster: bool
    ) -> None:
        self._model, self._layers, self._floor, self._makes_faster = model, layers, floor, makes_faster
        self.costs = costs
        self.uses: dict[str, float] | None = None
        if costs is not None:
            self.of("Pruner", "latency_us")  # refuses the costs of another network

    def of(self, caller: str, unit: str) -> Meter:
        """Raises ValueError where nothing can count in this unit."""
        if unit in ("bytes", "latency_us") and not self._makes_faster:
            raise ValueError(
                f"{caller}: masks on dense layers save no {UNITS[unit]}; count weights or macs, or prune blocks"
            )
        if unit == "macs":
            return Linear("macs", self._layers, self._called(caller))
        if unit != "latency_us":
            return Linear(unit, self._layers, {})
        if self.costs is None:
            raise ValueError(
                f"{caller}: latency_us needs the costs of layers; give Pruner(costs=CostTable.measure(model, inputs))"
            )
        return Timed(self.costs, self._model, self._layers, self._floor)

    def macs(self) -> tuple[float, float] | None:
        """(when dense, now), of the layers for one example; None if unknown."""
        if self.uses is None or any(units.name not in self.uses for units in self._layers):
            return None
        meter = self.of("Pruner", "macs")
        return meter.dense, meter.total(self._layers)

    def us(self) -> tuple[float, float] | None:
        """(when dense, now) of the whole network; None without costs."""
        return None if self.costs is None else (self.costs.dense_us, self.costs.predict(self._model))

    def _called(self, caller: str) -> dict[str, float]:
        if self.uses is None:
            raise ValueError(f"{caller}: macs are counted on an example; give Pruner(example_inputs=(x,))")
        check_called(caller, [units.name for units in self._layers], self.uses)
        return self.uses
