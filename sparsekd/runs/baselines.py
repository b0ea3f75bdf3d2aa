"""Predictors that a network has to beat: constant, user+item biases, running biases, ridge, gradient boosting; and of
rankings popularity, item neighbours and EASE (neighbours.py).

All are deterministic, fitted on train; their one setting is chosen by the squared error on val.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import write_atomically
from ..data import Rows, Task
from ..goals import Regression
from ..version import __version__
from . import neighbours
from .runtime import rank

BIAS_SHRINKS = (2.0, 5.0, 10.0, 20.0, 40.0)
RIDGE_ALPHAS = (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)
BOOSTING_LEAVES = (6, 16)
BOOSTING_TREES = 150


@dataclass(frozen=True)
class Score:
    """What a predictor reaches on a part, by the metrics of the goal of its task; its `setting` in words."""

    name: str
    metrics: dict[str, float]
    setting: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As a report has it."""
        return {"name": self.name, **self.metrics, "setting": self.setting}


def score(name: str, task: Task, part: Rows, prediction: np.ndarray, setting: str = "") -> Score:
    """What `prediction` [N] is worth on a part of a task whose target is a number."""
    if not isinstance(task.goal, Regression):
        raise ValueError(f"sparsekd.runs.baselines: {name} predicts numbers, got a task of {task.goal.name}")
    return Score(name, task.goal.measure(torch.from_numpy(prediction), part.target.cpu()), setting)


def run(task: Task) -> list[Score]:
    """Every baseline that the goal of the task names, on its test part; without users, or a table of features, a task
    leaves out those that need them."""
    has = {name: getattr(task.train, name, None) is not None for name in ("users", "features")}
    named = [BASELINES[name] for name in task.goal.baselines]
    return [baseline(task) for baseline in named if has.get(NEEDS.get(baseline, ""), True)]


