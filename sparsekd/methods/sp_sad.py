"""SP-SAD: structured pruning during SAD distillation (arXiv 2401.10484)."""

from __future__ import annotations

from ..pruning import Schedule
from .staged import Stage, Staged


class SPSAD(Staged):
    """Every layer loses the same share of its units, the smallest of that layer; survivors keep their values.

    The unit is a block by default, which the kernels run; the paper prunes channels: ``granularity="filter"``, there
    only on the inner channels of residual blocks (``include=["*.conv1"]``).
    """

    name = "sp-sad"
    scope = "layer"

    def _plan(self, schedule: Schedule, epochs: int) -> list[Stage]:
        return [Stage("distil", epochs, schedule, rewinds=False)]
