"""Tickets of embedding tables, which SparseRec has to beat: masks found by training dense, then trained from the start.

    TableTickets  magnitude, once or many times (IMP), survivors rewound: Wang, Sui, Wang, Liu, He, Exploring Lottery
                  Ticket Hypothesis in Media Recommender Systems
    PEP           learnt thresholds: Liu, Gao, Chen, Jin, Li, Learnable Embedding Sizes for Recommender Systems, ICLR
                  2021, equations 3 and 7

Both start from tables that keep every entry (density=1) and end with a tenth, say, of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distill import Distiller, Plain
from .base import PruneEvent, part_of
from .tables import TableMethod

__all__ = ["PEP", "TableTickets", "imp_rounds"]


def imp_rounds(
    densities: Sequence[float], epochs: int, last_epochs: int, removed: float = 0.1
) -> list[tuple[float, int]]:
    """(density, epochs) of every round of iterative pruning: a share `removed` of the survivors goes after each.

    A round at one of `densities` lasts `last_epochs`, the others `epochs`: enough to find the next mask by.
    """
    rounds, density = [(1.0, epochs)], 1.0
    for wanted in sorted(densities, reverse=True):
        while density * (1 - removed) > wanted * 1.0001:
            density *= 1 - removed
            rounds.append((round(density, 6), epochs))
        density = wanted
        rounds.append((round(wanted, 6), last_epochs))
    return rounds


class _Rewound(TableMethod):
    """What both share: the values of the start, to which survivors go back."""

    def __init__(self, distiller: Distiller | Plain) -> None:
        super().__init__(distiller)
        for table in self.tables:
            if table.values.shape[0] != table.num_embeddings * table.embedding_dim:
                raise ValueError(
                    f"sparsekd.methods.{type(self).__name__}: tables must keep every entry at the start, got density "
                    f"{table.density:.3g}; make the model with density=1"
                )
        self._first = [table.values.detach().clone().view(table.num_embeddings, -1) for table in self.tables]

    def _rewind(self) -> None:
        with torch.no_grad():
            for table, first in zip(self.tables, self._first, strict=True):
                table.values.copy_(first[table.mask()])
        self.forget_moments()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, **{f"first.{place}": first for place, first in enumerate(self._first)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._first = [state[f"first.{place}"] for place in range(len(self._first))]


class TableTickets(_Rewound):
    """Rounds of training; after each the entries of least magnitude go, and what survives starts anew.

    Args:
        rounds: (density, epochs) of each, falling from 1: [(1, 20), (0.1, 20)] is one-shot pruning, retrained;
            ``imp_rounds`` makes those of iterative pruning.
    """

    name: ClassVar[str] = "table-tickets"

    def __init__(self, distiller: Distiller | Plain, rounds: Sequence[tuple[float, int]]) -> None:
        super().__init__(distiller)
        levels = [density for density, _ in rounds]
        if not levels or levels[0] != 1 or sorted(levels, reverse=True) != levels or len(set(levels)) != len(levels):
            raise ValueError(f"TableTickets: densities of the rounds must fall from 1, got {levels}")
        if any(epochs < 1 for _, epochs in rounds):
            raise ValueError(f"TableTickets: every round must have at least 1 epoch, got {list(rounds)}")
        self.rounds = [(float(density), int(epochs)) for density, epochs in rounds]
        self._ends = list(accumulate(epochs for _, epochs in self.rounds))

    def level(self, epoch: int) -> float:
        return self.rounds[self._round(epoch)][0]

    def after_boundary(self, number: int) -> PruneEvent | None:
        if number not in self._ends[:-1]:
            return None
        density = self.rounds[self._round(number) + 1][0]
        self.drop_to(round(density * self.num_entries))
        self._rewind()
        return self.event(number, f"round {self._round(number) + 2}", rewound=True)

    def _round(self, epoch: int) -> int:
        return next((place for place, end in enumerate(self._ends) if epoch <= end), len(self._ends) - 1)

    def _describe_plan(self) -> dict[str, Any]:
        return {**super()._describe_plan(), "rounds": [list(one) for one in self.rounds]}


class PEP(_Rewound):
    """Entries count less a threshold, sign(v) max(|v| - sigmoid(s), 0), with a learnt s for every row; those that are
    furthest above it after ``search`` epochs are kept, go back to the start and are trained without threshold.

    The share that passes is not set in PEP, which trains on until it is small enough. Here the mask has the ``density``
    asked for, so that budgets are equal.

    Args:
        density: share of the entries to keep after the search.
        search: epochs of it.
        start: of s.
        rate: s moves by so many times what the optimizer would move it; it has far to go.
    """

    name: ClassVar[str] = "pep"

    def __init__(
        self, distiller: Distiller | Plain, density: float, search: int, start: float = -6.0, rate: float = 5.0
    ) -> None:
        super().__init__(distiller)
        if not 0 < density < 1 or search < 1:
            raise ValueError(
                f"PEP: density must lie in (0, 1) and search be at least 1 epoch, got {density} and {search}"
            )
        self.density, self.search, self.start, self.rate, self.boundary = density, search, start, rate, 0
        self.thresholds = [nn.Parameter(torch.full((table.num_embeddings, 1), start / rate)) for table in self.tables]
        self._hooks = [
            table.register_forward_hook(partial(self._soften, place)) for place, table in enumerate(self.tables)
        ]

    def parameters(self) -> Any:
        yield from super().parameters()
        yield from self.thresholds

    def level(self, epoch: int) -> float:
        return 1.0 if epoch <= self.search else round(self.density, 6)

    def after_boundary(self, number: int) -> PruneEvent | None:
        self.boundary = number
        if number != self.search:
            return None
        above = [
            (table.values.detach().view(table.num_embeddings, -1).abs() - self._threshold(place)).flatten()
            for place, table in enumerate(self.tables)
        ]
        least = min(float(one.min()) for one in above)
        self.drop_to(round(self.density * self.num_entries), [one - least for one in above])
        self._rewind()
        return self.event(number, "retraining", rewound=True)

    def state_dict(self) -> dict[str, Any]:
        thresholds = {f"threshold.{place}": one.detach() for place, one in enumerate(self.thresholds)}
        return {**super().state_dict(), "boundary": self.boundary, **thresholds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.boundary = state["boundary"]
        for place, one in part_of(state, "threshold.").items():
            self.thresholds[int(place)].data.copy_(one)

    def _threshold(self, place: int) -> Tensor:
        return torch.sigmoid(self.rate * self.thresholds[place].detach())

    def _soften(self, place: int, table: nn.Module, args: tuple, rows: Tensor) -> Tensor | None:
        if self.boundary >= self.search:
            return None
        threshold = torch.sigmoid(self.rate * self.thresholds[place][args[0]])
        return rows.sign() * torch.relu(rows.abs() - threshold)

    def _describe_plan(self) -> dict[str, Any]:
        own = ("density", "search", "start", "rate")
        return {**super()._describe_plan(), **{name: getattr(self, name) for name in own}}
