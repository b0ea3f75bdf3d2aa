"""The main job: train a teacher, distil and prune students, freeze them, measure what it cost and what it won.

    results, folder = run(RunConfig("movietweetings", methods=("lth-sad",)))

`run` reads top to bottom; the training loop itself is in loop.py, what a trained network is worth in evaluate.py.

    runs/movietweetings/
      results.json report.md *.png       see report.py
      seed0/<network>/model.safetensors  the best epoch; sparse layers as their kept blocks
      seed0/<network>/state.safetensors  where to go on after a kill, while it trains
      seed0/<network>/row.json           its row of the report, once finished

A run that was stopped goes on after the last finished epoch of the network in training, with the same numbers as if it
had never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__, backends, baselines, checkpoint, data, models, report
from .blocks import check_density
from .data import Recipe, Task
from .evaluate import NOT_PRUNED, count_parameters, errors, freeze_for, kept_share, predict, speed
from .loop import RECALIBRATION, Network, best_epoch, check_same_settings, fit, plan
from .methods import METHODS

__all__ = ["METHODS", "RunConfig", "folder_of", "networks", "run"]

QUICK_ROWS = 8_000  # the latest train rows, all that --quick uses


@dataclass(frozen=True)
class RunConfig:
    """What `run` does.

    task       "movietweetings", "movielens" or "movies"; `options` go to `data.load` (movies: group="social").
    data_dir   folder of the data files, None for the embedded ones.
    methods    names out of METHODS.
    densities  shares of the prunable weights to keep, in (0, 1]; each below 1 makes a student of every method (1 is the
               SAD row that every run has).
    seeds      how many; seed s initialises all students of that seed alike.
    quick      fewer rows, fewer epochs, short timings: to see it work, not to quote.
    out        folder of everything that is written; default runs/<task>, or runs/<task>-quick.
    threads    of torch and of the kernels; None leaves torch's choice.
    fresh      throw away what an earlier run left in `out`, instead of going on with it.
    remeasure  freeze and time finished networks again, as they are: on a quiet machine, or with other threads.
    """

    task: str = "movietweetings"
    data_dir: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = tuple(METHODS)
    densities: tuple[float, ...] = (0.45,)
    seeds: int = 1
    quick: bool = False
    out: str | None = None
    threads: int | None = None
    fresh: bool = False
    remeasure: bool = False
    command: str = "sparsekd.train.run"

    def __post_init__(self) -> None:
        for name in ("densities", "methods"):  # each once, in the order given
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for density in self.densities:
            check_density("sparsekd run", density)
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"sparsekd run: method must be one of {', '.join(METHODS)}, got {method!r}")
        for name, value in (("seeds", self.seeds), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"sparsekd run: {name} must be at least 1, got {value}")


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def run(config: RunConfig, say: Callable[[str], None] = _print) -> tuple[dict[str, Any], Path]:
    """Do everything `config` asks for; returns the contents of results.json and the folder it lies in.

    Raises ValueError and FileNotFoundError for bad input, RuntimeError where training diverges, and KeyboardInterrupt
    on Ctrl-C; whatever had finished is on disk, and the same call goes on from there.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    task = data.load(config.task, config.data_dir, **config.options)
    if config.quick:
        task = _shortened(task)
    out = folder_of(config, task)
    if config.fresh:
        _clear(out)
    # First: what these need is missing before anything was trained, or not at all.
    scores = [dataclasses.asdict(score) for score in baselines.run(task)]
    report.check_plots()
    rows = []
    for seed in range(config.seeds):
        teacher: nn.Module | None = None
        for network in networks(task, config):
            row, model = _finished(task, network, config, seed, teacher, out / f"seed{seed}" / network.folder, say)
            teacher = model if teacher is None else teacher  # the first network is the teacher
            rows.append(row)
    results = {
        "command": config.command,
        "task": _describe_task(task),
        "protocol": _describe_protocol(task, config),
        "baselines": scores,
        "rows": rows,
    }
    report.write(results, out)
    return report.read(out), out


