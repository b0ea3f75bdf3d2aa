"""What a data reader hands over: tensors for the network, a table for the baselines, and where it all came from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..goals import Classification, Goal, Regression
from .parts import Rows


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
    train: Rows
    val: Rows
    test: Rows
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
