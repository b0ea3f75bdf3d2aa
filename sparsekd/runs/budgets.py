"""The budgets of a run: absolute numbers become shares of the plain student, and microseconds get their table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..blocks import BlockPattern
from ..data import Task
from ..pruning import CostTable, Pruner
from .config import RunConfig
from .evaluate import not_pruned

__all__ = ["COSTS", "in_shares", "measure"]

COSTS = "costs.json"


def in_shares(config: RunConfig, task: Task, make: Callable[[], nn.Module]) -> dict[float, float]:
    """Share of the dense student -> the number that was asked for, of every row of a complete run.

    Raises ValueError for a number that the dense student does not reach.
    """
    if all(number <= 1.0 for number in config.asked()):
        return {share: share for share in config.asked()}
    dense = _dense_cost(config, task, make())
    shares = {}
    for number in config.asked():
        if number >= dense:
            raise ValueError(
                f"sparsekd run: {config.unit}={number:g} is to stay, but the dense student has only {dense:.6g}; "
                "ask for less"
            )
        shares[number if number <= 1.0 else round(number / dense, 6)] = number
    return shares


def _dense_cost(config: RunConfig, task: Task, student: nn.Module) -> float:
    assert config.unit is not None
    pruner = Pruner(
        student,
        pattern=BlockPattern.parse(config.pattern),
        exclude=not_pruned(student) or None,
        costs=None if config.costs is None else CostTable.load(config.costs),
        example_inputs=task.to("cpu").train.examples(2),
        rewindable=False,
    )
    return pruner.cost(config.unit)[0]


def measure(config: RunConfig, task: Task, make: Callable[[], nn.Module], out: Path) -> Path:
    """Where the table of the student's costs at batch 1 lies: that of an earlier call, or one that is measured now."""
    path = out / COSTS
    if not path.is_file():
        student = make()
        costs = CostTable.measure(
            student,
            task.to("cpu").example_inputs(1),
            pattern=BlockPattern.parse(config.pattern),
            exclude=not_pruned(student) or None,
            layer_ms=2.0 if config.quick else 20.0,
        )
        out.mkdir(parents=True, exist_ok=True)
        costs.save(path)
    return path
