"""The loop over epochs: train, validate, keep the best; stopped at any time, it goes on.

`fit` is the loop of the README with a learning rate, a validation and a state file. Shuffles follow from (seed, epoch),
and everything else that matters is in the state file, so that a run which was killed ends with the same bits as one
which was not. On several ranks (torchrun) each takes its share of every batch, and rank 0 writes the files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checkpoint, distributed, energy
from ..data import Part, Task
from ..data.parts import Batch
from ..goals import Metric
from ..methods import Staged
from ..models.maps import in_training_layout
from ..teacher_cache import TeacherCache
from .averaging import AveragedWeights
from .evaluate import kept_share
from .learners import learner_of
from .plans.network import Network
from .plans.recipe import RECALIBRATION, Recipe
from .rates import cycle_of, learning_rate, level_of
from .runtime import OutOfTime, Runtime, is_over, rank
from .state import StateFile
from .steps import Rate, Stepper, TaughtBatch
from .teaching import taught_batches

__all__ = ["SCORED", "STATE", "fit", "picked_epoch", "recalibrate"]

STATE = "state.safetensors"
SCORED = 8  # batches by which blocks are judged before training


def fit(
    model: nn.Module,
    task: Task,
    network: Network,
    *,
    teacher: nn.Module | None = None,
    kept: TeacherCache | None = None,
    seed: int = 0,
    folder: Path,
    settings: dict[str, Any] | None = None,
    runtime: Runtime | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place; returns what happened in each epoch.

    `kept` is what the teacher says and sees of every train row; without it the teacher is run in every step.

    `folder` gets the picked epoch of every density of the network (`network.file`), and state.safetensors, from which
    the same call (with the same `settings`) goes on after a kill. A prune before the first step counts among the
    seconds and joules of the first epoch, which then is "pruned_before". Raises OutOfTime after the epoch in which the
    deadline of `runtime` passed, RuntimeError where training diverges.
    """
    recipe, settings, runtime = network.recipe, settings or {}, runtime or Runtime()
    distributed.broadcast(model)
    method = learner_of(model, task, network, teacher, seed)
    averaged = AveragedWeights(model, recipe.averaged)
    stepper = Stepper(method, recipe.optimizer, runtime, averaged.update)
    parts: dict[str, Any] = {"method": method, "model": model}
    parts |= {"averaged": averaged} if recipe.averaged else {}
    parts["optimizer"] = stepper.optimizer
    state = StateFile(folder / STATE, parts, settings, runtime.device)
    epochs = state.resume()
    for epoch in _progress(range(len(epochs) + 1, recipe.epochs + 1), recipe.epochs, f"{network.name} seed {seed}"):
        with energy.EnergyMeter(runtime.device) as meter:
            began, first = time.perf_counter(), None
            if epoch == 1:
                with runtime.autocast():
                    first = method.before_training(islice(_batches(stepper, task, network, 1, seed, kept), SCORED))
            before = time.perf_counter() - began
            losses = _train(stepper, task, network, epoch, seed, kept)
        _check_finite(losses["loss"], network, epoch)
        stepper.check_ranks()
        with averaged.in_place(), in_training_layout(model):
            if recipe.recalibrate:
                recalibrate(model, task.train, recipe.batch_size, _shuffle(seed, epoch))
            with runtime.autocast():
                scores = task.goal.scores(model, task.val)
        epochs.append(
            {
                "epoch": epoch,
                **losses,
                **{f"val_{name}": value for name, value in scores.items()},
                "density": kept_share(model),
                "level": level_of(method, epoch),
                "pruned": False,
                "rewound": False,
                "seconds": meter.reading.seconds,
                "step_ms": 1e3 * (meter.reading.seconds - before) / len(_steps_of(task.train, recipe, epoch)),
                "joules": meter.reading.joules if runtime.alone else None,
            }
        )
        if first is not None:
            epochs[-1]["pruned_before"] = True
        if not runtime.alone:
            epochs[-1]["beside_others"] = True
        with averaged.in_place():
            _keep(model, network, epochs, task.goal.judge, folder, settings)
        event = method.after_boundary(epoch)
        if event is not None:
            epochs[-1] |= {"pruned": True, "rewound": event.rewound}
            averaged.restart()
            if runtime.compiled:
                torch.compiler.reset()  # dynamo gives up after 8 shapes of one function
        if rank() == 0:
            state.save(epochs)
        if epoch < recipe.epochs and is_over(runtime.deadline):
            raise OutOfTime(f"{network.name} seed {seed}: {epoch} of {recipe.epochs} epochs")
    return epochs


