"""How a network learns: the settings of its optimizer and of the loop around it."""

from __future__ import annotations

from dataclasses import dataclass

RECIPES = ("ours", "paper")
RECALIBRATION = 10  # batches that give batch norm its statistics anew


@dataclass(frozen=True)
class Recipe:
    """Settings found on the validation part of a task.

    `dropout` acts before the last layer, `input_dropout` on the feature vector of a task without users. `ridge` is the
    penalty of the ridge regression to which the first-order part of the network is fixed; None: it is learned with the
    rest. The plans hand these three to the networks that they make.

    splits       into how many epochs one pass over the rows is split: few passes then leave room to prune in steps.
    optimizer    "adamw", "sgd" and "nesterov" with momentum 0.9, or "sparse-adam" of packed tables with sparse=True.
    milestones   the learning rate is multiplied by 0.1 after each of these epochs; None: cosine decay to zero.
    restart      what begins the learning rate anew: "rewind" (and a new stage), every "prune", or "never".
    select       the epoch a network is kept from: "best" of the validation part, or "last".
    recalibrate  whether batch norm statistics are taken anew before each validation (see `epochs.recalibrate`).
    averaged     decay of the average over steps that is scored and kept in place of the weights; 0: the weights.
    """

    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    dropout: float = 0.0
    input_dropout: float = 0.0
    ridge: float | None = None
    splits: int = 1
    optimizer: str = "adamw"
    milestones: tuple[int, ...] | None = None
    restart: str = "rewind"
    select: str = "best"
    recalibrate: bool = True
    averaged: float = 0.0

    def __post_init__(self) -> None:
        if self.splits < 1 or self.epochs % self.splits:
            raise ValueError(
                f"sparsekd.runs: the epochs of a recipe are whole passes of splits epochs each, got {self.epochs} "
                f"epochs and splits {self.splits}"
            )
        if not 0 <= self.averaged < 1:
            raise ValueError(f"sparsekd.runs: averaged is a decay in [0, 1), got {self.averaged}")
        if self.averaged and not self.recalibrate:
            raise ValueError("sparsekd.runs: averaged weights need batch norm statistics of their own; set recalibrate")
