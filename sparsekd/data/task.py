"""What a data reader hands over: parts to learn from and to judge on, the goal, and where it all came from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..goals import Goal
from .parts import Part

P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Task(Generic[P]):
    """What to learn: three parts and how they came about (`split` says it).

    Args:
        name: "movietweetings", "movielens", "movies-<group>", "cifar100" or "ranking-<folder>".
        train, val, test: the parts.
        goal: what a network is for: its loss, and how it is judged.
        sizes: what a network must know to fit the inputs. Of ratings (user_features, item_features, prior): columns of
            user_features and item_features, and how many users and items there are in train, plus one for the unknown;
            of one vector of features: columns of features; of images: classes and pixels; of rankings: users and items.
        mean: train mean of a target that is a number; 0 where it is a class.
        split: the split rule in words.
        meta: json-able: counts, source files with their sha256.
    """

    name: str
    train: P
    val: P
    test: P
    goal: Goal
    sizes: dict[str, int]
    mean: float
    split: str
    meta: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Task[P]:
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def example_inputs(self, rows: int = 2) -> tuple[Tensor, ...]:
        """`rows` test inputs from the first on, over again where the part is shorter: for tracing and timing."""
        return self.test.examples(rows)
