"""The training loop: one network, one teacher or none, one method or none; stopped at any time, it goes on.

`fit` is the loop of the README with a learning rate, a validation and a state file. Shuffles follow from (seed, epoch),
and everything else that matters is in the state file, so that a run which was killed ends with the same bits as one
which was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, energy
from .data import Recipe, Split, Task
from .distill import Distiller
from .evaluate import NOT_PRUNED, errors, kept_share, predict
from .methods import METHODS, Method
from .pruning import LinearSchedule

__all__ = ["Network", "best_epoch", "check_same_settings", "fit", "plan", "recalibrate"]

RECALIBRATION = 10  # batches


@dataclass(frozen=True)
class Network:
    """One network to train: its name in the report, its folder, how it learns."""

    name: str
    folder: str
    recipe: Recipe
    alpha: float = 0.0
    beta: float = 0.0
    method: str | None = None
    density: float | None = None


def fit(
    model: nn.Module,
    task: Task,
    network: Network,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    folder: Path,
    settings: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place; returns what happened in each epoch.

    `folder` gets model.safetensors, the best epoch, and state.safetensors, from which the same call (with the same
    `settings`) goes on after a kill. The best epoch has the smallest validation MSE of those at the final density.
    """
    recipe, settings = network.recipe, settings or {}
    trainee = _trainee(model, task, network, teacher, seed)  # prunes `model`, so it comes before the optimizer
    method = trainee if isinstance(trainee, Method) else None
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *trainee.parameters()], lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    if method:
        method.attach(optimizer)
    parts = {"model": model, "trainee": trainee, "optimizer": optimizer}
    epochs = _resume(folder / "state.safetensors", parts, settings)
    for epoch in _progress(range(len(epochs) + 1, recipe.epochs + 1), recipe.epochs, f"{network.name} seed {seed}"):
        with energy.EnergyMeter("cpu") as meter:
            losses = _train_epoch(model, trainee, optimizer, task, recipe, epoch, seed)
        if not math.isfinite(losses["loss"]):
            raise RuntimeError(
                f"sparsekd.train: {network.name} diverged in epoch {epoch} (loss {losses['loss']}); lower the learning "
                f"rate ({recipe.lr:g}) or the weights of the distillation (alpha {network.alpha:g}, beta "
                f"{network.beta:g})"
            )
        recalibrate(model, task.train, recipe.batch_size, _shuffle(seed, epoch))
        val_mae, val_mse = errors(predict(model, task.val), task, task.val)
        epochs.append(
            {
                "epoch": epoch,
                **losses,
                "val_mae": val_mae,
                "val_mse": val_mse,
                "density": kept_share(model),
                "final_density": method is None or epoch > _last_prune(method),
                "pruned": False,
                "seconds": meter.reading.seconds,
                "step_ms": 1e3 * meter.reading.seconds / math.ceil(len(task.train) / recipe.batch_size),
                "joules": meter.reading.joules,
            }
        )
        if epochs[-1] is best_epoch(epochs):
            checkpoint.save(model, folder / "model.safetensors", epoch=epoch, val_mse=val_mse, **settings)
        if method:
            epochs[-1]["pruned"] = method.after_epoch(epoch) is not None
        _save_state(folder / "state.safetensors", parts, epochs, settings)
    return epochs


def _train_epoch(
    model: nn.Module,
    trainee: Method | Distiller,
    optimizer: torch.optim.Optimizer,
    task: Task,
    recipe: Recipe,
    epoch: int,
    seed: int,
) -> dict[str, float]:
    """One epoch; the mean of every term of the loss."""
    first, last = _round(trainee, epoch, recipe.epochs)
    steps = math.ceil(len(task.train) / recipe.batch_size)
    sums, taken = torch.zeros(4), 0
    model.train()
    for inputs, target in task.train.batches(recipe.batch_size, _shuffle(seed, epoch)):
        done = (epoch - first + taken / steps) / (last - first + 1)  # share of the round that is over
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.zero_grad()
        losses = trainee.loss(inputs, target)
        losses.total.backward()
        optimizer.step()
        if isinstance(trainee, Method):
            trainee.after_step()
        sums += torch.stack([losses.total.detach(), losses.task, losses.kd, losses.sad])
        taken += 1
    return dict(zip(("loss", "task", "kd", "sad"), (sums / max(taken, 1)).tolist(), strict=True))


