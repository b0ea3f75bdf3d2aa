"""The training loop: one network, one teacher or none, one method or none; stopped at any time, it goes on.

`fit` is the loop of the README with a learning rate, a validation and a state file. Shuffles follow from (seed, epoch),
and everything else that matters is in the state file, so that a run which was killed ends with the same bits as one
which was not. On several ranks (torchrun) each takes its share of every batch, and rank 0 writes the files.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checkpoint, distributed, energy
from ..blocks import BlockPattern
from ..data import Recipe, Rows, Task
from ..distill import Distiller, Plain
from ..losses import AttentionTransfer
from ..methods import METHODS, Staged
from ..taps import FeatureTap
from .evaluate import kept_share, not_pruned, predict, scores
from .recipes import Network

__all__ = ["OutOfTime", "Runtime", "check_same_settings", "fit", "is_over", "picked_epoch", "rank", "recalibrate"]

RECALIBRATION = 10  # batches


class OutOfTime(Exception):
    """The time that was given is over; what has been done is on disk."""


@dataclass(frozen=True)
class Runtime:
    """Where and how a network trains, which must not change what it learns (but for rounding).

    device    of the networks and of the data.
    bf16      autocast to bfloat16.
    compiled  torch.compile the loss, both networks in one graph; anew after every prune.
    deadline  time.monotonic() after which the epoch that runs is the last of this call.
    """

    device: str = "cpu"
    bf16: bool = False
    compiled: bool = False
    deadline: float = math.inf

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)

    def settings(self) -> dict[str, Any]:
        """What all networks of one report have in common: they round alike."""
        return {"device": torch.device(self.device).type, "bf16": self.bf16, "ranks": distributed.num_ranks()}


def rank() -> int:
    """This process's place among those of torchrun; 0 without it."""
    return dist.get_rank() if distributed.num_ranks() > 1 else 0


