"""The learning rate of every step: cosine cycles or steps down, begun anew where a recipe says so."""

from __future__ import annotations

import math

from ..methods import Method, Staged, TableMethod
from .plans.recipe import Recipe


def learning_rate(recipe: Recipe, epoch: int, done: float, cycle: tuple[int, int]) -> float:
    """At the share `done` of `epoch`, in a cycle of the epochs `cycle[0] .. cycle[1]`."""
    if recipe.milestones is not None:
        return recipe.lr * 0.1 ** sum(epoch > milestone for milestone in recipe.milestones)
    over = (epoch - cycle[0] + done) / (cycle[1] - cycle[0] + 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * over))


def cycle_of(method: Method, epoch: int, recipe: Recipe) -> tuple[int, int]:
    """First and last epoch of the learning-rate cycle that `epoch` is in."""
    if not isinstance(method, Staged) or recipe.restart == "never":
        return 1, recipe.epochs
    stage = method.round(epoch)  # a rewound ticket, and a new stage, begin a new one
    first, last = stage.first, stage.last
    for prune, _ in method.prunes() if recipe.restart == "prune" else ():
        first, last = (max(first, prune + 1), last) if prune < epoch else (first, min(last, prune))
    return first, last


def level_of(method: Method, epoch: int) -> float:
    """Density that the schedule asks for during `epoch`."""
    if isinstance(method, TableMethod):
        return method.level(epoch)
    prunes = method.prunes() if isinstance(method, Staged) else []
    return round(1 - max((share for prune, share in prunes if prune < epoch), default=0.0), 6)