def _train(
    stepper: Stepper, task: Task, network: Network, epoch: int, seed: int, kept: TeacherCache | None
) -> dict[str, float]:
    """One epoch; the mean of every term of the loss."""
    recipe = _recipe_now(stepper, network)
    cycle = cycle_of(stepper.method, epoch, recipe)
    steps = len(_steps_of(task.train, recipe, epoch))

    def rate_at(step: int) -> Rate:
        return Rate(learning_rate(recipe, epoch, step / steps, cycle), recipe.weight_decay)

    return stepper.learn(_batches(stepper, task, network, epoch, seed, kept), rate_at)


def _batches(
    stepper: Stepper, task: Task, network: Network, epoch: int, seed: int, kept: TeacherCache | None
) -> Iterator[Batch | TaughtBatch]:
    recipe = _recipe_now(stepper, network)
    steps = _steps_of(task.train, recipe, epoch)
    batches: Iterator[Batch | TaughtBatch]
    of_pass = recipe.batch_size, _shuffle(seed, 1 + (epoch - 1) // recipe.splits), rank(), distributed.num_ranks()
    if kept is None:
        batches = task.train.batches(*of_pass)
    else:
        batches = taught_batches(task.train, kept, stepper.runtime, *of_pass, seed=seed, epoch=epoch)
    return islice(batches, steps.start, steps.stop)


def _steps_of(part: Part, recipe: Recipe, epoch: int) -> range:
    """The steps of this epoch among those of its pass over the rows."""
    steps, place = part.steps(recipe.batch_size), (epoch - 1) % recipe.splits
    if steps < recipe.splits:  # so few rows are all in every epoch
        return range(steps)
    return range(steps * place // recipe.splits, steps * (place + 1) // recipe.splits)


def _recipe_now(stepper: Stepper, network: Network) -> Recipe:
    """The first stage of SS-SAD may learn in a way of its own."""
    if network.ticket is not None and isinstance(stepper.method, Staged) and stepper.method.stage == "ticket":
        return network.ticket
    return network.recipe


def _check_finite(loss: float, network: Network, epoch: int) -> None:
    if not math.isfinite(loss):
        raise RuntimeError(
            f"sparsekd.runs: {network.name} diverged in epoch {epoch} (loss {loss}); lower the learning rate "
            f"({network.recipe.lr:g}) or the weights of the distillation (alpha {network.alpha:g}, beta "
            f"{network.beta:g})"
        )


def _keep(
    model: nn.Module,
    network: Network,
    epochs: list[dict[str, Any]],
    judge: Metric,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Write the model to the file of every density of which the latest epoch is the one to keep."""
    latest = epochs[-1]
    scores = {name: value for name, value in latest.items() if name.startswith("val_")}
    for density in network.densities or (1.0,):
        if rank() == 0 and latest is picked_epoch(epochs, density, network.recipe.select, judge):
            checkpoint.save(model, folder / network.file(density), epoch=latest["epoch"], **scores, **settings)


def picked_epoch(epochs: Sequence[dict[str, Any]], density: float, select: str, judge: Metric) -> dict[str, Any] | None:
    """The epoch a network is kept from among those at `density`: the last, or the first of the best validation score
    by `judge`; None before there is one."""
    at_density = [epoch for epoch in epochs if epoch["level"] == round(density, 6)]
    if not at_density:
        return None
    if select == "last":
        return at_density[-1]
    best, key = at_density[0], f"val_{judge.name}"
    for epoch in at_density[1:]:
        if judge.better(epoch[key], best[key]):
            best = epoch
    return best


@torch.no_grad()
def recalibrate(model: nn.Module, part: Part, batch_size: int, generator: torch.Generator) -> None:
    """Give every batch norm the mean and variance of RECALIBRATION batches of `part`, seen as evaluation sees them.

    The moving averages of training lag behind in short epochs, and dropout shifts their variance.
    """
    # Norms of vectors, images and volumes have this class in common.
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches
        norm.train()
    for inputs, _ in islice(part.batches(batch_size, generator), RECALIBRATION):
        model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train()


def _shuffle(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


def _progress(epochs: range, total: int, title: str) -> Any:
    """A progress bar on a terminal, nothing elsewhere (or without tqdm)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return epochs
    return tqdm(epochs, desc=title, initial=epochs.start - 1, total=total, unit="epoch", leave=False, disable=None)
