"""SS-SAD: a lottery ticket first, SAD distillation after (arXiv 2401.10484)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..distill import Distiller, Plain
from ..pruning import LinearSchedule, ListedSchedule, Schedule
from .staged import Stage, Staged


class SSSAD(Staged):
    """Stage "ticket": prune and rewind without the teacher. Stage "distil": distil the trained ticket and prune on.

    In the second stage survivors keep their values, and the paper trains at a small constant learning rate (5e-4): look
    at ``stage`` in the loop.

    Args:
        schedule: of the second stage; its ``start`` is the share that the first stage removes. A schedule that starts
            at 0 is shared out: its first prune makes the ticket, the others follow in the second stage (of a single
            prune, the first stage does half). ``first`` is then the first stage's: 0 makes the ticket before training.
            With ``initial``, or with a ``start`` above 0, it is the second stage's, counted from its beginning, and 0
            raises ValueError: to prune before training give ``initial`` a ``first`` of 0.
        initial: schedule of the first stage; default: the same rate (listed: one prune) and interval, up to
            ``schedule.start``. For a student that is pruned already give one whose ``start`` is the share that is gone.
        initial_epochs: length of the first stage; default: one interval of training after its last prune, or, of a
            schedule that is shared out, what the second stage leaves of ``epochs``.
        epochs: both stages together; the rest as in :class:`Staged`.
    """

    name = "ss-sad"
    _first_schedule = "initial"

    def __init__(
        self,
        distiller: Distiller | Plain,
        schedule: Schedule,
        *,
        epochs: int,
        initial: Schedule | None = None,
        initial_epochs: int | None = None,
        **options: Any,
    ) -> None:
        self._initial, self._initial_epochs = initial, initial_epochs
        if initial is not None and initial.is_absolute and not schedule.is_absolute:
            raise ValueError(
                f"SSSAD: initial ends at an absolute number, {initial.final:g}, but schedule counts shares; give both "
                "the same way"
            )
        super().__init__(distiller, schedule, epochs=epochs, **options)

    def _plan(self, schedule: Schedule, epochs: int) -> list[Stage]:
        given = self._initial
        if given is not None and given.unit != schedule.unit:
            raise ValueError(
                f"SSSAD: both stages must count the same, got initial.unit {given.unit!r} and schedule.unit "
                f"{schedule.unit!r}"
            )
        given = None if given is None else self._in_shares(given)
        starts_at_zero, first = schedule.start == 0.0, None
        if starts_at_zero and given is None:
            first = schedule.first
        elif schedule.first == 0:
            raise ValueError(
                "SSSAD: the second stage prunes after its first epoch at the earliest, got schedule.first 0; to prune "
                "before training give initial first=0"
            )
        if starts_at_zero:
            schedule = _shared_out(schedule, None if given is None else given.final)
        rate = schedule.rate if isinstance(schedule, LinearSchedule) else schedule.start
        initial = given or LinearSchedule(rate, schedule.every, final=schedule.start, unit=schedule.unit, first=first)
        if initial.final != schedule.start:
            raise ValueError(
                f"SSSAD: the second stage starts at {schedule.start} but the first ends at {initial.final}; "
                "make initial.final and schedule.start the same"
            )
        ticket_epochs = initial.last_prune + initial.every if self._initial_epochs is None else self._initial_epochs
        if starts_at_zero and self._initial_epochs is None:
            left = epochs - schedule.last_prune - 1
            ticket_epochs = max(initial.last_prune + 1, min(ticket_epochs, left))
        shortest = ticket_epochs + schedule.last_prune + 1
        if epochs < shortest:
            raise ValueError(
                f"SSSAD: a first stage of {ticket_epochs} epochs and {schedule.prunes} prunes every {schedule.every} "
                f"epochs need at least {shortest} epochs, got {epochs}; train longer, or prune more at a time"
            )
        return [
            Stage("ticket", ticket_epochs, initial, rewinds=True),
            Stage("distil", epochs - ticket_epochs, schedule, rewinds=False),
        ]


def _shared_out(schedule: Schedule, start: float | None) -> Schedule:
    """What is left for the second stage after the first has removed ``start``; default: what the first prune does, or
    half of a single one."""
    if start is None:
        start = schedule.removed_after(schedule.first_prune) if schedule.prunes > 1 else schedule.final / 2
        schedule = replace(schedule, first=None)
    if isinstance(schedule, ListedSchedule):
        return replace(schedule, targets=tuple(t for t in schedule.targets if t > start), start=start)
    return replace(schedule, start=start)
