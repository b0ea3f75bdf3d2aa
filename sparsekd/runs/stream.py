"""The loop over a stream: every window is first scored, as it comes to a network that has not seen it, then learnt.

    windows = data.periods(rows, times, edges)
    method = Method(Plain(model, Click()))                       # or one that prunes, by windows
    history = learn(method, windows, Click(), Online(lr=1e-3))

The score of a window before it is learnt ("test, then train") needs no part of its own: every row is new once. A state
file makes the loop go on after a kill with the same bits as one that was not stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .. import distributed, energy
from ..data import Period
from ..goals import Goal
from ..methods import Method, Staged
from .evaluate import kept_share
from .runtime import OutOfTime, Runtime, is_over, rank
from .state import StateFile
from .steps import Rate, Stepper

__all__ = ["Online", "learn"]


@dataclass(frozen=True)
class Online:
    """How a stream is learnt: at one rate, in the order in which it comes, every row once.

    optimizer  "adamw", or "sgd" and "nesterov" with momentum 0.9.
    """

    lr: float
    weight_decay: float = 0.0
    batch_size: int = 512
    optimizer: str = "adamw"


def learn(
    method: Method,
    windows: Sequence[Period],
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
    rewinding, and seconds and joules. `method.after_boundary(number)` is called at the end of every window.

    `state` is a file from which the same call (with the same `settings`) goes on after a kill. Raises ValueError for
    windows out of order, for more of them than the method plans and for a state of other settings, OutOfTime after the
    window in which the deadline of `runtime` passed, RuntimeError where training diverges.
    """
    _check_order(windows)
    _check_length(method, windows)
    runtime = runtime or Runtime()
    model = method.student
    distributed.broadcast(model)
    torch.manual_seed(2_000 + seed)  # dropout
    stepper = Stepper(method, online.optimizer, runtime)
    file = None
    if state is not None:
        parts = {"method": method, "model": model, "optimizer": stepper.optimizer}
        of_stream = {**(settings or {}), "windows": [[w.start, w.end, len(w)] for w in windows]}
        file = StateFile(state, parts, of_stream, runtime.device)
    history = [] if file is None else file.resume()
    for number, window in enumerate(windows[len(history) :], len(history) + 1):
        scores = goal.scores(model, window)
        with energy.EnergyMeter(runtime.device) as meter:
            losses = _learn_window(stepper, window, online, seed, number)
        if not math.isfinite(losses["loss"]):
            raise RuntimeError(
                f"sparsekd.runs.stream: training diverged in window {number}, {window.start:g}..{window.end:g} (loss "
                f"{losses['loss']}); lower the learning rate ({online.lr:g})"
            )
        stepper.check_ranks()
        density = kept_share(model)
        event = method.after_boundary(number)
        if event is not None and runtime.compiled:
            torch.compiler.reset()  # dynamo gives up after 8 shapes of one function
        history.append(
            {
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
        )
        if file is not None and rank() == 0:
            file.save(history)
        if number < len(windows) and is_over(runtime.deadline):
            raise OutOfTime(f"{number} of {len(windows)} windows")
    return history


def _learn_window(stepper: Stepper, window: Period, online: Online, seed: int, number: int) -> dict[str, float]:
    """One pass over the window; the mean of every term of the loss."""
    rate = Rate(online.lr, online.weight_decay)
    augmenting = torch.Generator().manual_seed(1_000_003 * seed + number)
    batches = window.batches(online.batch_size, augmenting, rank(), distributed.num_ranks())
    return stepper.learn(batches, lambda step: rate)


def _check_order(windows: Sequence[Period]) -> None:
    for number, (before, after) in enumerate(pairwise(windows), 2):
        if after.start < before.end:
            raise ValueError(
                f"sparsekd.runs.stream.learn: window {number} must not start before the end of the one before it, "
                f"got {after.start:g} < {before.end:g}; data.periods cuts a stream in order"
            )


def _check_length(method: Method, windows: Sequence[Period]) -> None:
    if isinstance(method, Staged) and len(windows) > method.epochs:
        raise ValueError(
            f"sparsekd.runs.stream.learn: {method.name} plans {method.epochs} windows, got {len(windows)}; make it "
            f"with epochs={len(windows)}"
        )
