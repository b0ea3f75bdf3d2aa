"""LTH-SAD: lottery-ticket rewinding inside SAD distillation (arXiv 2401.10484)."""

from __future__ import annotations

from ..pruning import Schedule
from .staged import Stage, Staged


class LTHSAD(Staged):
    """Units of the whole student go, those that are worth least for what they cost, and the survivors start again from
    their values of epoch 0.

    The paper removes the smallest whatever they cost (a schedule of ``unit="weights"``, ``scope="global"``), and does
    not restart the learning rate with the survivors; ``round(epoch)`` lets a loop do either.
    """

    name = "lth-sad"

    def _plan(self, schedule: Schedule, epochs: int) -> list[Stage]:
        return [Stage("distil", epochs, schedule, rewinds=True)]
