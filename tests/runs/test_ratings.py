"""Plans of rating tasks: who is trained, pruned in time, and started from a ridge where the recipe says so."""

import dataclasses

import numpy as np
import pytest
import torch

from sparsekd.data import Rows, Task
from sparsekd.goals import Regression
from sparsekd.methods import METHODS
from sparsekd.models import STUDENT
from sparsekd.runs import RunConfig, tasks
from sparsekd.runs.plans import ratings
from sparsekd.runs.plans.recipe import Recipe


@pytest.mark.parametrize("epochs", [6, 7, 8, 9, 10, 12, 16, 20, 40, 60])
@pytest.mark.parametrize("method", list(METHODS))
def test_plans_reach_the_target_by_two_thirds(method, epochs):
    schedule, options = ratings.pruned_by_half(method, 0.55, epochs)
    begin = options.get("initial_epochs", 0)
    assert schedule.removed_after(epochs - begin) == 0.55
    assert begin + schedule.prunes * schedule.every <= 0.67 * epochs


@pytest.mark.parametrize("make", [ratings.rating_cnn, ratings.feature_cnn])
def test_a_ridge_start_is_the_weighted_least_squares_fit_and_stays(make):
    of_ratings = make is ratings.rating_cnn
    inputs = (torch.randn(40, 6), torch.randn(40, 8), torch.rand(40) * 4 + 1) if of_ratings else (torch.randn(40, 9),)
    weight = np.linspace(0, 2, 40, dtype=np.float32)
    train = Rows(inputs, torch.rand(40) * 4 + 1, None, weight=weight)
    sizes = {"user_features": 6, "item_features": 8, "features": 9}
    task = Task("made up", train, train, train, Regression((1.0, 5.0)), sizes, 3.0, "none")
    recipe = Recipe(lr=1e-3, weight_decay=0.0, epochs=1, batch_size=4, dropout=0.2, ridge=1e-9)
    model = make(task, recipe, STUDENT)
    prior = inputs[2] if of_ratings else torch.zeros(40)
    table = torch.cat(inputs[:2], 1) if of_ratings else inputs[0]
    table = torch.cat([table, torch.ones(40, 1)], 1).double()
    root = torch.from_numpy(weight).double().sqrt()
    fit = torch.linalg.lstsq(table * root[:, None], (train.target - prior).double() * root).solution
    torch.testing.assert_close(model(*inputs), (table @ fit).float() + prior, atol=1e-4, rtol=0)
    assert not any(parameter.requires_grad for parameter in model.linear.parameters())


def test_students_of_movietweetings_take_half_of_the_passes_unless_asked():
    def student(recipe):
        config = tasks.complete(RunConfig("movietweetings", options={"recipe": recipe}))
        return next(net for net in tasks.plan_of(None, config).students if net.folder == "sad")

    def passes(net):
        return net.recipe.epochs // net.recipe.splits

    ours, long, paper = (student(recipe) for recipe in ("ours", "long", "paper"))
    assert (passes(ours), passes(long), passes(paper)) == (3, 6, 6)
    assert "6 epochs (1/2 of the rows each) of batch 256" in ours.describe()
    assert long.settings() == paper.settings() and "splits" not in long.settings()["recipe"]  # as before there were any
    assert ours.settings()["recipe"]["splits"] == 2
    with pytest.raises(ValueError, match="whole passes of splits epochs each, got 5 epochs and splits 2"):
        dataclasses.replace(ours.recipe, epochs=5)