def _shuffle(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


@torch.no_grad()
def recalibrate(model: nn.Module, part: Split, batch_size: int, generator: torch.Generator) -> None:
    """Give every batch norm the mean and variance of RECALIBRATION batches of `part`, seen as evaluation sees them.

    The moving averages of training lag behind in short epochs, and dropout shifts their variance.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
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


def best_epoch(epochs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first epoch of smallest validation MSE among those at the final density; None before there is one."""
    return min((e for e in epochs if e["final_density"]), key=lambda e: e["val_mse"], default=None)


def _trainee(
    model: nn.Module, task: Task, network: Network, teacher: nn.Module | None, seed: int
) -> Method | Distiller:
    """What computes the loss of this network: the distillation alone, or a method around it."""
    torch.manual_seed(1_000 + seed)  # the SAD meta-network
    if network.alpha == network.beta == 0 or teacher is None:
        distiller = Distiller(model, model, (), (), alpha=0.0, beta=0.0)
    else:
        taps: tuple[Any, Any] = (teacher.tap_names, model.tap_names)
        examples = tuple(x[:2] for x in task.train.inputs)
        distiller = Distiller(teacher, model, *taps, example_inputs=examples, alpha=network.alpha, beta=network.beta)
    if network.method is None or network.density is None:
        return distiller
    schedule, options = plan(network.method, 1 - network.density, network.recipe.epochs)
    return METHODS[network.method](
        distiller,
        schedule,
        epochs=network.recipe.epochs,
        exclude=NOT_PRUNED,
        seed=seed,
        example_inputs=tuple(x[:2] for x in task.train.inputs),
        **options,
    )


def plan(method: str, removed: float, epochs: int) -> tuple[LinearSchedule, dict[str, Any]]:
    """When to prune: the schedule that has removed the share `removed` after at most two thirds of the epochs.

    Three equal steps up to half of the epochs (SP-SAD, LTH-SAD). SS-SAD removes its first step in a ticket of a third
    of the epochs, and the two others in the next third.
    """
    if method == "ss-sad":
        ticket = max(2, epochs // 3)
        every = max(1, ticket // 2)
        schedule = LinearSchedule(removed / 3, every, final=removed, start=removed / 3)
        return schedule, {"initial": LinearSchedule(removed / 3, every, final=removed / 3), "initial_epochs": ticket}
    prunes = min(3, epochs - 1)
    return LinearSchedule(removed / prunes, max(1, epochs // (2 * prunes)), final=removed), {}


def _round(trainee: Method | Distiller, epoch: int, epochs: int) -> tuple[int, int]:
    """First and last epoch of the learning-rate cycle: a rewound ticket, and a new stage, begin a new one."""
    if not isinstance(trainee, Method):
        return 1, epochs
    found = trainee.round(epoch)
    return found.first, found.last


def _last_prune(method: Method) -> int:
    stage = method.stages[-1]
    return method.epochs - stage.epochs + stage.schedule.prunes * stage.schedule.every


def _save_state(path: Path, parts: dict[str, Any], epochs: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    state = {name: dict(part.state_dict()) for name, part in parts.items()}
    checkpoint.save_state({**state, "rng": torch.get_rng_state(), "epochs": epochs, "settings": settings}, path)


def _resume(path: Path, parts: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The epochs that are over, and every part as it was after them; none where nothing was saved."""
    if not path.is_file():
        return []
    state = checkpoint.load_state(path)
    check_same_settings(path, state["settings"], settings)
    for name in ("trainee", "model", "optimizer"):  # the optimizer last: by then its parameters have their sizes
        parts[name].load_state_dict(state[name])
    torch.set_rng_state(state["rng"])
    return state["epochs"]


def check_same_settings(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    expected = json.loads(json.dumps(expected))
    found = json.loads(json.dumps(found))
    for key in [*expected, *found]:
        if found.get(key) != expected.get(key):
            raise ValueError(
                f"sparsekd run: {path} is of another run: its {key} is {found.get(key)}, now {expected.get(key)}; "
                "give another --out, or --fresh to begin anew"
            )


def _progress(epochs: range, total: int, title: str) -> Any:
    """A progress bar on a terminal, nothing elsewhere (or without tqdm)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return epochs
    return tqdm(epochs, desc=title, initial=epochs.start - 1, total=total, unit="epoch", leave=False, disable=None)
