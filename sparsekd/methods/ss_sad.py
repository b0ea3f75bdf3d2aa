"""SS-SAD: a lottery ticket first, SAD distillation after (arXiv 2401.10484)."""

from __future__ import annotations

from typing import Any

from ..distill import Distiller, Plain
from ..pruning import LinearSchedule, Schedule
from .staged import Stage, Staged


class SSSAD(Staged):
    """Stage "ticket": prune and rewind without the teacher. Stage "distil": distil the trained ticket and prune on.

    In the second stage survivors keep their values, and the paper trains at a small constant learning rate (5e-4): look
    at ``stage`` in the loop.

    Args:
        schedule: of the second stage; its ``start`` is the share that the first stage removes.
        initial: schedule of the first stage; default: the same rate (listed: one prune) and interval, up to
            ``schedule.start``.
        initial_epochs: length of the first stage; default: one interval of training after its last prune.
        epochs: both stages together; the rest as in :class:`Staged`.
    """

    name = "ss-sad"

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
        super().__init__(distiller, schedule, epochs=epochs, **options)

    def _plan(self, schedule: Schedule, epochs: int) -> list[Stage]:
        if schedule.start == 0.0:
            raise ValueError(
                "SSSAD: schedule.start is the share that the first stage removes, got 0; "
                "e.g. LinearSchedule(rate=0.05, every=20, final=0.7, start=0.25)"
            )
        rate = schedule.rate if isinstance(schedule, LinearSchedule) else schedule.start
        initial = self._initial or LinearSchedule(rate, schedule.every, final=schedule.start)
        if initial.final != schedule.start:
            raise ValueError(
                f"SSSAD: the second stage starts at {schedule.start} but the first ends at {initial.final}; "
                "make initial.final and schedule.start the same"
            )
        ticket_epochs = (initial.prunes + 1) * initial.every if self._initial_epochs is None else self._initial_epochs
        shortest = ticket_epochs + schedule.prunes * schedule.every + 1
        if epochs < shortest:
            raise ValueError(
                f"SSSAD: a first stage of {ticket_epochs} epochs and {schedule.prunes} prunes every {schedule.every} "
                f"epochs need at least {shortest} epochs, got {epochs}; train longer, or prune more at a time"
            )
        return [
            Stage("ticket", ticket_epochs, initial, rewinds=True),
            Stage("distil", epochs - ticket_epochs, schedule, rewinds=False),
        ]
