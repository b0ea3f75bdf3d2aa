"""What a network may cost, and in what that is counted: weights, multiply-adds, bytes or microseconds.

    pruner.prune_to(macs=0.7)                  # 70 % of the multiply-adds are gone
    pruner.prune_to(latency_us=80)             # what is left takes 80 microseconds
    sparsify(model, macs=0.3, example_inputs=(x,))          # 30 % of the multiply-adds stay

A number up to 1 is a share of the dense network; one above is absolute and says what stays. Weights, multiply-adds
and bytes are those of the layers that can be pruned, for one example; microseconds are those of the whole network, by a
:class:`CostTable`, at the batch size and with the threads of that table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .units import Entries, Units

UNITS = {"weights": "weights", "macs": "multiply-adds", "bytes": "bytes", "latency_us": "microseconds"}
INDEX_BYTES = 4  # of a block's column


@dataclass(frozen=True)
class Budget:
    """A number in a unit. ``removed``: a share counts what goes, not what stays."""

    unit: str
    number: float
    removed: bool = False

    @classmethod
    def of(cls, caller: str, removed: bool, **numbers: float | None) -> Budget:
        """The one budget among keyword arguments named by unit.

        Raises ValueError for none, for two, and for a number that means nothing.
        """
        given = {unit: number for unit, number in numbers.items() if number is not None}
        if len(given) != 1:
            raise ValueError(
                f"{caller}: expected one budget of {', '.join(UNITS)}, got {', '.join(given) or 'none'}; "
                "a network is pruned until one number is reached"
            )
        ((unit, number),) = given.items()
        check_unit(caller, unit)
        _check_number(caller, unit, number)
        if not 0.0 <= number < float("inf") or number == float(removed):
            raise ValueError(
                f"{caller}: {unit} must be a share in {'[0, 1)' if removed else '(0, 1]'} of the dense network, or a "
                f"number of {UNITS[unit]} above 1, got {number}"
            )
        return cls(unit, float(number), removed)

    @classmethod
    def parse(cls, caller: str, text: str) -> Budget:
        """Of "unit=number": "macs=0.3" keeps 30 % of the multiply-adds, "latency_us=900" what takes 900 us."""
        unit, _, number = text.partition("=")
        try:
            return cls.of(caller, False, **{unit: float(number)})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{caller}: --budget takes UNIT=NUMBER with one of {', '.join(UNITS)}, got {text!r}: {error}"
            ) from None

    @classmethod
    def to_remove(cls, caller: str, removed_share: float | Budget | None, **numbers: float | None) -> Budget:
        """Of a method that takes a share of the weights, or a budget, by position, or a budget by name."""
        if isinstance(removed_share, Budget):
            named = [unit for unit, number in numbers.items() if number is not None]
            if named:
                raise ValueError(f"{caller}: expected one budget, got {removed_share} and {', '.join(named)}= too")
            return cls.of(caller, removed_share.removed, **{**numbers, removed_share.unit: removed_share.number})
        if removed_share is None:
            return cls.of(caller, True, **numbers)
        _check_number(caller, "removed_share", removed_share)
        if not 0.0 <= removed_share < 1.0:
            raise ValueError(f"{caller}: removed_share must lie in [0, 1), got {removed_share}")
        if numbers["weights"] is not None:
            raise ValueError(f"{caller}: removed_share counts weights, got weights={numbers['weights']} too")
        return cls.of(caller, True, **{**numbers, "weights": removed_share})

    @property
    def is_share(self) -> bool:
        return self.number <= 1.0

    def excess(self, dense: float, now: float) -> float:
        """What has to go of what is there ``now``; below 0: what may come back."""
        if not self.is_share:
            return now - self.number
        if self.removed:
            return self.number * dense - (dense - now)
        return now - self.number * dense

    def amount(self, cost: float, dense: float) -> str:
        """A cost in the words of this budget."""
        if not self.is_share:
            return f"{self.unit}={cost:.6g}"
        return f"{self.unit}={1 - cost / dense if self.removed else cost / dense:.4g}"

    def describe_past(self, now: float, dense: float) -> str:
        """Why a network that costs ``now``, less than this, cannot be pruned to it."""
        if not self.is_share and self.number > dense:
            return (
                f"{self} is to stay, but the dense network has only {dense:.6g} {UNITS[self.unit]}; ask for less, or "
                "prune nothing"
            )
        return (
            f"the network is at {self.amount(now, dense)}, and {UNITS[self.unit]} that are gone do not come back, got "
            f"{self.number:g}; grow_to brings some back, or load an earlier checkpoint"
        )

    def __str__(self) -> str:
        return f"{self.unit}={self.number:g}"


def check_unit(caller: str, unit: str) -> None:
    if unit not in UNITS:
        raise ValueError(f"{caller}: a budget counts one of {', '.join(UNITS)}, got {unit!r}")


class Linear:
    """A cost that every kept entry adds its part to. ``dense`` is that of the layers when nothing was pruned."""

    def __init__(self, unit: str, layers: Sequence[Units], uses: Mapping[str, float]) -> None:
        self.unit, self._uses = unit, uses
        self.dense = float(sum(self._of_dense(units) for units in layers))

    def marginal(self, units: Units, entries: Entries, scores: Tensor | None = None, kept: int = 0) -> Tensor:
        """``[units]``: what each unit adds to the cost, whatever goes before it."""
        if self.unit == "bytes":
            return entries.unit_counts() * _stored(units)
        return entries.unit_sizes() * self._uses[units.name] if self.unit == "macs" else entries.unit_sizes()

    def total(self, layers: Sequence[Units]) -> float:
        """What the layers cost now."""
        return float(sum(self._of_kept(units) for units in layers))

    def left(self, layers: Sequence[Units], keep: Sequence[Tensor]) -> float:
        """What the layers cost once of their kept entries only those in ``keep`` (bool) are there."""
        return float(sum(self._of_entries(u, u.kept_sizes()[stay]) for u, stay in zip(layers, keep, strict=True)))

    def gone(self, layers: Sequence[Units]) -> float:
        """What is not there, and could come back."""
        return float(sum(self._of_entries(units, units.gone().sizes) for units in layers))

    def grain(self, layers: Sequence[Units]) -> float:
        """The cost of the largest unit there is: no target can be asked to be nearer."""
        kept = [(units, units.kept()) for units in layers if units.num_kept]
        return max(float(self.marginal(units, entries).max()) for units, entries in kept)

    def _of_entries(self, units: Units, sizes: Tensor) -> float:
        if self.unit == "bytes":
            return len(sizes) * _stored(units)
        return int(sizes.sum()) * (self._uses[units.name] if self.unit == "macs" else 1)

    def _of_kept(self, units: Units) -> float:
        if self.unit == "bytes":
            return self._of_entries(units, units.kept_sizes())
        return units.num_kept * (self._uses[units.name] if self.unit == "macs" else 1)

    def _of_dense(self, units: Units) -> float:
        if self.unit == "bytes":
            return units.num_weights * units.parameter.element_size()
        return units.num_weights * (self._uses[units.name] if self.unit == "macs" else 1)


def _stored(units: Units) -> int:
    """Bytes of a block, with its place."""
    return units.entry_weights * units.parameter.element_size() + INDEX_BYTES


def _check_number(caller: str, name: str, number: Any) -> None:
    if isinstance(number, str):
        raise TypeError(f"{caller}: {name} must be a number, got the text {number!r}")