def kept(task: Task, path: Path, about: Mapping[str, Any], anew: bool = False) -> list[dict[str, Any]]:
    """What `run` gives, as a report has it: computed unless `path` holds it for the same `about`, and kept there.

    Raises ValueError for a damaged file.
    """
    split = task.split, task.meta.get("split_sha256"), task.meta.get("users_judged")
    by = {"baselines": task.goal.baselines, "split": split, "version": __version__}
    asked = json.loads(json.dumps({**about, **by}))
    if path.is_file() and not anew:
        try:
            before = json.loads(path.read_text())
            if before["about"] == asked:
                return before["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"sparsekd run: {path} is damaged ({error!r}); delete it, it is computed again") from error
    scores = [score.to_dict() for score in run(task)]
    if rank() == 0:
        write_atomically(path, json.dumps({"about": asked, "scores": scores}, indent=1).encode())
    return scores


def constant(task: Task) -> Score:
    """The train mean."""
    return score("constant", task, task.test, np.full(len(task.test), task.mean))


def biases(task: Task) -> Score:
    """mean + item bias + user bias, shrunk, fitted on train alone: what was learned before val began."""
    best = min(
        (_squared_error(task.val, task, predict_by_biases(task, task.val, shrink)), shrink) for shrink in BIAS_SHRINKS
    )
    return score(
        "user+item biases", task, task.test, predict_by_biases(task, task.test, best[1]), f"shrink {best[1]:g}"
    )


def running_biases(task: Task) -> Score:
    """The same, kept up to date by every rating that came earlier: the network's own starting point."""
    _need_users(task, "running_biases")
    return score("running biases", task, task.test, task.test.inputs[2].numpy())


def ridge(task: Task) -> Score:
    """Ridge regression on the feature table."""
    linear_model, _ = _sklearn()
    models = [linear_model.Ridge(alpha=alpha, random_state=0) for alpha in RIDGE_ALPHAS]
    return _best("ridge", task, {f"alpha {m.alpha:g}": m for m in models})


def boosting(task: Task) -> Score:
    """Histogram gradient boosting on the feature table; the number of trees is chosen on val as well."""
    _, ensemble = _sklearn()
    best: tuple[float, str, np.ndarray] | None = None
    for leaves in BOOSTING_LEAVES:
        model = ensemble.HistGradientBoostingRegressor(
            learning_rate=0.1, max_iter=BOOSTING_TREES, max_leaf_nodes=leaves, early_stopping=False, random_state=0
        )
        with _one_thread():
            model.fit(task.train.features, task.train.target.numpy(), sample_weight=task.train.weight)
            errors = [_squared_error(task.val, task, p) for p in model.staged_predict(task.val.features)]
            trees = int(np.argmin(errors))
            if best is None or errors[trees] < best[0]:
                staged = islice(model.staged_predict(task.test.features), trees, None)
                best = errors[trees], f"{trees + 1} trees of {leaves} leaves", next(staged)
    assert best is not None
    return score("gradient boosting", task, task.test, best[2], best[1])


def popular(task: Task) -> Score:
    """The same items for everybody."""
    return Score("popularity", *neighbours.popular(task))


def item_knn(task: Task) -> Score:
    """Items chosen together."""
    return Score("ItemKNN", *neighbours.item_knn(task))


def ease(task: Task) -> Score:
    """Linear weights between items."""
    return Score("EASE", *neighbours.ease(task))


# By the names that goals call them.
BASELINES: dict[str, Callable[[Task], Score]] = {
    "constant": constant,
    "biases": biases,
    "running_biases": running_biases,
    "ridge": ridge,
    "boosting": boosting,
    "popular": popular,
    "item_knn": item_knn,
    "ease": ease,
}
NEEDS: dict[Callable[[Task], Score], str] = {  # fields of `Rows`
    biases: "users",
    running_biases: "users",
    ridge: "features",
    boosting: "features",
}


def _best(name: str, task: Task, models: dict[str, Any]) -> Score:
    fitted = {
        k: m.fit(task.train.features, task.train.target.numpy(), sample_weight=task.train.weight)
        for k, m in models.items()
    }
    setting = min(fitted, key=lambda k: _squared_error(task.val, task, fitted[k].predict(task.val.features)))
    return score(name, task, task.test, fitted[setting].predict(task.test.features), setting)


def _squared_error(part: Rows, task: Task, prediction: np.ndarray) -> float:
    return score("", task, part, prediction).metrics["mse"]


def predict_by_biases(task: Task, part: Rows, shrink: float, rounds: int = 10) -> np.ndarray:
    """Alternate shrunk means of residuals, items then users (Koren, Bell & Volinsky 2009, equation 1)."""
    _need_users(task, "biases")
    users, items, target = task.train.users, task.train.items, task.train.target.double().numpy()
    assert users is not None and items is not None and part.users is not None and part.items is not None
    by_user, by_item = np.zeros(task.sizes["users"]), np.zeros(task.sizes["items"])
    mean = target.mean()
    for _ in range(rounds):
        by_item = _shrunk_means(items, target - mean - by_user[users], len(by_item), shrink)
        by_user = _shrunk_means(users, target - mean - by_item[items], len(by_user), shrink)
    return mean + by_user[part.users] + by_item[part.items]


def _shrunk_means(keys: np.ndarray, values: np.ndarray, size: int, shrink: float) -> np.ndarray:
    return np.bincount(keys, values, size) / (np.bincount(keys, minlength=size) + shrink)


def _need_users(task: Task, what: str) -> None:
    if task.train.users is None or task.train.items is None:
        raise ValueError(f"sparsekd.runs.baselines.{what}: needs a task with users and items, got {task.name!r}")


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn import ensemble, linear_model
    except ImportError as error:
        raise RuntimeError(
            "sparsekd.runs.baselines needs scikit-learn for ridge and boosting; pip install 'sparsekd[run]'"
        ) from error
    return linear_model, ensemble


def _one_thread() -> AbstractContextManager[Any]:
    """Boosting alternates short parallel loops: on a busy machine, waiting threads make it many times slower."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    return threadpool_limits(1, user_api="openmp")
