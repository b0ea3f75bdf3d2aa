"""The main job: train a teacher, distil and prune students, freeze them, measure what it cost and what it won.

    results, folder = run(RunConfig("movietweetings", methods=("lth-sad",)))

`run` reads top to bottom; what is trained is in recipes.py, the training loop in epochs.py, what a trained network is
worth in evaluate.py.

    runs/movietweetings/
      results.json report.md report.html see report/
      seed0/<network>/model.safetensors  the picked epoch; sparse layers as their kept blocks, a file a density
      seed0/<network>/state.safetensors  where to go on after a kill, while it trains
      seed0/<network>/rows.json          its rows of the report, once finished

A later call with other methods or fewer seeds adds to the report: what else has finished in the folder stays in it.
A run that was stopped goes on after the last finished epoch of the network in training, with the same numbers as if it
had never stopped.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .. import __version__, backends, checkpoint, data, models, processor, report
from ..blocks import BlockPattern, check_density
from ..convert import SPARSE_TYPES, named_layers
from ..data import Task
from ..methods import METHODS
from . import baselines
from .epochs import RECALIBRATION, OutOfTime, Runtime, check_same_settings, fit, is_over, picked_epoch, rank
from .evaluate import count_parameters, freeze_for, kept_share, not_pruned, predict, scores, speed
from .memory import keep_freed_memory
from .recipes import ABLATIONS, PROTOCOLS, RECIPES, Choice, Network, networks

__all__ = ["ABLATIONS", "METHODS", "OutOfTime", "RunConfig", "folder_of", "rank", "run"]

QUICK_ROWS = 8_000  # the latest train rows, all that --quick uses
QUICK_IMAGES = {"images": 200, "validation": 200, "test": 500, "pixels": 8}


@dataclass(frozen=True)
class RunConfig:
    """What `run` does.

    task       a name out of `data.NAMES`; `options` go to `data.load` (movies: group="social"; cifar100: networks=...).
    data_dir   folder of the data files, None for the embedded ones.
    methods    names out of METHODS and recipes.ABLATIONS.
    densities  shares of the prunable weights to keep, in (0, 1]; each below 1 makes a student of every method (1 is the
               SAD row that every run has).
    seeds      how many; seed s initialises all students of that seed alike.
    quick      fewer rows, fewer epochs, short timings: to see it work, not to quote.
    recipe     images: "ours", or "paper" for Table 2 of arXiv 2401.10484 to the letter.
    protocol   images: "full", or "reduced" for what a CPU can do: see `recipes.PROTOCOLS`.
    pattern    blocks that are pruned, outputs x inputs: "16x1", on every device, so that they can be compared. GPU
               tensor cores want "64x32", other blocks run dense there.
    out        folder of everything that is written; default runs/<task>, with the recipe and protocol that differ.
    threads    of torch and of the kernels; None leaves torch's choice.
    device     "cpu" or "cuda" for training; None: cuda for images where there is one. Frozen networks are for the CPU.
    bf16       autocast; None: for images on cuda.
    compiled   torch.compile every training step.
    measure    freeze and time the networks; False leaves that to a later call with `remeasure`.
    fresh      throw away what an earlier run left in `out`, instead of going on with it.
    remeasure  score finished networks on test, freeze and time them again, as they are: on a quiet machine, or with
               other threads. Without `measure` the scores alone: soon done, and timings stay as they were.
    stop_after minutes after which `run` raises OutOfTime; the same call goes on from there.
    """

    task: str = "movietweetings"
    data_dir: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = tuple(METHODS)
    densities: tuple[float, ...] = (0.45,)
    seeds: int = 1
    quick: bool = False
    recipe: str = "ours"
    protocol: str = "full"
    pattern: str = "16x1"
    out: str | None = None
    threads: int | None = None
    device: str | None = None
    bf16: bool | None = None
    compiled: bool = False
    measure: bool = True
    fresh: bool = False
    remeasure: bool = False
    stop_after: float | None = None
    command: str = "sparsekd.runs.run"

    def __post_init__(self) -> None:
        for name in ("densities", "methods"):  # each once, in the order given
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for density in self.densities:
            check_density("sparsekd run", density)
        BlockPattern.parse(self.pattern)
        known = (*METHODS, *ABLATIONS)
        for method in self.methods:
            if method not in known:
                raise ValueError(f"sparsekd run: method must be one of {', '.join(known)}, got {method!r}")
        for name, choices in (("recipe", RECIPES), ("protocol", tuple(PROTOCOLS))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"sparsekd run: {name} must be one of {', '.join(choices)}, got {value!r}")
            if value != choices[0] and self.task != "cifar100":
                raise ValueError(f"sparsekd run: --{name} {value} belongs to the task cifar100, got {self.task}")
        for name, number in (("seeds", self.seeds), ("threads", self.threads)):
            if number is not None and number < 1:
                raise ValueError(f"sparsekd run: {name} must be at least 1, got {number}")
        if self.stop_after is not None and not self.stop_after > 0:
            raise ValueError(f"sparsekd run: stop_after must be more than 0 minutes, got {self.stop_after}")

    @property
    def choice(self) -> Choice:
        return Choice(self.methods, self.densities, self.quick, self.recipe, self.protocol, self.pattern)


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def run(config: RunConfig, say: Callable[[str], None] = _print) -> tuple[dict[str, Any], Path]:
    """Do everything `config` asks for; returns the contents of results.json and the folder it lies in.

    Raises ValueError and FileNotFoundError for bad input, RuntimeError where training diverges, OutOfTime when
    `stop_after` is over and KeyboardInterrupt on Ctrl-C; whatever had finished is on disk (results.json included), and
    the same call goes on from there.
    """
    deadline = math.inf if config.stop_after is None else time.monotonic() + 60 * config.stop_after
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    task = _load(config)
    runtime = _runtime(config, task, deadline)
    task = task.to(runtime.device)
    out = folder_of(config, task)
    out.mkdir(parents=True, exist_ok=True)  # raises now, not after the first epoch, where there can be no such folder
    if config.fresh and rank() == 0:
        _clear(out)
    _wait()
    # First: what these need is missing before anything was trained, or not at all.
    scores = [dataclasses.asdict(score) for score in baselines.run(task)]
    rows: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        teacher: nn.Module | None = None
        for network in networks(task, config.choice):
            folder = out / f"seed{seed}" / network.folder
            found, model = _finished(task, network, config, runtime, seed, teacher, folder, say)
            teacher = model if teacher is None else teacher  # the first network is the teacher
            rows += found
            everything = rows + _other_rows(out, rows, _settings_of_task(task, config))
            results = {
                "command": config.command,
                "task": _describe_task(task),
                "protocol": _describe_protocol(task, config, runtime, everything),
                "baselines": scores,
                "rows": everything,
            }
            if rank() == 0:
                report.write(results, out)
    _wait()
    return report.read(out), out


def folder_of(config: RunConfig, task: Task) -> Path:
    differs = [config.recipe] * (config.recipe != "ours") + [config.protocol] * (config.protocol != "full")
    return Path(config.out or Path("runs") / "-".join([task.name, *differs, *["quick"] * config.quick]))


def _load(config: RunConfig) -> Task:
    options = dict(config.options)
    if config.task == "cifar100":
        protocol = PROTOCOLS[config.protocol]
        options |= {name: getattr(protocol, name) for name in ("images", "validation", "pixels", "classes")}
        options |= QUICK_IMAGES if config.quick else {}
    task = data.load(config.task, config.data_dir, **options)
    return _shortened(task) if config.quick and task.kind != "images" else task


def _runtime(config: RunConfig, task: Task, deadline: float) -> Runtime:
    """Where to train; joins the other ranks if torchrun started this process."""
    wanted = config.device or ("cuda" if task.kind == "images" and torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("sparsekd run: no CUDA device can be used here, `sparsekd doctor` says why; --device cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    bf16 = device.type == "cuda" and task.kind == "images" if config.bf16 is None else config.bf16
    return Runtime(str(device), bf16, config.compiled, deadline)


def _wait() -> None:
    """Until every rank is here: what rank 0 wrote is then there for all."""
    if dist.is_initialized():
        dist.barrier()


def _shortened(task: Task) -> Task:
    """The latest QUICK_ROWS train rows, and val and test as they are."""
    latest = slice(max(len(task.train) - QUICK_ROWS, 0), None)
    return dataclasses.replace(task, train=task.train.take(latest))


def _finished(
    task: Task,
    network: Network,
    config: RunConfig,
    runtime: Runtime,
    seed: int,
    teacher: nn.Module | None,
    folder: Path,
    say: Callable[[str], None],
) -> tuple[list[dict[str, Any]], nn.Module]:
    """Rows of the report and the trained network; trains where an earlier run has not."""
    settings = {
        **_settings_of_task(task, config),
        "seed": seed,
        **dataclasses.asdict(network),
        **runtime.settings(),
    }
    path = folder / "rows.json"
    rows = _kept_rows(path)
    if rows:
        then = rows[0]["settings"]
        if config.remeasure:  # nothing of it is trained, so here may be another device
            settings |= {key: then[key] for key in runtime.settings() if key in then}
        check_same_settings(path, then, settings)
        settings = then
        epochs = rows[0]["epochs"]
    else:
        model = _fresh(task, network, seed).to(runtime.device)
        epochs = fit(
            model, task, network, teacher=teacher, seed=seed, folder=folder, settings=settings, runtime=runtime
        )
    _wait()
    if rows and config.remeasure and is_over(runtime.deadline):
        raise OutOfTime(f"{network.name} seed {seed}: not measured again")
    if rank() == 0 and (not rows or config.remeasure):
        densities = network.densities or (None,)
        rows = [
            _row(task, network, density, seed, epochs, settings, folder, config, runtime, before)
            for density, before in zip(densities, rows or [None] * len(densities), strict=True)
        ]
        checkpoint.write_atomically(path, json.dumps(rows, indent=1).encode())
        (folder / "state.safetensors").unlink(missing_ok=True)
        for row in rows:
            say(_summary(row))
    _wait()
    last = network.densities[-1] if network.densities else None
    model = checkpoint.load(_fresh(task, network, seed), folder / network.file(last))
    return json.loads(path.read_text()), model.to(runtime.device)


def _kept_rows(path: Path) -> list[Any]:
    """Rows of a finished network; none where there is no such file."""
    try:
        return json.loads(path.read_text()) if path.is_file() else []
    except ValueError as error:
        raise ValueError(
            f"sparsekd run: {path} is damaged ({error}); delete it to train this network again, or pass --fresh to "
            "begin anew"
        ) from error


def _settings_of_task(task: Task, config: RunConfig) -> dict[str, Any]:
    """What all networks of one report have in common."""
    return {
        "task": task.name,
        "data": task.meta.get("sha256"),
        "train_rows": len(task.train),
        "sizes": task.sizes,
        "networks": task.networks,
        "quick": config.quick,
    }


def _other_rows(out: Path, rows: list[dict[str, Any]], common: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of what else has finished in `out` at the same task; the settings in each say how."""
    common = json.loads(json.dumps(common))
    known = {(row["seed"], row["settings"]["folder"]) for row in rows}
    found = []
    for path in sorted(out.glob("seed*/*/rows.json")):
        others = _kept_rows(path)
        settings = others[0]["settings"]
        if (settings["seed"], settings["folder"]) not in known and settings.items() >= common.items():
            found += others
    return found


