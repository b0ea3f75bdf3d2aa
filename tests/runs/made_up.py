"""A task that trains in no time, and what the tests of runs do with it."""

import dataclasses
from types import SimpleNamespace

import torch

from sparsekd.data import Rows, Task
from sparsekd.goals import Regression
from sparsekd.runs import Entry, epochs
from sparsekd.runs.plans import ratings
from sparsekd.runs.plans.network import Network
from sparsekd.runs.plans.recipe import Recipe

RECIPE = Recipe(lr=3e-3, weight_decay=1e-2, epochs=4, batch_size=64, dropout=0.1)


def part(rows: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    y = (5 + x[:, 0] + x[:, 1] * x[:, 2] + 0.1 * torch.randn(rows, generator=generator)).clamp(1, 10)
    return Rows((x,), y, x.numpy())


def make_task() -> Task:
    """Films of six features: a number to predict, nearly a sum and a product of them."""
    train_part = part(256, 0)
    return Task(
        name="synthetic",
        train=train_part,
        val=part(128, 1),
        test=part(128, 2),
        goal=Regression((1.0, 10.0)),
        sizes={"features": 6},
        mean=float(train_part.target.mean()),
        split="at random",
        meta={"sha256": {"synthetic": "0" * 64}},
    )


def plan(task, config):
    return ratings.in_one_plan(config, RECIPE, lambda shape: ratings.feature_cnn(task, RECIPE, shape))


def entry(task: Task) -> Entry:
    """What `sparsekd run synthetic` needs to know."""
    return Entry(load=lambda config: ratings.shortened(task, config.quick), plan=plan)


def teacher_of(task):
    return ratings.feature_cnn(task, RECIPE, ratings.TEACHER)


def student_of(task):
    return ratings.feature_cnn(task, RECIPE, ratings.STUDENT)


def network(method: str | None = None, epochs: int = 6, **fields) -> Network:
    recipe = dataclasses.replace(RECIPE, epochs=epochs)
    fields = {"alpha": 1.0, "beta": 1.0, "make": lambda: None, **fields}
    if method:
        schedule, options = ratings.pruned_by_half(method, 0.6, epochs)
        fields |= {"method": method, "densities": (0.4,), "schedule": schedule, "options": options}
    return Network(name=method or "SAD", folder=method or "sad", recipe=recipe, **fields)


def trained(task, net, folder, teacher=None, seed=0):
    torch.manual_seed(seed)
    model = student_of(task)
    return model, epochs.fit(model, task, net, teacher=teacher, seed=seed, folder=folder)


def errors(model_or_prediction, task, part) -> dict[str, float]:
    """The scores of a network, or of its predictions."""
    if isinstance(model_or_prediction, torch.Tensor):
        return task.goal.measure(model_or_prediction, part.target)
    return task.goal.scores(model_or_prediction, part)


def as_it_is(model, *args):
    """In place of freezing."""
    model.plan = SimpleNamespace(to_dict=dict)
    return {1: model}


def same(left, right) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


TIMINGS = ("seconds", "step_ms", "joules")


def without_timings(history):
    return [{key: value for key, value in epoch.items() if key not in TIMINGS} for epoch in history]
