"""Rankings without embeddings: how often an item was chosen, which items are chosen together, and EASE.

All are fitted on train; the one setting of each is chosen on the validation part by the metric that judges.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Pairs, Task

__all__ = ["MOST_ITEMS", "best_of", "ease", "item_knn", "popular"]

NEIGHBOURS = (20, 50, 100, 200)
PENALTIES = (100.0, 300.0, 1000.0)
MOST_ITEMS = 10_000  # a matrix of items by items, which EASE inverts, takes 400 MB and minutes for so many
_TOO_MANY = f"not run: more than {MOST_ITEMS} items"


class _Scorer(nn.Module):
    """Scores of all items from what a user has seen."""

    def __init__(self, task: Task, of_histories: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.num_items, self.of_histories = task.train, task.sizes["items"], of_histories

    def score_items(self, users: Tensor) -> Tensor:
        seen = torch.zeros(len(users), self.num_items)
        offsets = self.part.seen_offsets
        for row, user in enumerate(users.tolist()):
            seen[row, self.part.seen_items[offsets[user] : offsets[user + 1]]] = 1
        return self.of_histories(seen)


def best_of(task: Task, models: Iterable[tuple[str, nn.Module]]) -> tuple[dict[str, float], str]:
    """(test scores, setting) of the model that does best on the validation part."""
    judge = task.goal.judge
    best: tuple[float, str, nn.Module] | None = None
    for setting, model in models:
        score = task.goal.scores(model, task.val)[judge.name]
        if best is None or judge.better(score, best[0]):
            best = score, setting, model
    assert best is not None
    return task.goal.scores(best[2], task.test), best[1]


def popular(task: Task) -> tuple[dict[str, float], str]:
    """The same items for everybody: those that most users chose."""
    times = torch.bincount(task.train.items, minlength=task.sizes["items"]).float()
    return best_of(task, [("", _Scorer(task, lambda seen: times.expand(len(seen), -1)))])


def item_knn(task: Task) -> tuple[dict[str, float], str]:
    """The sum over a user's items of their cosine with an item, each item having its nearest neighbours alone."""
    if task.sizes["items"] > MOST_ITEMS:
        return {}, _TOO_MANY
    cosine = _together(task.train)
    degree = cosine.diagonal().clamp(min=1).rsqrt()
    cosine *= degree[:, None] * degree
    cosine.fill_diagonal_(0)
    counts = sorted({min(count, len(cosine)) for count in NEIGHBOURS})
    return best_of(task, ((f"{n} neighbours", _Scorer(task, partial(_times, _nearest(cosine, n)))) for n in counts))


def ease(task: Task) -> tuple[dict[str, float], str]:
    """The item-item weights of least squares with a zero diagonal, in closed form (Steck, Embarrassingly Shallow
    Autoencoders for Sparse Data, WWW 2019, equation 8)."""
    if task.sizes["items"] > MOST_ITEMS:
        return {}, _TOO_MANY
    together = _together(task.train)
    return best_of(task, ((f"penalty {p:g}", _Scorer(task, partial(_times, _weights(together, p)))) for p in PENALTIES))


def _together(part: Pairs) -> Tensor:
    """How many users chose both: float32 [I, I]."""
    counts = part.seen_offsets.diff()
    users = torch.arange(len(counts)).repeat_interleave(counts)
    index = torch.stack([users, part.seen_items])
    size = (len(counts), part.num_items)
    chosen = torch.sparse_coo_tensor(index, torch.ones(len(users)), size, is_coalesced=True, check_invariants=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        together: Any = torch.sparse.mm(chosen.t(), chosen)
    return together.to_dense()


def _nearest(cosine: Tensor, count: int) -> Tensor:
    """[I, I]: in every column the `count` largest."""
    values, rows = cosine.topk(count, dim=0)
    return torch.zeros_like(cosine).scatter_(0, rows, values)


def _weights(together: Tensor, penalty: float) -> Tensor:
    inverse = torch.linalg.inv(together + penalty * torch.eye(len(together)))
    weights = -inverse / inverse.diagonal()
    return weights.fill_diagonal_(0)


def _times(weights: Tensor, seen: Tensor) -> Tensor:
    return seen @ weights