def _fresh(task: Task, network: Network, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = models.teacher(task) if network.folder == "teacher" else models.student(task)
    # Convolutions run on channels_last images, and a weight that is laid out as they are need not be reordered.
    return model.to(memory_format=torch.channels_last) if task.kind == "images" else model  # type: ignore[call-overload]


def _clear(out: Path) -> None:
    """Remove what runs write, and nothing else, from the folder."""
    for folder in out.glob("seed*"):
        if re.fullmatch(r"seed\d+", folder.name) and folder.is_dir():
            shutil.rmtree(folder)
    for name in ("results.json", "report.md", "report.html"):
        (out / name).unlink(missing_ok=True)


def _row(
    task: Task,
    network: Network,
    density: float | None,
    seed: int,
    epochs: list[dict[str, Any]],
    settings: dict[str, Any],
    folder: Path,
    config: RunConfig,
    runtime: Runtime,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """One row of the report: errors on test in float32, sizes, training cost; of the frozen network, speed and energy.

    Where nothing is measured, speed and energy are those of `before`, the row as it was.
    """
    path = folder / network.file(density)
    model = checkpoint.load(_fresh(task, network, seed), path)
    picked = picked_epoch(epochs, 1.0 if density is None else density, network.recipe.select, task.metric)
    assert picked is not None
    spent = epochs[: picked["epoch"]] if len(network.densities) > 1 else epochs  # what came after is of other rows
    joules = [epoch["joules"] for epoch in spent]
    metrics = {
        **scores(predict(model.to(runtime.device), task.test), task, task.test),
        **{name: value for name, value in picked.items() if name.startswith("val_")},
        "weights_kept": kept_share(model),
        "parameters": count_parameters(model),
        "file_bytes": path.stat().st_size,
        "train_seconds": sum(epoch["seconds"] for epoch in spent),
        "train_joules": None if None in joules else sum(joules),
        "step_ms_first": spent[0]["step_ms"],
        "step_ms_last": spent[-1]["step_ms"],
    }
    if config.measure:
        measured, note, plan = _frozen(model.cpu(), task, network, config.quick)
    else:
        measured, note, plan = (before[key] for key in ("metrics", "energy_note", "plan")) if before else ({}, "", {})
    return {
        "name": network.name,
        "method": network.method,
        "seed": seed,
        "target_density": density,
        "best_epoch": picked["epoch"],
        "metrics": {**measured, **metrics},
        "energy_note": note,
        "plan": plan,
        "blocks": kept_blocks(model) if seed == 0 else {},
        "epochs": epochs if density in (None, *network.densities[:1]) else [],  # of a sweep once
        "settings": settings,
    }


def _frozen(model: nn.Module, task: Task, network: Network, quick: bool) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What the frozen network costs, where the joules come from, its plan for each batch size.

    Raises RuntimeError where it predicts anything else than `model`.
    """
    task = task.to("cpu")
    batches = (1, 64) if quick or task.kind == "images" else (1, 64, 512)
    frozen = freeze_for(model, task, batches, 15.0 if quick else 60.0)
    reference, prediction = predict(model, task.test), predict(frozen[max(frozen)], task.test, max(frozen))
    difference = float((prediction - reference).abs().max())
    if difference > 1e-3:
        raise RuntimeError(
            f"sparsekd.runs: the frozen {network.name} predicts up to {difference:.2g} beside the trained one: "
            "a fault of sparsekd.freeze on this machine; please report it with the output of sparsekd doctor"
        )
    measured, note = speed(model, frozen, task, quick)
    return (
        {"frozen_difference": difference, **measured},
        note,
        {str(batch): net.plan.to_dict() for batch, net in frozen.items()},
    )


def kept_blocks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Which blocks each sparse layer keeps: layer -> {"shape": [row blocks, column blocks, ...], "bits": packed}."""
    found = {}
    for name, layer in named_layers(model, SPARSE_TYPES):
        mask = layer.block_mask().cpu()
        packed = np.packbits(mask.numpy())
        found[name] = {"shape": list(mask.shape), "bits": base64.b64encode(packed.tobytes()).decode()}
    return found


def _summary(row: dict[str, Any]) -> str:
    metrics = row["metrics"]
    density = "" if row["target_density"] is None else f" @ {row['target_density']:g}"
    if "accuracy" in metrics:
        found = f"test accuracy {metrics['accuracy']:.2%}"
    else:
        found = f"test MSE {metrics['mse']:.4f}, MAE {metrics['mae']:.4f}"
    return (
        f"seed {row['seed']}  {row['name']}{density}: {found}, "
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


def _describe_protocol(task: Task, config: RunConfig, runtime: Runtime, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How the numbers of `rows` were made, for a reader of the JSON."""
    trained = networks(task, config.choice)
    images = task.kind == "images"
    trained_with = [{**runtime.settings(), **row["settings"]} for row in rows]
    precisions = sorted({"bf16 autocast" if how["bf16"] else "float32" for how in trained_with})
    described: dict[str, Any] = {
        "quick": config.quick,
        "seeds": sorted({row["seed"] for row in rows}),
        "loss": "task + alpha * KD + beta * features; the task is the cross-entropy of a class, else the squared error",
        "teacher": _settings_of(trained[0]),
        "students": {
            **{
                row["settings"]["folder"]: "of another call, see its settings in results.json"
                for row in rows
                if row["name"] != "teacher"
            },
            **{network.folder: _settings_of(network) for network in trained[1:]},
        },
        "not_pruned": list(not_pruned(models.student(task))),
        "blocks": f"{config.pattern}, outputs x inputs",
    }
    if images:
        described |= {
            "networks": task.networks,
            "recipe": config.recipe,
            "protocol": config.protocol,
            "augmentation": f"crop after padding by {task.sizes['pixels'] // 8}, mirror",
            "selection": "last epoch; of the densities that of the best validation accuracy (marked); the test part is "
            "used once for each row",
            "trained_on": ", ".join(sorted({_device_name(how["device"]) for how in trained_with})),
        }
    else:
        described |= {
            "budget": "every student, dense or pruned, trains for the same number of epochs with the same optimizer",
            "selection": "epoch of smallest validation MSE among those at the final density; the test part is used "
            "once, for that epoch",
            "batch_norm": f"statistics of {RECALIBRATION} training batches, taken before each validation with dropout "
            "off",
        }
    return described | {
        "precision": f"training and validation in {' and '.join(precisions)}"
        + ", compiled" * runtime.compiled
        + "; test in float32",
        "threads": f"{torch.get_num_threads()} in the latest timing",
        "machine": machine_line(),
        "kernels": {op: where["cpu"] for op, where in backends.describe().items()},
        "versions": {"sparsekd": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _settings_of(network: Network) -> str:
    """Recipe and schedule of a network in one line."""
    recipe = network.recipe
    rate = "cosine to 0" if recipe.milestones is None else f"x 0.1 after epochs {list(recipe.milestones)}"
    again = {"rewind": ", anew at every rewinding and stage", "prune": ", anew at every prune", "never": ""}
    text = f"{recipe.epochs} epochs of batch {recipe.batch_size}, {recipe.optimizer}, lr {recipe.lr:g} {rate}"
    text += (again[recipe.restart] if network.method else "") + f", weight decay {recipe.weight_decay:g}"
    if recipe.dropout or recipe.input_dropout:
        text += f", dropout {recipe.dropout:g} and {recipe.input_dropout:g} on the input"
    if network.alpha or network.beta:
        text += f"; alpha {network.alpha:g}, beta {network.beta:g} ({network.features})"
    if network.schedule is not None:
        text += f"; {network.method}: {network.schedule}"
        text += "".join(f", {name} {value}" for name, value in network.options.items())
    if network.ticket is not None:
        text += f"; its first stage with lr {network.ticket.lr:g}, weight decay {network.ticket.weight_decay:g}"
    return text


def _device_name(kind: str) -> str:
    return torch.cuda.get_device_name() if kind == "cuda" and torch.cuda.is_available() else kind


def machine_line() -> str:
    """CPU model, cores and system in one line."""
    return f"{processor.name()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
