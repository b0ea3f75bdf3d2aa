"""Baselines against hand-made data whose answer is known."""

import dataclasses

import numpy as np
import pytest
import torch

from sparsekd.data.parts import Rows
from sparsekd.data.task import Task
from sparsekd.goals import Regression
from sparsekd.runs import baselines


@pytest.fixture(autouse=True)
def _few_trees(monkeypatch):
    monkeypatch.setattr(baselines, "BOOSTING_TREES", 60)


def ratings_task(users=20, items=15, noise=0.0, count=3000):
    """rating = 5 + user effect + item effect; the table holds both effects."""
    rng = np.random.default_rng(0)
    by_user, by_item = rng.normal(0, 1, users + 1), rng.normal(0, 1, items + 1)

    def part(n):
        user, item = rng.integers(1, users + 1, n), rng.integers(1, items + 1, n)
        target = torch.from_numpy((5 + by_user[user] + by_item[item] + noise * rng.normal(size=n)).astype(np.float32))
        features = np.stack([by_user[user], by_item[item], rng.normal(size=n)], axis=1).astype(np.float32)
        empty = torch.zeros(n, 1)
        inputs = (empty, empty, target + 0.5)
        return Rows(inputs, target, features, user, item)

    parts = part(count), part(500), part(500)
    sizes = {"users": users + 1, "items": items + 1, "user_features": 1, "item_features": 1}
    mean = parts[0].target.double().mean().item()
    return Task("made up", *parts, Regression((-5.0, 15.0)), sizes, mean, "none")


def test_constant_is_the_train_mean():
    task = ratings_task()
    error = task.test.target.double().numpy() - task.mean
    result = baselines.constant(task)
    assert (result.metrics["mae"], result.metrics["mse"]) == pytest.approx((np.abs(error).mean(), (error**2).mean()))


def test_biases_recover_additive_effects():
    task = ratings_task()
    result = baselines.biases(task)
    assert result.metrics["mse"] < 0.002 < baselines.constant(task).metrics["mse"] and result.setting == "shrink 2"


def test_biases_of_unknown_users_and_items_are_zero():
    task = ratings_task()
    unknown = Rows(task.test.inputs, task.test.target, task.test.features, task.test.users * 0, task.test.items * 0)
    prediction = baselines.predict_by_biases(task, unknown, shrink=5.0)
    np.testing.assert_allclose(prediction, task.train.target.double().mean().item())


def test_running_biases_score_the_prior():
    assert baselines.running_biases(ratings_task()).metrics["mae"] == pytest.approx(0.5, abs=1e-5)


def test_ridge_and_boosting_use_the_table():
    task = ratings_task(noise=0.3)
    constant, ridge, boosting = (
        run(task).metrics["mse"] for run in (baselines.constant, baselines.ridge, baselines.boosting)
    )
    assert 0.07 < ridge < 0.12  # the noise is 0.09
    assert 0.07 < boosting < 0.3 * constant


def test_every_baseline_is_deterministic_and_listed_once():
    task = ratings_task(noise=0.3, count=400)
    first, second = baselines.run(task), baselines.run(task)
    assert first == second
    assert [s.name for s in first] == ["constant", "user+item biases", "running biases", "ridge", "gradient boosting"]


def test_what_was_computed_is_kept_for_the_same_task(tmp_path, monkeypatch):
    task, path = ratings_task(noise=0.3, count=400), tmp_path / "baselines.json"
    about = {"task": task.name, "sizes": task.sizes}
    first = baselines.kept(task, path, about)
    assert first == [score.to_dict() for score in baselines.run(task)]
    calls = []
    monkeypatch.setattr(baselines, "run", lambda task: calls.append(task) or [])
    assert baselines.kept(task, path, about) == first and not calls
    for changed, more in ((task, {"quick": True}), (dataclasses.replace(task, split="another"), {})):
        assert baselines.kept(changed, path, {**about, **more}) == []  # of this one nothing was kept
    assert len(calls) == 2
    assert baselines.kept(task, path, about, anew=True) == [] and len(calls) == 3
    for wrong in ("{", "[]", "{}"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"baselines.json is damaged .* delete it"):
            baselines.kept(task, path, about)


def test_row_weights_count():
    """Two contradicting halves: the fit follows the one with the weight."""
    features = np.ones((200, 1), np.float32) * np.repeat([[1.0], [-1.0]], 100, axis=0).astype(np.float32)
    target = torch.cat([torch.full((100,), 1.0), torch.full((100,), 3.0)])
    same = np.ones((200, 1), np.float32)
    weight = np.repeat([1.0, 0.0], 100).astype(np.float32)
    train = Rows((torch.from_numpy(same),), target, same, weight=weight)
    test = Rows((torch.from_numpy(features),), torch.ones(200), same)
    task = Task("made up", train, test, test, Regression((0.0, 5.0)), {"features": 1}, 2.0, "none")
    assert baselines.ridge(task).metrics["mse"] < 1e-6 and baselines.boosting(task).metrics["mse"] < 1e-6
    assert [s.name for s in baselines.run(task)] == ["constant", "ridge", "gradient boosting"]


def test_what_the_rows_lack_leaves_out_who_needs_it():
    task = ratings_task(count=400)
    bare = dataclasses.replace(task.train, features=None, users=None, items=None)
    assert [s.name for s in baselines.run(dataclasses.replace(task, train=bare))] == ["constant"]
    bare = dataclasses.replace(task.train, features=None)
    names = [s.name for s in baselines.run(dataclasses.replace(task, train=bare))]
    assert names == ["constant", "user+item biases", "running biases"]


def test_predictions_are_clipped_to_the_target_range():
    task = ratings_task()
    wild = np.full(len(task.test), 1e6)
    limit = np.full(len(task.test), 15.0)
    assert baselines.score("", task, task.test, wild) == baselines.score("", task, task.test, limit)


def test_biases_need_users_and_items():
    task = ratings_task()
    films = dataclasses.replace(task.train, users=None, items=None)
    plain = dataclasses.replace(task, name="films", train=films)
    for run in (baselines.biases, baselines.running_biases):
        with pytest.raises(ValueError, match="needs a task with users and items, got 'films'"):
            run(plain)


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(RuntimeError, match=r"sparsekd\[run\]"):
        baselines.ridge(ratings_task(count=50))
