"""When how much is removed: in shares of the dense network, or down to a number of what a unit counts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from .budget import UNITS, check_unit


class _Rhythm:
    """What schedules share: after which epochs they prune."""

    every: int
    first: int | None

    @property
    def prunes(self) -> int:
        """How many there are; of a schedule in shares."""
        raise NotImplementedError

    @property
    def first_prune(self) -> int:
        """The epoch after which the first prune comes; 0 is before the first step of training."""
        return self.every if self.first is None else self.first

    @property
    def prune_epochs(self) -> list[int]:
        """The epochs after which a prune comes; of a schedule in shares."""
        return [self.first_prune + place * self.every for place in range(self.prunes)]

    @property
    def last_prune(self) -> int:
        """The epoch after which the last prune comes; of a schedule in shares."""
        return self.prune_epochs[-1]

    def _passed(self, epoch: int) -> int:
        """How many prunes have come after ``epoch``, if they go on."""
        return max(0, (epoch - self.first_prune) // self.every + 1)

    def _check_rhythm(self) -> None:
        kind = type(self).__name__
        if not _is_whole(self.every) or self.every < 1:
            raise ValueError(f"{kind}: every must be a positive number of epochs, got {self.every!r}")
        if self.first is not None and (not _is_whole(self.first) or self.first < 0):
            raise ValueError(
                f"{kind}: first must be an epoch, after which the first prune comes, or 0 for a prune before the first "
                f"step, got {self.first!r}"
            )


@dataclass(frozen=True)
class LinearSchedule(_Rhythm):
    """Every ``every`` epochs, remove another ``rate`` of the ORIGINAL cost, from ``start`` until ``final`` is gone.

    The first prune comes after epoch ``first``, by default ``every``; 0 is before the first step, see
    ``Staged.before_training``. ``start`` is the share that the schedule finds gone, removed by an earlier stage or from
    a student that was pruned before: the first prune goes on from there, to ``start + rate``, and nothing is removed
    before it. Where less than ``start`` is gone by then, the first prune removes the rest of it too.

    Linear in the original count because that is the only reading under which the paper reaches its 60 % (arXiv
    2401.10484, Table 2, which counts weights). All shares lie in (0, 1), ``start`` may be 0. They are shares of what
    ``unit`` names: multiply-adds (``"macs"``), ``"weights"``, ``"bytes"`` or predicted time (``"latency_us"``). A
    ``final`` above 1 is absolute and says what stays: ``LinearSchedule(0.2, 5, final=80, unit="latency_us")``.

    >>> LinearSchedule(rate=0.05, every=75, final=0.6).removed_after(epoch=160)
    0.1
    >>> LinearSchedule(rate=0.05, every=75, final=0.6, first=0).removed_after(epoch=0)
    0.05
    >>> [LinearSchedule(rate=0.25, every=4, final=0.75, start=0.25).removed_after(epoch) for epoch in (1, 3, 4)]
    [0.25, 0.25, 0.5]
    """

    rate: float
    every: int
    final: float
    start: float = 0.0
    unit: str = "macs"
    first: int | None = None

    def __post_init__(self) -> None:
        check_unit("LinearSchedule", self.unit)
        for name, share in (("rate", self.rate), ("final", 0.5 if self.is_absolute else self.final)):
            if not 0.0 < share < 1.0:
                raise ValueError(
                    f"LinearSchedule: {name} must lie in (0, 1), got {share}; 0.05 is 5 % of the {UNITS[self.unit]}"
                )
        self._check_rhythm()
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
        return max(1, math.ceil(round((self.final - self.start) / self.rate, 6)))

    def removed_after(self, epoch: int) -> float:
        """Share of the original count that is gone after ``epoch`` (counted from 1; 0: before training); before the
        first prune ``start``, which is no prune's."""
        done = self._passed(epoch)
        return self.final if done >= self.prunes else self.start + self.rate * done

    def check_reaches(self, epochs: int) -> None:
        """Raise ValueError unless ``final`` is reached before the last of ``epochs`` epochs, which does not prune."""
        if self.last_prune >= epochs:
            raise ValueError(
                f"LinearSchedule: {self.prunes} prunes every {self.every} epochs reach {self.final} after epoch "
                f"{self.last_prune}, and at least one epoch must follow, got {epochs} epochs; "
                f"train {self.last_prune + 1} epochs, prune more at a time or more often, or lower final"
            )


@dataclass(frozen=True)
class ListedSchedule(_Rhythm):
    """Every ``every`` epochs, prune to the next of ``targets``: shares of the ORIGINAL that are then gone, of what
    ``unit`` names, as in :class:`LinearSchedule`. Numbers above 1 are absolute, fall, and say what stays. ``first`` and
    ``start`` are as there: ``ListedSchedule((0.9,), every=1, first=0)`` removes everything at once, before the first
    step, and ``ListedSchedule((0.7, 0.9), every=10, start=0.5)`` prunes a student further of which half is gone.

    >>> ListedSchedule((0.3, 0.5, 0.6), every=10).removed_after(epoch=25)
    0.5
    """

    targets: tuple[float, ...]
    every: int
    start: float = 0.0
    unit: str = "macs"
    first: int | None = None

    def __post_init__(self) -> None:
        check_unit("ListedSchedule", self.unit)
        falls = self.is_absolute and list(self.targets) == sorted(set(self.targets), reverse=True)
        shares = (self.start, *(() if falls else self.targets))
        if not self.targets or list(shares) != sorted(set(shares)) or not shares[0] >= 0 or not shares[-1] < 1:
            raise ValueError(
                f"ListedSchedule: targets must rise from above start ({self.start}) to below 1, or fall as numbers of "
                f"{UNITS[self.unit]} above 1, got {self.targets}"
            )
        self._check_rhythm()

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
        """As of :class:`LinearSchedule`: before the first prune ``start``, which is no prune's."""
        return (self.start, *self.targets)[min(self._passed(epoch), self.prunes)]

    def check_reaches(self, epochs: int) -> None:
        """Raise ValueError unless the last prune comes before the last of ``epochs`` epochs."""
        if self.last_prune >= epochs:
            raise ValueError(
                f"ListedSchedule: {self.prunes} prunes every {self.every} epochs end after epoch "
                f"{self.last_prune}, and at least one epoch must follow, got {epochs} epochs"
            )


Schedule = LinearSchedule | ListedSchedule


def described(schedule: Schedule) -> dict[str, Any]:
    """Its fields as JSON values; ``first`` only where it was given, as in states from before there was one."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(schedule).items()}
    return {name: value for name, value in fields.items() if name != "first" or value is not None}


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _share_gone(caller: str, unit: str, stays: float, dense: float) -> float:
    if stays >= dense:
        raise ValueError(
            f"{caller}: {unit}={stays:g} is to stay, but the dense network has only {dense:.6g} {UNITS[unit]}; "
            "ask for less, or prune nothing"
        )
    return 1.0 - stays / dense
