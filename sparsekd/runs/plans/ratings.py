"""Rating tasks: a network on interaction maps, and one student for every method and density.

Every student is pruned by half of its training. The recipes were found on the validation part of each task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...data import Task
from ...models import STUDENT, TEACHER, FeatureCNN, RatingCNN, Shape
from ...pruning import LinearSchedule
from ..config import RunConfig
from . import paper
from .network import Network, Plan, dense_students, pruning_methods, title_of, weights_of, without
from .recipe import RECALIBRATION, Recipe

# The weights of KD and SAD for ratings. On the validation part of the movies task alpha 1 with beta 0 and 10 are within
# the spread of seeds, beta 100 is worse. The paper's beta of 50 to 200 belongs to a cross-entropy on CIFAR-100.
ALPHA, BETA = 1.0, 10.0
QUICK_ROWS, QUICK_VAL_ROWS = 3_000, 1_500  # the latest train rows and the first val rows, all that a quick run uses
# A lottery ticket is trained again after its last rewinding; in fewer than 6 epochs SS-SAD has no room to prune.
SHORTEST = 6

MOVIETWEETINGS = Recipe(lr=2e-3, weight_decay=1e-2, epochs=3, batch_size=512, dropout=0.2)
# Half of the passes of the long recipe: more of a teacher, which says what a rating is without its noise, and smaller
# batches make up for nearly all of them. On validation rows of seed 0 students err by 0.0004 to 0.004 more, where seeds
# differ by 0.002 to 0.005.
MOVIETWEETINGS_STUDENT = dataclasses.replace(MOVIETWEETINGS, lr=3e-3, epochs=6, splits=2, batch_size=256)
MOVIETWEETINGS_ALPHA = 4.0
MOVIELENS = dataclasses.replace(MOVIETWEETINGS, ridge=10.0)
_MOVIES = Recipe(lr=1e-3, weight_decay=1e-2, epochs=8, batch_size=128, dropout=0.5, input_dropout=0.7)
# Of each group of features; the dummies of the categorical one are too sparse for a ridge.
MOVIES = {
    "numerical": dataclasses.replace(_MOVIES, ridge=2000.0),
    "social": dataclasses.replace(_MOVIES, ridge=100.0),
    "textual": dataclasses.replace(_MOVIES, ridge=100.0),
    # Learning from films up to 2009, or 2011, the average of the weights errs less on those of the next two years,
    # for both of two seeds each (0.924 on average, not 0.929). For numbers it does not; the others were not tried.
    "categorical": dataclasses.replace(_MOVIES, input_dropout=0.5, averaged=0.98),
}


def shortened(task: Task, quick: bool) -> Task:
    """A quick run sees the latest QUICK_ROWS train rows, the first QUICK_VAL_ROWS val rows, and test as it is."""
    if not quick:
        return task
    latest = slice(max(len(task.train) - QUICK_ROWS, 0), None)
    return dataclasses.replace(task, train=task.train.take(latest), val=task.val.take(slice(0, QUICK_VAL_ROWS)))


def of_ratings(task: Task, config: RunConfig, recipe: Recipe) -> Plan:
    """Networks that rate an item for a user: inputs (user_features, item_features, prior)."""
    return in_one_plan(config, recipe, partial(rating_cnn, task, recipe))


def of_movietweetings(task: Task, config: RunConfig) -> Plan:
    """The same. By our recipe students have one of their own; by others they learn as the teacher, twice as long."""
    if config.options.get("recipe", "ours") != "ours":
        return of_ratings(task, config, MOVIETWEETINGS)
    make = partial(rating_cnn, task, MOVIETWEETINGS)
    return in_one_plan(config, MOVIETWEETINGS, make, MOVIETWEETINGS_STUDENT, MOVIETWEETINGS_ALPHA)


def of_films(task: Task, config: RunConfig) -> Plan:
    """Networks that rate a film by a vector of its features, beside what the paper has for the same group."""
    group = config.options["group"]
    plan = in_one_plan(config, MOVIES[group], partial(feature_cnn, task, MOVIES[group]))
    return dataclasses.replace(plan, published=paper.TABLE_4[group])


def rating_cnn(task: Task, recipe: Recipe, shape: Shape) -> RatingCNN:
    model = RatingCNN(task.sizes, shape, recipe.dropout)
    if recipe.ridge is not None:
        users, items, prior = task.train.inputs
        fix_to_ridge(model.linear, torch.cat([users, items], 1), prior, task, recipe.ridge)
    return model


def feature_cnn(task: Task, recipe: Recipe, shape: Shape) -> FeatureCNN:
    model = FeatureCNN(task.sizes, shape, task.mean, recipe.dropout, recipe.input_dropout)
    if recipe.ridge is not None:
        (features,) = task.train.inputs
        fix_to_ridge(model.linear, features, features.new_zeros(len(features)), task, recipe.ridge)
    return model


@torch.no_grad()
def fix_to_ridge(linear: nn.Linear, table: Tensor, start: Tensor, task: Task, penalty: float) -> None:
    """Weights that minimise sum w (y - x.c - b)^2 + penalty |c|^2 on train (y: what `start` misses), then frozen.

    table [N, F] are the rows x of train, start [N] the prediction that the layer adds to.
    """
    target = task.train.target.double()
    x = torch.cat([table, table.new_ones(len(table), 1)], 1).double()
    weight = torch.ones(len(x)) if task.train.weight is None else torch.from_numpy(task.train.weight)
    weighted = x.T * weight.to(x)
    products = weighted @ x
    products.diagonal()[:-1] += penalty
    solution = torch.linalg.solve(products, weighted @ (target - start.double()))
    linear.weight.copy_(solution[None, :-1])
    linear.bias.copy_(solution[-1:])
    linear.requires_grad_(False)


def in_one_plan(
    config: RunConfig,
    recipe: Recipe,
    make: Callable[[Shape], nn.Module],
    student: Recipe | None = None,
    alpha: float | None = None,
) -> Plan:
    """student, alpha: how students learn; None: as the teacher, for twice as long, and with ALPHA."""
    student = student or dataclasses.replace(recipe, epochs=max(2 * recipe.epochs, SHORTEST))
    if config.quick:
        student = dataclasses.replace(student, epochs=SHORTEST)
    return Plan(
        teacher=Network(name="teacher", folder="teacher", make=partial(make, TEACHER), recipe=recipe),
        students=tuple(_students(config, student, partial(make, STUDENT), ALPHA if alpha is None else alpha)),
        about={
            "budget": "every student, dense or pruned, trains for the same number of epochs with the same optimizer",
            "distillation": "the teacher is run once on every train row (in every step, where what it says would take "
            "over 1 GiB), and all students of a seed learn from what it said; that pass is in no row's training time",
            "selection": "epoch of smallest validation MSE among those at the final density; the test part is used "
            "once, for that epoch",
            "batch_norm": f"statistics of {RECALIBRATION} training batches, taken before each validation with dropout "
            "off",
        },
    )


def _students(config: RunConfig, recipe: Recipe, make: Callable[[], nn.Module], alpha: float) -> Iterator[Network]:
    assert config.methods is not None and config.densities is not None  # `tasks.complete` has filled them in
    yield from dense_students(make, recipe, config.methods, alpha=alpha, beta=BETA)
    for method in pruning_methods(config.methods):
        for density in (density for density in config.densities if density < 1):
            base, options = without(method)
            schedule, more = pruned_by_half(base, 1 - density, recipe.epochs)
            yield Network(
                name=title_of(method),
                folder=f"{method}-{density:g}",
                make=make,
                recipe=recipe,
                **weights_of(method, alpha, BETA),
                method=base,
                densities=(density,),
                schedule=schedule,
                options={**options, **more},
            )


def pruned_by_half(method: str, removed: float, epochs: int) -> tuple[LinearSchedule, dict[str, Any]]:
    """When to prune: the schedule that has removed the share `removed` after at most two thirds of the epochs.

    Three equal steps up to half of the epochs (SP-SAD, LTH-SAD). SS-SAD removes its first step in a ticket of a third
    of the epochs, and the two others in the next third.
    """
    if method == "ss-sad":
        ticket = max(2, epochs // 3)
        every = max(1, ticket // 2)
        schedule = LinearSchedule(removed / 3, every, final=removed, start=removed / 3)
        return schedule, {"initial": LinearSchedule(removed / 3, every, final=removed / 3), "initial_epochs": ticket}
    prunes = min(3, epochs - 1)
    return LinearSchedule(removed / prunes, max(1, epochs // (2 * prunes)), final=removed), {}