def folder_of(config: RunConfig, task: Task) -> Path:
    return Path(config.out or Path("runs") / (task.name + ("-quick" if config.quick else "")))


def networks(task: Task, config: RunConfig) -> list[Network]:
    """The teacher, the dense student without and with distillation (SAD), and a student per method and density."""
    teacher, student = _recipes(task, config.quick)
    weights = (ALPHA, BETA)
    found = [
        Network("teacher", "teacher", teacher),
        Network("student", "student", student),
        Network("SAD", "sad", student, *weights),
    ]
    for method in config.methods:
        for density in (d for d in config.densities if d < 1):
            folder = f"{method}-{density:g}"
            found.append(Network(method.upper(), folder, student, *weights, method, density))
    return found


# The weights of KD and SAD in the loss. On the validation part of the movies task alpha 1 with beta 0 and 10 are within
# the spread of seeds, beta 100 is worse. The paper's beta of 50 to 200 belongs to a cross-entropy on CIFAR-100.
ALPHA, BETA = 1.0, 10.0


def _recipes(task: Task, quick: bool) -> tuple[Recipe, Recipe]:
    """Of the teacher and of every student: one optimiser and one number of epochs for all students, pruned or not."""
    teacher, student = task.teacher_recipe, task.student_recipe
    # A lottery ticket is trained again after its last rewinding; in fewer than 6 epochs SS-SAD has no room to prune.
    epochs = 6 if quick else max(2 * student.epochs, 6)
    return teacher, dataclasses.replace(student, epochs=epochs)


def _shortened(task: Task) -> Task:
    """The latest QUICK_ROWS train rows, and val and test as they are."""
    latest = slice(max(len(task.train) - QUICK_ROWS, 0), None)
    return dataclasses.replace(task, train=task.train.take(latest))


def _finished(
    task: Task,
    network: Network,
    config: RunConfig,
    seed: int,
    teacher: nn.Module | None,
    folder: Path,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], nn.Module]:
    """Row of the report and trained network; trains where an earlier run has not."""
    settings = {
        "task": task.name,
        "data": task.meta.get("sha256"),
        "train_rows": len(task.train),
        "seed": seed,
        "quick": config.quick,
        **dataclasses.asdict(network),
    }
    row_path, model_path = folder / "row.json", folder / "model.safetensors"
    row = json.loads(row_path.read_text()) if row_path.is_file() else None
    if row:
        check_same_settings(row_path, row["settings"], settings)
        epochs = row["epochs"]
    else:
        model = _fresh(task, network, seed)
        epochs = fit(model, task, network, teacher=teacher, seed=seed, folder=folder, settings=settings)
    model = checkpoint.load(_fresh(task, network, seed), model_path)
    if row and not config.remeasure:
        return row, model
    row = _row(model, task, network, seed, epochs, settings, model_path, config.quick)
    checkpoint.write_atomically(row_path, json.dumps(row, indent=1).encode())
    (folder / "state.safetensors").unlink(missing_ok=True)
    say(_summary(row))
    return row, model


