"""What a data reader hands over: tensors for the network, a table for the baselines, and where it all came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """Optimiser settings found on the validation part of a task (AdamW, cosine decay to zero, early stopping).

    `epochs` is the length of the cosine schedule. `dropout` acts before the last layer, `input_dropout` on the feature
    vector of a task without users. `ridge` is the penalty of the ridge regression to which the first-order part of the
    network is fixed; None: it is learned with the rest. The networks of `sparsekd.models` read these three.
    """

    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    dropout: float = 0.0
    input_dropout: float = 0.0
    ridge: float | None = None


@dataclass(frozen=True)
class Split:
    """N rows of one part (train, val or test).

    inputs    tuple of tensors, first axis N: what the network is called with.
    target    float32 [N].
    features  float32 [N, F]: the same information as one table, for the baselines.
    users, items  int64 [N], 0 = not seen in train; None where the task has no users.
    weight    float32 [N] or None: how often a row is drawn in training, relative to the others (None: equally).
    """

    inputs: tuple[Tensor, ...]
    target: Tensor
    features: np.ndarray
    users: np.ndarray | None = None
    items: np.ndarray | None = None
    weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: slice | np.ndarray) -> Split:
        """The rows of a slice, an index array or a mask."""
        pick = torch.from_numpy(np.arange(len(self))[rows])
        return Split(
            inputs=tuple(x[pick] for x in self.inputs),
            target=self.target[pick],
            features=self.features[rows],
            users=None if self.users is None else self.users[rows],
            items=None if self.items is None else self.items[rows],
            weight=None if self.weight is None else self.weight[rows],
        )

    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Yield `(inputs, target)` of at most `size` rows: a training epoch with a generator, all in order without one.

        An epoch is a random order of the rows; with weights it is as many rows, drawn with replacement. It leaves out a
        last batch of one row, on which batch normalisation cannot be trained.
        """
        for rows in self._order(generator).split(size):
            if generator is None or len(rows) > 1:
                yield tuple(x[rows] for x in self.inputs), self.target[rows]

    def _order(self, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return torch.arange(len(self))
        if self.weight is None:
            return torch.randperm(len(self), generator=generator)
        return torch.from_numpy(self.weight).multinomial(len(self), replacement=True, generator=generator)


@dataclass(frozen=True)
class Task:
    """A regression task, split in time: test is later than train and val (`split` says how).

    name          "movietweetings", "movielens" or "movies-<group>".
    kind          "ratings": inputs are (user_features, item_features, prior);
                  "features": inputs are (features,).
    sizes         columns of the inputs: user_features and item_features, or features; and how many users and items
                  there are in train, plus one for the unknown. `mean` is the train mean of the target.
    target_range  (lowest, highest) possible target; predictions may be clipped to it.
    split         the split rule in words.
    meta          json-able: counts, source files with their sha256.
    """

    name: str
    kind: str
    train: Split
    val: Split
    test: Split
    sizes: dict[str, int]
    mean: float
    target_range: tuple[float, float]
    split: str
    teacher_recipe: Recipe
    student_recipe: Recipe
    meta: dict[str, Any] = field(default_factory=dict)

    def example_inputs(self, rows: int = 2) -> tuple[Tensor, ...]:
        """`rows` test inputs from the first on, over again where the part is shorter: for tracing and timing."""
        pick = torch.arange(rows) % len(self.test)
        return tuple(x[pick] for x in self.test.inputs)
