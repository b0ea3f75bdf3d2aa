"""What a run writes down: a row of the report for every trained network, and how the rows came about."""

from __future__ import annotations

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import backends, checkpoint, processor, recommend, report
from ..convert import SPARSE_TYPES, named_layers
from ..data import Task
from ..data.rankings import LEARNT
from ..goals import Ranking, headline, predict
from ..models import MF, LightGCN
from ..pruning import CostTable, count_macs
from ..version import __version__
from .config import RunConfig
from .epochs import picked_epoch
from .evaluate import count_parameters, freeze_for, kept_share, not_pruned, served, speed
from .plans.network import Network, Plan
from .runtime import Runtime
from .state import in_full

Row = dict[str, Any]
ROWS = "rows.json"
COMPARED = 2048  # test rows of a quick run that a frozen network must predict as the trained one does


@dataclass(frozen=True)
class Finished:
    """A network that has been trained: how it is to be read from its folder, and what happened in each epoch."""

    network: Network
    seed: int
    folder: Path
    settings: dict[str, Any]
    epochs: list[dict[str, Any]]

    @property
    def densities(self) -> tuple[float | None, ...]:
        """One for each row: those it was pruned to, None of a dense network."""
        return self.network.densities or (None,)

    def load(self, density: float | None) -> nn.Module:
        """The network as it was kept at `density`, on the CPU.  Raises ValueError for a damaged file."""
        try:
            return checkpoint.load(fresh(self.network, self.seed), self.folder / self.network.file(density))
        except ValueError as error:
            raise ValueError(
                f"sparsekd run: a network that had finished cannot be read: {error}; in a run, delete {self.folder} to "
                "train it again, or pass --fresh to begin anew"
            ) from error


def fresh(network: Network, seed: int) -> nn.Module:
    """The network before its training: alike for all networks of one architecture and seed."""
    torch.manual_seed(seed)
    return network.make()


def rows_of(
    finished: Finished, task: Task, plan: Plan, config: RunConfig, runtime: Runtime, before: Sequence[Row] = ()
) -> list[Row]:
    """A row for every density: scores on test in float32, sizes, training cost; speed and joules of the frozen network.

    Where nothing is measured, speed and energy are those of `before`, the rows as they were.
    """
    rows = []
    for place, density in enumerate(finished.densities):
        model = finished.load(density)
        row = _described(finished, density, model, task, runtime)
        if config.measure and isinstance(task.goal, Ranking):
            measured, note = served(model.cpu(), task.to("cpu"), config.quick)
            layers: dict[str, Any] = {}
        elif config.measure:
            measured, note, layers = _frozen(model.cpu(), task, finished.network.name, plan, config.quick)
        elif before:
            measured, note, layers = (before[place][key] for key in ("metrics", "energy_note", "plan"))
        else:
            measured, note, layers = {}, "", {}
        rows.append(row | {"metrics": {**measured, **row["metrics"]}, "energy_note": note, "plan": layers})
    return rows


def _described(finished: Finished, density: float | None, model: nn.Module, task: Task, runtime: Runtime) -> Row:
    """The row without what is measured on the frozen network."""
    network, epochs = finished.network, finished.epochs
    picked = picked_epoch(epochs, 1.0 if density is None else density, network.recipe.select, task.goal.judge)
    assert picked is not None
    swept = len(network.densities) > 1
    spent = epochs[: picked["epoch"]] if swept else epochs  # what came after is of other rows
    joules = [epoch["joules"] for epoch in spent]
    dense_macs, macs = count_macs(model, [x.cpu() for x in task.train.examples(2)], not_pruned(model) or None)
    metrics = {
        **task.goal.scores(model.to(runtime.device), task.test),
        **({} if task.meta.get("validation") == LEARNT else _of_validation(picked)),
        "weights_kept": kept_share(model),
        "macs_kept": macs / dense_macs if dense_macs else 1.0,
        "macs": macs,
        **({} if network.costs is None else {"predicted_us": CostTable.load(network.costs).predict(model)}),
        "parameters": count_parameters(model),
        "file_bytes": (finished.folder / network.file(density)).stat().st_size,
        "train_seconds": sum(epoch["seconds"] for epoch in spent),
        "train_joules": None if None in joules else sum(joules),
        "step_ms_first": spent[0]["step_ms"],
        "step_ms_last": spent[-1]["step_ms"],
    }
    return {
        "name": network.name,
        "method": network.method,
        "seed": finished.seed,
        "target_density": density,
        "budget": None if density is None else network.asked.get(density),
        "best_epoch": picked["epoch"],
        "metrics": metrics,
        "energy_note": "",
        "plan": {},
        "blocks": kept_blocks(model) if finished.seed == 0 else {},
        "epochs": epochs if density in (None, *network.densities[:1]) else [],  # of a sweep once
        "settings": finished.settings,
    }