def _fresh(task: Task, network: Network, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.teacher(task) if network.folder == "teacher" else models.student(task)


def _clear(out: Path) -> None:
    """Remove what runs write, and nothing else, from the folder."""
    for folder in out.glob("seed*"):
        if re.fullmatch(r"seed\d+", folder.name) and folder.is_dir():
            shutil.rmtree(folder)
    for name in ("results.json", "report.md", "loss.png", "accuracy.png", "latency.png"):
        (out / name).unlink(missing_ok=True)


def _row(
    model: nn.Module,
    task: Task,
    network: Network,
    seed: int,
    epochs: list[dict[str, Any]],
    settings: dict[str, Any],
    model_path: Path,
    quick: bool,
) -> dict[str, Any]:
    """The row of the report: errors of the frozen network on test, sizes, training cost, speed and energy."""
    best = best_epoch(epochs)
    assert best is not None
    frozen = freeze_for(model, task, *((1, 64), 15.0) if quick else ((1, 64, 512), 60.0))
    prediction, reference = predict(frozen[max(frozen)], task.test, max(frozen)), predict(model, task.test)
    difference = float((prediction - reference).abs().max())
    if difference > 1e-3:
        raise RuntimeError(
            f"sparsekd.train: the frozen {network.name} predicts up to {difference:.2g} beside the trained one: "
            "a fault of sparsekd.freeze on this machine; please report it with the output of sparsekd doctor"
        )
    mae, mse = errors(prediction, task, task.test)
    joules = [epoch["joules"] for epoch in epochs]
    measured, note = speed(model, frozen, task, quick)
    metrics = {
        "mae": mae,
        "mse": mse,
        "mse_unfrozen": errors(reference, task, task.test)[1],
        "frozen_difference": difference,
        "val_mse": best["val_mse"],
        "weights_kept": kept_share(model),
        "parameters": count_parameters(model),
        "file_bytes": model_path.stat().st_size,
        "train_seconds": sum(epoch["seconds"] for epoch in epochs),
        "train_joules": None if None in joules else sum(joules),
        "step_ms_first": epochs[0]["step_ms"],
        "step_ms_last": epochs[-1]["step_ms"],
        **measured,
    }
    return {
        "name": network.name,
        "method": network.method,
        "seed": seed,
        "target_density": network.density,
        "best_epoch": best["epoch"],
        "metrics": metrics,
        "energy_note": note,
        "plan": {str(batch): net.plan.to_dict() for batch, net in frozen.items()},
        "epochs": epochs,
        "settings": settings,
    }


def _summary(row: dict[str, Any]) -> str:
    metrics = row["metrics"]
    density = "" if row["target_density"] is None else f" @ {row['target_density']:g}"
    return (
        f"seed {row['seed']}  {row['name']}{density}: test MSE {metrics['mse']:.4f}, MAE {metrics['mae']:.4f}, "
        f"{metrics['weights_kept']:.1%} of the weights, trained in {metrics['train_seconds']:.0f} s"
    )


def _describe_task(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "kind": task.kind,
        "split": task.split,
        "target_range": list(task.target_range),
        "train_rows_used": len(task.train),
        **task.meta,
    }


def _describe_protocol(task: Task, config: RunConfig) -> dict[str, Any]:
    """How the numbers were made, for a reader of the JSON."""
    teacher, student = _recipes(task, config.quick)
    return {
        "quick": config.quick,
        "seeds": list(range(config.seeds)),
        "optimizer": "AdamW; cosine decay to 0 over all epochs; LTH-SAD begins the cosine anew at every rewinding, "
        "SS-SAD at its second stage too",
        "teacher": dataclasses.asdict(teacher),
        "student": dataclasses.asdict(student),
        "budget": "every student, dense or pruned, trains for the same number of epochs with the same optimizer",
        "loss": "MSE + alpha * KD + beta * SAD",
        "distillation": {n.name: {"alpha": n.alpha, "beta": n.beta} for n in networks(task, config) if n.beta},
        "schedules": {
            f"{method} @ {density:g}": _describe_schedule(method, density, student.epochs)
            for method in config.methods
            for density in config.densities
            if density < 1
        },
        "selection": "epoch of smallest validation MSE among those at the final density; the test part is used once, "
        "for the frozen network of that epoch",
        "not_pruned": list(NOT_PRUNED),
        "batch_norm": f"statistics of {RECALIBRATION} training batches, taken before each validation with dropout off",
        "threads": f"{torch.get_num_threads()} in the latest timing",
        "machine": machine_line(),
        "kernels": {op: where["cpu"] for op, where in backends.describe().items()},
        "versions": {"sparsekd": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _describe_schedule(method: str, density: float, epochs: int) -> str:
    schedule, options = plan(method, 1 - density, epochs)
    text = f"{schedule.prunes} prunes of {schedule.rate:.3g} every {schedule.every} epochs"
    if not options:
        return text
    initial, length = options["initial"], options["initial_epochs"]
    ticket = f"ticket of {length} epochs with {initial.prunes} prune of {initial.rate:.3g} after {initial.every}"
    return f"{ticket}, then {text}"


def machine_line() -> str:
    """CPU model, cores and system in one line."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