def fit(
    model: nn.Module,
    task: Task,
    network: Network,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    folder: Path,
    settings: dict[str, Any] | None = None,
    runtime: Runtime | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place; returns what happened in each epoch.

    `folder` gets the picked epoch of every density of the network (`network.file`), and state.safetensors, from which
    the same call (with the same `settings`) goes on after a kill. Raises OutOfTime after the epoch in which the
    deadline of `runtime` passed, RuntimeError where training diverges.
    """
    recipe, settings, runtime = network.recipe, settings or {}, runtime or Runtime()
    distributed.broadcast(model)
    trainee = _trainee(model, task, network, teacher, seed)  # prunes `model`, so it comes before the optimizer
    method = trainee if isinstance(trainee, Staged) else None
    optimizer = _optimizer([*model.parameters(), *trainee.parameters()], recipe)
    if method:
        method.attach(optimizer)
    parts = {"model": model, "trainee": trainee, "optimizer": optimizer}
    epochs = _resume(folder / "state.safetensors", parts, settings)
    for epoch in _progress(range(len(epochs) + 1, recipe.epochs + 1), recipe.epochs, f"{network.name} seed {seed}"):
        with energy.EnergyMeter(runtime.device) as meter:
            learning = network.ticket if network.ticket and method and method.stage == "ticket" else recipe
            losses = _train_epoch(model, trainee, optimizer, task, learning, epoch, seed, runtime)
        if not math.isfinite(losses["loss"]):
            raise RuntimeError(
                f"sparsekd.runs: {network.name} diverged in epoch {epoch} (loss {losses['loss']}); lower the learning "
                f"rate ({recipe.lr:g}) or the weights of the distillation (alpha {network.alpha:g}, beta "
                f"{network.beta:g})"
            )
        distributed.check_same_parameters([*model.parameters(), *trainee.parameters()])
        _share_statistics(model, trainee)
        if recipe.recalibrate:
            recalibrate(model, task.train, recipe.batch_size, _shuffle(seed, epoch))
        with runtime.autocast():
            found = scores(predict(model, task.val), task, task.val)
        epochs.append(
            {
                "epoch": epoch,
                **losses,
                **{f"val_{name}": value for name, value in found.items()},
                "density": kept_share(model),
                "level": _level(method, epoch),
                "pruned": False,
                "rewound": False,
                "seconds": meter.reading.seconds,
                "step_ms": 1e3 * meter.reading.seconds / math.ceil(len(task.train) / recipe.batch_size),
                "joules": meter.reading.joules,
            }
        )
        for density in network.densities or (1.0,):
            if rank() == 0 and epochs[-1] is picked_epoch(epochs, density, recipe.select, task.metric):
                checkpoint.save(
                    model, folder / network.file(density), epoch=epoch, **_selection(epochs[-1]), **settings
                )
        event = method.after_boundary(epoch) if method else None
        if event is not None and runtime.compiled:
            torch.compiler.reset()  # dynamo gives up after 8 shapes of one function
        epochs[-1] |= {"pruned": event is not None, "rewound": event is not None and event.rewound}
        if rank() == 0:
            _save_state(folder / "state.safetensors", parts, epochs, settings)
        if epoch < recipe.epochs and is_over(runtime.deadline):
            raise OutOfTime(f"{network.name} seed {seed}: {epoch} of {recipe.epochs} epochs")
    return epochs


def _train_epoch(
    model: nn.Module,
    trainee: Staged | Distiller | Plain,
    optimizer: torch.optim.Optimizer,
    task: Task,
    recipe: Recipe,
    epoch: int,
    seed: int,
    runtime: Runtime,
) -> dict[str, float]:
    """One epoch; the mean of every term of the loss."""
    cycle = _cycle(trainee, epoch, recipe)
    steps = math.ceil(len(task.train) / recipe.batch_size)
    names, sums, taken = ["loss"], torch.zeros(1, device=runtime.device), 0
    loss = torch.compile(trainee.loss) if runtime.compiled else trainee.loss
    trained = [*model.parameters(), *trainee.parameters()]
    model.train()
    batches = task.train.batches(recipe.batch_size, _shuffle(seed, epoch), rank(), distributed.num_ranks())
    for inputs, target in batches:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, epoch, taken / steps, cycle)
            group["weight_decay"] = recipe.weight_decay
        optimizer.zero_grad()
        with runtime.autocast():
            losses = loss(inputs, target)
        losses.total.backward()
        distributed.average_gradients(trained)
        optimizer.step()
        if isinstance(trainee, Staged):
            trainee.after_step()
        terms = losses.terms()
        names, sums = list(terms), sums + torch.stack([*terms.values()])
        taken += 1
    if distributed.num_ranks() > 1:
        dist.all_reduce(sums)
    means = sums / max(taken, 1) / distributed.num_ranks()
    return dict(zip(names, means.tolist(), strict=True))


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    nesterov = recipe.optimizer == "nesterov"
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=0.9, nesterov=nesterov, weight_decay=recipe.weight_decay)


def _learning_rate(recipe: Recipe, epoch: int, done: float, cycle: tuple[int, int]) -> float:
    """At the share `done` of `epoch`, in a cycle of the epochs `cycle[0] .. cycle[1]`."""
    if recipe.milestones is not None:
        return recipe.lr * 0.1 ** sum(epoch > milestone for milestone in recipe.milestones)
    over = (epoch - cycle[0] + done) / (cycle[1] - cycle[0] + 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * over))


def _cycle(trainee: Staged | Distiller | Plain, epoch: int, recipe: Recipe) -> tuple[int, int]:
    """First and last epoch of the learning-rate cycle that `epoch` is in."""
    if not isinstance(trainee, Staged) or recipe.restart == "never":
        return 1, recipe.epochs
    stage = trainee.round(epoch)  # a rewound ticket, and a new stage, begin a new one
    first, last = stage.first, stage.last
    for prune, _ in trainee.prunes() if recipe.restart == "prune" else ():
        first, last = (max(first, prune + 1), last) if prune < epoch else (first, min(last, prune))
    return first, last


def _level(method: Staged | None, epoch: int) -> float:
    """Density that the schedule asks for during `epoch`."""
    gone = 0.0 if method is None else max((share for prune, share in method.prunes() if prune < epoch), default=0.0)
    return round(1 - gone, 6)


def _selection(epoch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in epoch.items() if name.startswith("val_")}


def _share_statistics(*modules: nn.Module | Staged) -> None:
    """Batch norm statistics of rank 0 for every rank: each has seen other rows. Nothing else, which would hide that
    ranks train apart."""
    if distributed.num_ranks() == 1:
        return
    for module in modules:
        for buffer in (module.distiller if isinstance(module, Staged) else module).buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, src=0)


def is_over(deadline: float) -> bool:
    """Whether rank 0 says so: all ranks stop after the same epoch."""
    over = [time.monotonic() > deadline]
    if distributed.num_ranks() > 1:
        dist.broadcast_object_list(over, src=0)
    return over[0]


def _shuffle(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


@torch.no_grad()
def recalibrate(model: nn.Module, part: Rows, batch_size: int, generator: torch.Generator) -> None:
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


def picked_epoch(epochs: Sequence[dict[str, Any]], density: float, select: str, metric: str) -> dict[str, Any] | None:
    """The epoch a network is kept from among those at `density`: the last, or the first of the best validation
    `metric`; None before there is one."""
    at_density = [epoch for epoch in epochs if epoch["level"] == round(density, 6)]
    if not at_density:
        return None
    if select == "last":
        return at_density[-1]
    best = max if metric == "accuracy" else min
    return best(at_density, key=lambda epoch: epoch[f"val_{metric}"])


def _trainee(
    model: nn.Module, task: Task, network: Network, teacher: nn.Module | None, seed: int
) -> Staged | Distiller | Plain:
    """What computes the loss of this network: the distillation alone, or a method around it."""
    torch.manual_seed(1_000 + seed)  # the SAD meta-network
    examples = task.train.examples(2)
    distiller: Distiller | Plain
    if network.alpha == network.beta == 0 or teacher is None:
        distiller = Plain(model, task.goal)
    else:
        taps: Any = (teacher.tap_names, model.tap_names)
        matching = None
        if network.features == "at":
            taps, matching = _pairs(teacher, model, examples), AttentionTransfer()
        distiller = Distiller(
            teacher,
            model,
            *taps,
            example_inputs=examples,
            goal=task.goal,
            alpha=network.alpha,
            beta=network.beta,
            matching=matching,
        )
    if network.method is None or network.schedule is None:
        return distiller
    return METHODS[network.method](
        distiller,
        network.schedule,
        epochs=network.recipe.epochs,
        pattern=BlockPattern.parse(network.pattern),
        exclude=not_pruned(model) or None,
        seed=seed,
        example_inputs=examples,
        **network.options,
    )


@torch.no_grad()
def _pairs(teacher: nn.Module, student: nn.Module, examples: tuple[Tensor, ...]) -> tuple[list[str], list[str]]:
    """Taps that attention transfer lays side by side: the last one of each size of map that both networks have."""
    last: list[dict[torch.Size, str]] = []
    for network in (teacher, student):
        names: Any = network.tap_names
        tap = FeatureTap(network, names)
        was_training = network.training
        last.append({feature.shape[2:]: name for name, feature in zip(names, tap.eval()(*examples)[1], strict=True)})
        network.train(was_training)
    common = [size for size in last[0] if size in last[1]]
    return [last[0][size] for size in common], [last[1][size] for size in common]


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
    """Raise ValueError where a file was written under other settings; one it does not name was not there yet."""
    expected = json.loads(json.dumps(expected))
    found = json.loads(json.dumps(found))
    for key in found:
        if found[key] != expected.get(key):
            raise ValueError(
                f"sparsekd run: {path} is of another run: its {key} is {found[key]}, now {expected.get(key)}; "
                "give another --out, or --fresh to begin anew"
            )


def _progress(epochs: range, total: int, title: str) -> Any:
    """A progress bar on a terminal, nothing elsewhere (or without tqdm)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return epochs
    return tqdm(epochs, desc=title, initial=epochs.start - 1, total=total, unit="epoch", leave=False, disable=None)