def _of_validation(epoch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in epoch.items() if name.startswith("val_")}


def write_for_serving(finished: Finished, task: Task) -> None:
    """Of a ranking: the file of every density that `sparsekd recommend` reads, where a score is a product of rows."""
    for density in finished.densities if isinstance(task.goal, Ranking) else ():
        model = finished.load(density)
        if isinstance(model, (MF, LightGCN)):
            name = finished.network.file(density).replace("model", "recommender", 1)
            recommend.save(model, task.to("cpu"), finished.folder / name)


def _frozen(
    model: nn.Module, task: Task, name: str, plan: Plan, quick: bool
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What the frozen network costs, where the joules come from, its plan for each batch size.

    Raises RuntimeError where it predicts anything else than `model` for a row of test, in a quick run for one of the
    first COMPARED.
    """
    task = task.to("cpu")
    batches = plan.timed_batches[:2] if quick else plan.timed_batches
    frozen = freeze_for(model, task, batches, 3.0 if quick else 20.0)
    some = task.test.take(slice(0, COMPARED)) if quick else task.test
    difference = float((predict(frozen[max(frozen)], some, max(frozen)) - predict(model, some)).abs().max())
    if difference > 1e-3:
        raise RuntimeError(
            f"sparsekd.runs: the frozen {name} predicts up to {difference:.2g} beside the trained one: "
            "a fault of sparsekd.freeze on this machine; please report it with the output of sparsekd doctor"
        )
    measured, note = speed(model, frozen, task, quick)
    layers = {str(batch): network.plan.to_dict() for batch, network in frozen.items()}
    return {"frozen_difference": difference, **measured}, note, layers


def kept_blocks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Which blocks each sparse layer keeps: layer -> {"shape": [row blocks, column blocks, ...], "bits": packed}."""
    kept = {}
    for name, layer in named_layers(model, SPARSE_TYPES):
        mask = layer.block_mask().cpu()
        packed = np.packbits(mask.numpy())
        kept[name] = {"shape": list(mask.shape), "bits": base64.b64encode(packed.tobytes()).decode()}
    return kept


def in_one_line(row: Mapping[str, Any], task: Task) -> str:
    """What the terminal shows when a network has finished."""
    metrics = row["metrics"]
    scores = ", ".join(
        f"{metric.heading} {metric.scale * metrics[metric.name]:.{metric.digits}f}"
        for metric in headline(task.goal.metrics)
    )
    kept = f"{metrics['weights_kept']:.1%} of the weights"
    if metrics["macs"]:
        kept += f", {metrics['macs_kept']:.1%} of the work"
    return f"seed {row['seed']}  {report.label(row)}: {scores}, {kept}, trained in {metrics['train_seconds']:.0f} s"


def kept_rows(path: Path) -> list[Row]:
    """Rows of a finished network; none where there is no such file.  ValueError for a damaged one."""
    try:
        return json.loads(path.read_text()) if path.is_file() else []
    except ValueError as error:
        raise ValueError(
            f"sparsekd run: {path} is damaged ({error}); delete it to train this network again, or pass --fresh to "
            "begin anew"
        ) from error


def other_rows(out: Path, rows: Sequence[Row], common: Mapping[str, Any]) -> list[Row]:
    """Rows of what else has finished in `out` at the same task; the settings in each say how."""
    common = json.loads(json.dumps(in_full(common)))
    known = {(row["seed"], row["settings"]["folder"]) for row in rows}
    others: list[Row] = []
    for path in sorted(out.glob(f"seed*/*/{ROWS}")):
        theirs = kept_rows(path)
        settings = theirs[0]["settings"]
        if (settings["seed"], settings["folder"]) not in known and in_full(settings).items() >= common.items():
            others += theirs
    return others


def settings_of_task(task: Task, plan: Plan, config: RunConfig) -> dict[str, Any]:
    """What all networks of one report have in common."""
    negatives = getattr(task.train, "negatives", 1)
    return {
        "task": task.name,
        "data": task.meta.get("sha256"),
        "train_rows": len(task.train),
        "sizes": task.sizes,
        "networks": plan.architectures,
        "quick": config.quick,
        **({"val_rows": len(task.val)} if config.quick else {}),
        **({"views": plan.views} if plan.views else {}),
        **({"negatives": negatives} if negatives > 1 else {}),
        **({"split": task.meta["split_sha256"]} if "split_sha256" in task.meta else {}),
    }


def settings_of_network(
    network: Network, seed: int, task: Task, plan: Plan, config: RunConfig, runtime: Runtime
) -> dict[str, Any]:
    """Everything that what it learns depends on."""
    return {**settings_of_task(task, plan, config), "seed": seed, **network.settings(), **runtime.settings()}


def describe_task(task: Task) -> dict[str, Any]:
    """What was learnt from which data; `goal` tells the report what its numbers are."""
    return {
        "name": task.name,
        "goal": task.goal.describe(),
        "split": task.split,
        "sizes": task.sizes,
        "train_rows_used": len(task.train),
        **task.meta,
    }


def describe_protocol(
    plan: Plan, config: RunConfig, runtime: Runtime, rows: Sequence[Row], model: nn.Module
) -> dict[str, Any]:
    """How the numbers of `rows` were made, for a reader of the JSON. `model` is the latest network that finished."""
    trained_with = [{**runtime.settings(), **row["settings"]} for row in rows]
    precisions = sorted({"bf16 autocast" if how["bf16"] else "float32" for how in trained_with})
    training = f"training and validation in {' and '.join(precisions)}"
    if runtime.compiled:
        training += ", compiled"
    elsewhere = {
        row["settings"]["folder"]: "of another call, see its settings in results.json"
        for row in rows
        if row["settings"]["folder"] != plan.teacher.folder
    }
    return {
        "quick": config.quick,
        "seeds": sorted({row["seed"] for row in rows}),
        "loss": "task + alpha * KD + beta * features",
        "teacher": plan.teacher.describe(),
        "students": {**elsewhere, **{network.folder: network.describe() for network in plan.students}},
        "not_pruned": list(not_pruned(model)),
        "blocks": f"{config.pattern}, outputs x inputs",
        **plan.about,
        "trained_on": ", ".join(sorted({_device_name(how["device"]) for how in trained_with})),
        "precision": f"{training}; test in float32",
        "threads": f"{torch.get_num_threads()} in the latest timing",
        **_trained_beside_others(rows),
        "machine": f"{processor.name()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "kernels": {op: where["cpu"] for op, where in backends.describe().items()},
        "versions": {"sparsekd": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _trained_beside_others(rows: Sequence[Row]) -> dict[str, str]:
    beside = {row["settings"]["folder"] for row in rows if any("beside_others" in epoch for epoch in row["epochs"])}
    if not beside:
        return {}
    names = ", ".join(sorted(beside))
    return {"side_by_side": f"{names} trained beside others, with a share of the threads: compare no training seconds"}


def _device_name(device_type: str) -> str:
    return torch.cuda.get_device_name() if device_type == "cuda" and torch.cuda.is_available() else device_type
