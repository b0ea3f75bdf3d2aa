"""arXiv 2401.10484 to the letter: the networks of its Table 2, and what its Table 4 says of the films."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ...methods import PAPER, PaperRecipe
from ..config import RunConfig
from .network import Network, dense_students, pruning_methods, title_of, weights_of, without
from .recipe import Recipe

ALPHA, BETA = 0.9, 200.0  # of the dense students


def _table_4(**networks: tuple[float, float]) -> dict[str, Any]:
    """What the report shows beside our rows, from the MAE and MSE of each network."""
    return {
        "heading": "The same task in the paper (arXiv 2401.10484, Table 4; LTH-SAD keeps 55 % of the weights):",
        "rows": {name.replace("_", "-"): {"mae": mae, "mse": mse} for name, (mae, mse) in networks.items()},
        "chosen_on_test": True,  # the best point of a sweep over densities, on the part that it is reported of
    }


# By group of features; its test films are 498 later than 2013, ours 503.
TABLE_4 = {
    "categorical": _table_4(DCNN=(0.8594, 1.22), SAD=(0.8143, 1.183), LTH_SAD=(0.8212, 1.151)),
    "numerical": _table_4(DCNN=(0.7455, 0.98), SAD=(0.7714, 1.041), LTH_SAD=(0.8607, 1.255)),
    "social": _table_4(DCNN=(2.086, 5.028), SAD=(0.88, 1.229), LTH_SAD=(0.81, 1.106)),
    "textual": _table_4(DCNN=(1.375, 2.593), SAD=(1.163, 1.942), LTH_SAD=(0.871, 1.319)),
}


def networks(
    make_teacher: Callable[[], nn.Module],
    make_student: Callable[[], nn.Module],
    config: RunConfig,
    plain: Recipe,
    scale: float,
) -> Iterator[Network]:
    """Table 2 with all epochs times `scale`; what it has no column for learns as SAD or SP-SAD.

    The column of SS-SAD is that of its second stage (a constant 5e-4, no decay); the first is a lottery ticket and
    learns as LTH-SAD does, at 0.05: at 5e-4 it would be cut by the size of weights that are hardly trained.
    """
    assert config.methods is not None and config.densities is not None  # `tasks.complete` has filled them in
    dense = dataclasses.replace(
        plain, epochs=_times(plain.epochs, scale), milestones=tuple(_times(m, scale) for m in plain.milestones or ())
    )
    yield Network(name="teacher", folder="teacher", make=make_teacher, recipe=dense)
    yield from dense_students(make_student, dense, config.methods, alpha=ALPHA, beta=BETA)
    for method in pruning_methods(config.methods):
        base, options = without(method)
        column = _scaled(PAPER[base], scale)
        densities = _passed(method, column, config.densities)
        learning = dataclasses.replace(
            plain,
            lr=column.learning_rate,
            weight_decay=column.weight_decay,
            epochs=column.epochs,
            milestones=column.milestones,
            restart="never",
        )
        lottery = PAPER["lth-sad"]
        ticket = dataclasses.replace(learning, lr=lottery.learning_rate, weight_decay=lottery.weight_decay)
        yield Network(
            name=title_of(method),
            folder=method,
            make=make_student,
            recipe=learning,
            **weights_of(method, column.alpha, column.beta),
            method=base,
            densities=densities,
            schedule=column.schedule,
            options=options,
            ticket=ticket if base == "ss-sad" else None,
        )


def _passed(method: str, column: PaperRecipe, wanted: tuple[float, ...]) -> tuple[float, ...]:
    """The densities below 1 that were asked for, from the largest on; the schedule must come by each of them."""
    on_the_way = sorted({round(1 - column.schedule.removed_after(e), 6) for e in range(1, column.epochs + 1)})
    densities = tuple(density for density in sorted(wanted, reverse=True) if density < 1)
    if not {round(density, 6) for density in densities} <= set(on_the_way):
        raise ValueError(
            f"sparsekd run: --recipe paper prunes {method} to the densities {', '.join(f'{d:g}' for d in on_the_way)}, "
            f"got {', '.join(f'{d:g}' for d in densities)}; choose among these, or --recipe ours"
        )
    return densities


def _scaled(column: PaperRecipe, scale: float) -> PaperRecipe:
    schedule = dataclasses.replace(column.schedule, every=_times(column.schedule.every, scale))
    ticket = round(schedule.start / schedule.rate + 1) * schedule.every if schedule.start else 0
    shortest = ticket + schedule.prunes * schedule.every + 1
    milestones = tuple(_times(epoch, scale) for epoch in column.milestones)
    epochs = max(_times(column.epochs, scale), shortest)
    return dataclasses.replace(column, schedule=schedule, milestones=milestones, epochs=epochs)


def _times(epochs: int, scale: float) -> int:
    return max(1, round(epochs * scale))
