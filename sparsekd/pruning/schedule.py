"""When how much is removed: in shares of the dense network, or down to a number of what a unit counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .budget import UNITS, check_unit


@dataclass(frozen=True)
class LinearSchedule:
    """Every ``every`` epochs, remove another ``rate`` of the ORIGINAL cost, from ``start`` until ``final`` is gone.

    Linear in the original count because that is the only reading under which the paper reaches its 60 % (arXiv
    2401.10484, Table 2, which counts weights). All shares lie in (0, 1), ``start`` may be 0. They are shares of what
    ``unit`` names: multiply-adds (``"macs"``), ``"weights"``, ``"bytes"`` or predicted time (``"latency_us"``). A
    ``final`` above 1 is absolute and says what stays: ``LinearSchedule(0.2, 5, final=80, unit="latency_us")``.

    >>> LinearSchedule(rate=0.05, every=75, final=0.6).removed_after(epoch=160)
    0.1
    """

    rate: float
    every: int
    final: float
    start: float = 0.0
    unit: str = "macs"

    def __post_init__(self) -> None:
        check_unit("LinearSchedule", self.unit)
        for name, share in (("rate", self.rate), ("final", 0.5 if self.is_absolute else self.final)):
            if not 0.0 < share < 1.0:
                raise ValueError(
                    f"LinearSchedule: {name} must lie in (0, 1), got {share}; 0.05 is 5 % of the {UNITS[self.unit]}"
                )
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"LinearSchedule: every must be a positive number of epochs, got {self.every!r}")
        if not 0.0 <= self.start < (1.0 if self.is_absolute else self.final):
            raise ValueError(
                f"LinearSchedule: start must lie in [0, final), got start {self.start} and final {self.final}"
            )

    @property
    def is_absolute(self) -> bool:
        return 1.0 < self.final < math.inf

    def in_shares(self, dense: float) -> LinearSchedule:
        """The same schedule for a network that costs ``dense``: a number that stays becomes the share that goes."""
        if not self.is_absolute:
            return self
        return replace(self, final=_share_gone("LinearSchedule", self.unit, self.final, dense))

    @property
    def prunes(self) -> int:
        """How many prunes it takes to reach ``final``; of one in shares."""
        return math.ceil(round((self.final - self.start) / self.rate, 6))

    def removed_after(self, epoch: int) -> float:
        """Share of the original count that is to be gone after epoch ``epoch`` (counted from 1)."""
        done = epoch // self.every
        return self.final if done >= self.prunes else self.start + self.rate * done

    def check_reaches(self, epochs: int) -> None:
        """Raise ValueError unless ``final`` is reached before the last of ``epochs`` epochs, which does not prune."""
        last_prune = self.prunes * self.every
        if last_prune >= epochs:
            raise ValueError(
                f"LinearSchedule: {self.prunes} prunes every {self.every} epochs reach {self.final} after epoch "
                f"{last_prune}, and at least one epoch must follow, got {epochs} epochs; "
                f"train {last_prune + 1} epochs, prune more at a time or more often, or lower final"
            )


@dataclass(frozen=True)
class ListedSchedule:
    """Every ``every`` epochs, prune to the next of ``targets``: shares of the ORIGINAL that are then gone, of what
    ``unit`` names, as in :class:`LinearSchedule`. Numbers above 1 are absolute, fall, and say what stays.

    >>> ListedSchedule((0.3, 0.5, 0.6), every=10).removed_after(epoch=25)
    0.5
    """

    targets: tuple[float, ...]
    every: int
    start: float = 0.0
    unit: str = "macs"

    def __post_init__(self) -> None:
        check_unit("ListedSchedule", self.unit)
        falls = self.is_absolute and list(self.targets) == sorted(set(self.targets), reverse=True)
        shares = (self.start, *(() if falls else self.targets))
        if not self.targets or list(shares) != sorted(set(shares)) or not shares[0] >= 0 or not shares[-1] < 1:
            raise ValueError(
                f"ListedSchedule: targets must rise from above start ({self.start}) to below 1, or fall as numbers of "
                f"{UNITS[self.unit]} above 1, got {self.targets}"
            )
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"ListedSchedule: every must be a positive number of epochs, got {self.every!r}")

    @property
    def is_absolute(self) -> bool:
        return bool(self.targets) and all(1.0 < target < math.inf for target in self.targets)

    def in_shares(self, dense: float) -> ListedSchedule:
        """The same schedule for a network that costs ``dense``: numbers that stay become the shares that go."""
        if not self.is_absolute:
            return self
        targets = tuple(_share_gone("ListedSchedule", self.unit, target, dense) for target in self.targets)
        return replace(self, targets=targets)

    @property
    def final(self) -> float:
        return self.targets[-1]

    @property
    def prunes(self) -> int:
        return len(self.targets)

    def removed_after(self, epoch: int) -> float:
        """Share of the original count that is to be gone after epoch ``epoch`` (counted from 1)."""
        return (self.start, *self.targets)[min(epoch // self.every, self.prunes)]

    def check_reaches(self, epochs: int) -> None:
        """Raise ValueError unless the last prune comes before the last of ``epochs`` epochs."""
        if self.prunes * self.every >= epochs:
            raise ValueError(
                f"ListedSchedule: {self.prunes} prunes every {self.every} epochs end after epoch "
                f"{self.prunes * self.every}, and at least one epoch must follow, got {epochs} epochs"
            )


Schedule = LinearSchedule | ListedSchedule


def _share_gone(caller: str, unit: str, stays: float, dense: float) -> float:
    if stays >= dense:
        raise ValueError(
            f"{caller}: {unit}={stays:g} is to stay, but the dense network has only {dense:.6g} {UNITS[unit]}; "
            "ask for less, or prune nothing"
        )
    return 1.0 - stays / dense
