"""SP-SAD: structured pruning during SAD distillation (arXiv 2401.10484)."""

from __future__ import annotations

from ..pruning import Schedule
from .staged import Stage, Staged


class SPSAD(Staged):
    """Units go while SAD distils, those that are worth least for what they cost; survivors keep their values.

    The unit is a block by default, which the kernels run; the paper prunes channels: ``granularity="filter"``, there
    only on the inner channels of residual blocks (``include=["*.conv1"]``), by weights and the same share of every
    layer (a schedule of ``unit="weights"``, ``scope="layer"``).
    """

    name = "sp-sad"

    def _plan(self, schedule: Schedule, epochs: int) -> list[Stage]:
        return [Stage("distil", epochs, schedule, rewinds=False)]
