"""What a data reader hands over: tensors for the network, a table for the baselines, and where it all came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..goals import Classification, Goal, Regression


@dataclass(frozen=True)
class Recipe:
    """Optimiser settings found on the validation part of a task.

    `dropout` acts before the last layer, `input_dropout` on the feature vector of a task without users. `ridge` is the
    penalty of the ridge regression to which the first-order part of the network is fixed; None: it is learned with the
    rest. The networks of `sparsekd.models` read these three.

    optimizer    "adamw", or "sgd" and "nesterov" with momentum 0.9.
    milestones   the learning rate is multiplied by 0.1 after each of these epochs; None: cosine decay to zero.
    restart      what begins the learning rate anew: "rewind" (and a new stage), every "prune", or "never".
    select       the epoch a network is kept from: "best" of the validation part, or "last".
    recalibrate  whether batch norm statistics are taken anew before each validation (see `runs.epochs.recalibrate`).
    """

    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    dropout: float = 0.0
    input_dropout: float = 0.0
    ridge: float | None = None
    optimizer: str = "adamw"
    milestones: tuple[int, ...] | None = None
    restart: str = "rewind"
    select: str = "best"
    recalibrate: bool = True


Prepare = Callable[[tuple[Tensor, ...], torch.Generator | None], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Split:
    """N rows of one part (train, val or test).

    inputs    tuple of tensors, first axis N: what the network is called with, once `prepare` has seen it.
    target    float32 [N], or int64 [N] where it is a class.
    features  float32 [N, F]: the same information as one table, for the baselines; None where there are none.
    users, items  int64 [N], 0 = not seen in train; None where the task has no users.
    weight    float32 [N] or None: how often a row is drawn in training, relative to the others (None: equally).
    prepare   makes the inputs of a batch from its rows, e.g. images from bytes; with a generator it augments them.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor
    features: np.ndarray | None
    users: np.ndarray | None = None
    items: np.ndarray | None = None
    weight: np.ndarray | None = None
    prepare: Prepare | None = None

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: slice | np.ndarray) -> Split:
        """The rows of a slice, an index array or a mask."""
        pick = torch.from_numpy(np.arange(len(self))[rows])
        return replace(
            self,
            inputs=tuple(x[pick] for x in self.inputs),
            target=self.target[pick],
            features=None if self.features is None else self.features[rows],
            users=None if self.users is None else self.users[rows],
            items=None if self.items is None else self.items[rows],
            weight=None if self.weight is None else self.weight[rows],
        )

    def to(self, device: torch.device | str) -> Split:
        """The same rows with inputs and target on `device`."""
        return replace(self, inputs=tuple(x.to(device) for x in self.inputs), target=self.target.to(device))

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Yield `(inputs, target)` of at most `size` rows: a training epoch with a generator, all in order without one.

        An epoch is a random order of the rows; with weights it is as many rows, drawn with replacement. It leaves out a
        last batch of one row, on which batch normalisation cannot be trained. Of several `ranks`, each gets its share
        of every batch.
        """
        order = self._order(generator)
        if generator is not None and rank:  # other crops than rank 0 has, in the same order of rows
            generator = torch.Generator().manual_seed(generator.initial_seed() + 7_919 * rank)
        for rows in order.split(size):
            if generator is None or len(rows) > 2 * ranks - 1:
                inputs, target = self._rows(rows[rank::ranks])
                yield self.prepared(inputs, generator), target

    def prepared(self, inputs: tuple[Tensor, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return inputs if self.prepare is None else self.prepare(inputs, generator)

    def examples(self, rows: int = 2) -> tuple[Tensor, ...]:
        """What a network gets for the first `rows` rows, over again where there are fewer: for tracing and timing."""
        return self.prepared(self._rows(torch.arange(rows) % len(self))[0])

    def _rows(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        rows = rows.to(self.target.device)
        return tuple(x[rows] for x in self.inputs), self.target[rows]

    def _order(self, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return torch.arange(len(self))
        if self.weight is None:
            return torch.randperm(len(self), generator=generator)
        return torch.from_numpy(self.weight).multinomial(len(self), replacement=True, generator=generator)


@dataclass(frozen=True)
class Task:
    """What to learn: three parts and how they came about (`split` says it).

    name          "movietweetings", "movielens", "movies-<group>" or "cifar100".
    kind          "ratings": inputs are (user_features, item_features, prior), the target is a number;
                  "features": inputs are (features,), the target is a number;
                  "images": inputs are (images [N, 3, H, W],), the target is a class.
    sizes         columns of the inputs: user_features and item_features, or features; and how many users and items
                  there are in train, plus one for the unknown; of images: classes and pixels. `mean` is the train mean
                  of the target.
    target_range  (lowest, highest) possible target; predictions of numbers may be clipped to it.
    networks      names of teacher and student in `models.CLASSIFIERS`, for images.
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
    networks: tuple[str, str] | None = None

    @property
    def metric(self) -> str:
        """What a network is judged by: "mse" (lower is better), or "accuracy" of classes (higher is)."""
        return "accuracy" if self.kind == "images" else "mse"

    @property
    def goal(self) -> Goal:
        return Classification() if self.kind == "images" else Regression(self.target_range)

    def to(self, device: torch.device | str) -> Task:
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def example_inputs(self, rows: int = 2) -> tuple[Tensor, ...]:
        """`rows` test inputs from the first on, over again where the part is shorter: for tracing and timing."""
        return self.test.examples(rows)
