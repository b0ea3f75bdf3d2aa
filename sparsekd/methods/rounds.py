"""Pruning to a budget in rounds, with some learning after each: what the methods of streams share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..pruning import Budget, Pruner
from .base import PruneEvent

Batch = tuple[Sequence[Any], Tensor]
T = TypeVar("T")
_SCORED = 8  # batches whose gradients judge the blocks


def prune_in_rounds(
    pruner: Pruner,
    budget: Budget,
    rounds: int,
    scores: Callable[[], dict[str, Tensor] | None],
    learn: Callable[[], None],
    steps: int,
) -> None:
    """Prune by the scores of the moment to the target of each round, and take its part of the steps after each."""
    for place, target in enumerate(_targets(budget, rounds)):
        if target is not None:
            pruner.prune_to(target, scores())
        for _ in range(steps * (place + 1) // rounds - steps * place // rounds):
            learn()


def _targets(budget: Budget, rounds: int) -> list[Budget | None]:
    """The budgets of the rounds: what is kept falls by the same factor in each. An absolute one is reached at once,
    and keeps the steps of all rounds."""
    if not budget.is_share:
        return [budget, *[None] * (rounds - 1)]
    kept = 1.0 - budget.number if budget.removed else budget.number
    shares = [1.0 - kept ** (place / rounds) for place in range(1, rounds)]
    return [*(Budget(budget.unit, share, removed=True) for share in shares), budget]


def scored(batches: Sequence[Batch]) -> list[Batch]:
    """Some of the batches, evenly, the latest among them."""
    step = max(1, len(batches) // _SCORED)
    return list(batches[::-step][:_SCORED][::-1])


def in_turn(items: Sequence[T]) -> Iterator[T]:
    """One after the other, over and over."""
    while True:
        yield from items


def prune_event(number: int, stage: str, budget: Budget, pruner: Pruner) -> PruneEvent:
    macs, us = pruner.macs, pruner.predicted_us
    return PruneEvent(
        number,
        stage,
        budget.number,
        pruner.removed_share,
        pruner.num_kept,
        pruner.num_dead_parameters,
        rewound=False,
        unit=budget.unit,
        macs=None if macs is None else macs[1],
        removed_macs=None if macs is None else 1.0 - macs[1] / macs[0],
        predicted_us=None if us is None else us[1],
    )
