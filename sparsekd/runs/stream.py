"""The loop over a stream: every window is first scored, as it comes to a network that has not seen it, then learnt.

    windows = data.periods(rows, times, edges)                   # or a stream of data.streams
    method = Method(Plain(model, Click()))                       # or one that prunes, by windows
    history = learn(method, windows, Click(), Online(lr=1e-3))

The score of a window before it is learnt ("test, then train") needs no part of its own: every row is new once. A state
file makes the loop go on after a kill with the same bits as one that was not stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import distributed, energy
from ..data import Period
from ..goals import Click, Goal, predict
from ..methods import Method, Staged
from .evaluate import kept_share
from .runtime import OutOfTime, Runtime, is_over, rank
from .state import StateFile, check_same_settings
from .steps import Rate, Stepper
from .tally import Tally

__all__ = ["Learner", "Online", "learn"]


@dataclass(frozen=True)
class Online:
    """How a stream is learnt: at one rate, in the order in which it comes, every row once.

    optimizer  "adamw", or "sgd" and "nesterov" with momentum 0.9.
    """

    lr: float
    weight_decay: float = 0.0
    batch_size: int = 512
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            number = getattr(self, name)
            if not 0.0 <= number < math.inf:
                raise ValueError(f"sparsekd.runs.stream.Online: {name} must be a finite number >= 0, got {number}")
        if self.batch_size < 1:
            raise ValueError(f"sparsekd.runs.stream.Online: batch_size must be at least 1, got {self.batch_size}")


class Learner:
    """A method on a stream: scores a window as it comes, then learns it."""

    def __init__(self, method: Method, goal: Goal, online: Online, *, seed: int = 0, runtime: Runtime | None = None):
        self.method, self.goal, self.online, self.seed = method, goal, online, seed
        self.runtime = runtime or Runtime()
        distributed.broadcast(method.student)
        self.stepper = Stepper(method, online.optimizer, self.runtime)
        self.tally = Tally() if isinstance(goal, Click) else None

    @property
    def model(self) -> nn.Module:
        """What is scored: of a method that serves another one than it trains, that one."""
        return self.method.serving_student

    def parts(self) -> dict[str, Any]:
        """What has a state, in the order in which it is loaded."""
        parts = {"method": self.method, "model": self.method.student, "optimizer": self.stepper.optimizer}
        return parts if self.tally is None else {**parts, "tally": self.tally}

    def learn(self, number: int, window: Period) -> dict[str, Any]:
        """Score the window `number`, learn it, and say what happened: a record as `learn` returns them.

        Raises ValueError for an empty window and for features that are not finite, RuntimeError where training
        diverges; the window has not been learnt then.
        """
        _check_rows(number, window)
        scores = self._scores(window)
        with energy.EnergyMeter(self.runtime.device) as meter:
            losses = _learn_window(self.stepper, window, self.online, self.seed, number)
            if not math.isfinite(losses["loss"]):
                raise RuntimeError(
                    f"sparsekd.runs.stream: training diverged in window {number}, {window.start:g}..{window.end:g} "
                    f"(loss {losses['loss']}); lower the learning rate ({self.online.lr:g})"
                )
            self.stepper.check_ranks()
            density = kept_share(self.model)
            event = self.method.after_boundary(number)
        if event is not None and self.runtime.compiled:
            torch.compiler.reset()  # dynamo gives up after 8 shapes of one function
        return {
            "window": number,
            "start": window.start,
            "end": window.end,
            "rows": len(window),
            **scores,
            **losses,
            "density": density,
            "pruned": event is not None,
            "rewound": event is not None and event.rewound,
            "seconds": meter.reading.seconds,
            "joules": meter.reading.joules,
        }

    def _scores(self, window: Period) -> dict[str, Any]:
        if self.tally is None:
            return self.goal.scores(self.model, window)
        scores = self.tally.add(predict(self.model, window), window.rows.target.cpu())
        return {**scores, "cumulated": self.tally.cumulated()}


def learn(
    method: Method,
    windows: Iterable[Period],
    goal: Goal,
    online: Online,
    *,
    seed: int = 0,
    state: Path | None = None,
    settings: dict[str, Any] | None = None,
    runtime: Runtime | None = None,
) -> list[dict[str, Any]]:
    """Score and learn every window in turn; returns a record of each, with the scores before it was learnt.

    A record has the number of the window (from 1), `start`, `end` and `rows`, every metric of the goal, the mean of
    every term of the loss, the kept share (`density`) during the window, whether the window ended with a prune and a
    rewinding, and seconds and joules of learning and pruning. Of `Click` it has `cumulated`, too: the metrics
    of all windows so far; what means nothing in a window without clicks, or of clicks alone, is None.
    `method.after_boundary(number)` is called at the end of every window.

    `windows` are those of `data.periods`, or a `data.streams` source, which is read as it goes.

    `state` is a file from which the same call (with the same `settings`) goes on after a kill, and with further windows
    behind those that it has learnt. Raises ValueError for windows out of order, empty ones, for more of them than the
    method plans and for a state of other settings or windows, OutOfTime after the window in which the deadline of
    `runtime` passed, RuntimeError where training diverges.
    """
    runtime = runtime or Runtime()
    if isinstance(windows, Sequence):
        _check_order(windows)
        _check_length(method, len(windows))
    torch.manual_seed(2_000 + seed)  # dropout
    learner = Learner(method, goal, online, seed=seed, runtime=runtime)
    file, history = None, list[dict[str, Any]]()
    if state is not None:
        parts = learner.parts()
        if hasattr(windows, "load_state_dict"):
            parts["source"] = windows
        file = StateFile(state, parts, settings or {}, runtime.device)
        history = file.resume()
        if isinstance(windows, Sequence):
            windows = _rest(state, windows, history)
    end = history[-1]["end"] if history else -math.inf
    coming = iter(windows)
    window = next(coming, None)
    while window is not None:
        number = len(history) + 1
        _check_length(method, number)
        if window.start < end:
            raise ValueError(_out_of_order(number, window.start, end))
        end = window.end
        history.append(learner.learn(number, window))
        if file is not None and rank() == 0:
            file.save(history)
        window = next(coming, None)
        if window is not None and is_over(runtime.deadline):
            total = f" of {len(history) + 1 + sum(1 for _ in coming)}" if isinstance(windows, Sequence) else ""
            raise OutOfTime(f"{number}{total} windows")
    return history


def _learn_window(stepper: Stepper, window: Period, online: Online, seed: int, number: int) -> dict[str, float]:
    """One pass over the window; the mean of every term of the loss."""
    rate = Rate(online.lr, online.weight_decay)
    augmenting = torch.Generator().manual_seed(1_000_003 * seed + number)
    batches = window.batches(online.batch_size, augmenting, rank(), distributed.num_ranks())
    return stepper.learn(batches, lambda step: rate)


def _rest(path: Path, windows: Sequence[Period], history: Sequence[dict[str, Any]]) -> Sequence[Period]:
    """The windows that have not been learnt.  ValueError where those that have are not among them as they were."""
    then = [[one["start"], one["end"], one["rows"]] for one in history]
    now = [[w.start, w.end, len(w)] for w in windows[: len(then)]]
    check_same_settings(path, {"windows": then}, {"windows": now})
    return windows[len(then) :]


def _check_rows(number: int, window: Period) -> None:
    if not len(window):
        raise ValueError(
            f"sparsekd.runs.stream.learn: window {number}, {window.start:g}..{window.end:g}, has no row; "
            "join it to one beside it"
        )
    for place, x in enumerate(window.rows.inputs):
        if x.is_floating_point() and not torch.isfinite(x).all():
            row = int(torch.nonzero(~torch.isfinite(x.flatten(1)).all(1) if x.dim() > 1 else ~torch.isfinite(x))[0])
            raise ValueError(
                f"sparsekd.runs.stream.learn: window {number} has NaN or infinity in input {place} of row {row}; "
                "fill it in or drop the row"
            )


def _check_order(windows: Sequence[Period]) -> None:
    for number, (before, after) in enumerate(pairwise(windows), 2):
        if after.start < before.end:
            raise ValueError(_out_of_order(number, after.start, before.end))


def _out_of_order(number: int, start: float, end: float) -> str:
    return (
        f"sparsekd.runs.stream.learn: window {number} must not start before the end of the one before it, "
        f"got {start:g} < {end:g}; data.periods cuts a stream in order"
    )


def _check_length(method: Method, windows: int) -> None:
    if isinstance(method, Staged) and windows > method.epochs:
        raise ValueError(
            f"sparsekd.runs.stream.learn: {method.name} plans {method.epochs} windows, got {windows}; make it "
            f"with epochs={windows}"
        )
