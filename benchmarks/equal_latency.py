"""What accuracy is left at one and the same latency, by what a method counts when it prunes.

    python -m benchmarks.equal_latency costs --out runs/equal-latency            # on an idle machine: a minute
    python -m benchmarks.equal_latency train --out runs/equal-latency --data DIR --seeds 3    # hours; goes on
    python -m benchmarks.equal_latency time  --out runs/equal-latency --json benchmarks/results/equal_latency.json
    python -m benchmarks.equal_latency chart --json benchmarks/results/equal_latency.json --svg docs/equal_latency.svg

Fashion-MNIST, or what --dataset names; a ResNet-18 of 16 to 128 channels under one of 24 to 192. LTH-SAD, SS-SAD and
SP-SAD each prune the same student, which SAD has trained dense, to shares of the predicted time of the dense frozen
network, in four ways:

    cost     by what a block is worth for the microseconds that it costs (scope "cost")
    weights  the smallest blocks of the whole network (scope "global", magnitudes)
    uniform  the smallest blocks of every layer, the same share of each (scope "layer")
    random   the same shares, the blocks drawn at random

One student passes all points, and trains a round at each. All students of a method take as many steps: compare the
four ways of one method at one point. Accuracy is that of the frozen network on the whole test part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekd
from benchmarks import deploy
from benchmarks.lib.equal_latency_chart import picture
from benchmarks.lib.equal_latency_data import DATASETS, Pictures
from benchmarks.lib.timing import machine, write_json
from sparsekd import checkpoint, models
from sparsekd.data import Rows
from sparsekd.distill import Plain
from sparsekd.methods import METHODS, Method, Staged
from sparsekd.pruning import CostTable, LinearSchedule, ListedSchedule, Schedule
from sparsekd.runs.epochs import recalibrate
from sparsekd.runs.plans.recipe import Recipe
from sparsekd.runs.rates import cycle_of, learning_rate
from sparsekd.runs.runtime import Runtime
from sparsekd.runs.steps import Rate, Stepper

METHOD_NAMES = ("sp-sad", "lth-sad", "ss-sad")
WAYS: dict[str, dict[str, Any]] = {
    "cost": {"scope": "cost"},
    "weights": {"scope": "global", "score": "magnitude"},
    "uniform": {"scope": "layer", "score": "magnitude"},
    "random": {"scope": "layer", "score": "random"},
}
STUDENT, TEACHER = (16, 32, 64, 128), (24, 48, 96, 192)
PATTERN = sparsekd.BlockPattern(16, 1)
ALPHA, BETA = 0.9, 30.0
ROWS, COSTS = "rows.jsonl", "costs.json"
TURNS = 7  # of timing


@dataclass(frozen=True)
class Protocol:
    """How much is trained.

    points: shares of the time of the dense frozen network. images: of the train part, equally many of each class, that
    the teacher and the dense student see; round_images: that a student sees while it is pruned. teacher_epochs,
    dense_epochs: before the pruning begins. round_epochs: at each point.
    """

    points: tuple[float, ...]
    images: int
    round_images: int
    teacher_epochs: int
    dense_epochs: int
    round_epochs: int
    batch: int = 32
    lr: float = 0.05
    dataset: str = "fashion-mnist"

    @property
    def pictures(self) -> Pictures:
        return DATASETS[self.dataset]

    def recipe(self, epochs: int) -> Recipe:
        return Recipe(self.lr, 5e-4, epochs, self.batch, optimizer="nesterov", restart="prune", select="last")


def network(widths: Sequence[int], pictures: Pictures) -> nn.Module:
    model: nn.Module = models.ResNet((2, 2, 2, 2), pictures.classes, widths)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def not_pruned(model: Any) -> list[str]:
    return list(model.not_pruned)


def learn(
    method: Method, recipe: Recipe, train: Rows, seed: int, after_round: Callable[[float], None] | None = None
) -> None:
    """Train to the end of the recipe; `after_round(level)` after the last epoch before each prune, and at the end."""
    stepper = Stepper(method, recipe.optimizer, Runtime())
    steps = train.steps(recipe.batch_size)
    prunes = dict(method.prunes()) if isinstance(method, Staged) else {}
    level = 0.0
    for epoch in range(1, recipe.epochs + 1):
        cycle = cycle_of(method, epoch, recipe)

        def rate_at(step: int, epoch: int = epoch, cycle: tuple[int, int] = cycle) -> Rate:
            return Rate(learning_rate(recipe, epoch, step / steps, cycle), recipe.weight_decay)

        shuffle = torch.Generator().manual_seed(1000 * seed + epoch)
        stepper.learn(train.batches(recipe.batch_size, shuffle), rate_at)
        recalibrate(method.student, train, recipe.batch_size, torch.Generator().manual_seed(seed))
        if after_round is not None and (epoch in prunes or epoch == recipe.epochs):
            after_round(level)
        level = prunes.get(epoch, level)
        method.after_boundary(epoch)


def accuracy(frozen: nn.Module, test: Rows) -> float:
    with torch.inference_mode():
        right = sum(int((frozen(*inputs).argmax(1) == target).sum()) for inputs, target in test.batches(100))
    return right / len(test)


def frozen_at(model: nn.Module, x: Tensor, threads: int, layer_ms: float) -> nn.Module:
    """Frozen as it is served, whatever the number of threads that it was trained with."""
    return sparsekd.freeze(model.eval(), x, threads=threads, layer_ms=layer_ms)


def dense_network(
    out: Path, name: str, widths: Sequence[int], epochs: int, train: Rows, seed: int, protocol: Protocol, teacher: Any
) -> nn.Module:
    """Trained now, or read where an earlier call has."""
    path = out / f"seed{seed}" / f"{name}.safetensors"
    torch.manual_seed(seed)
    model = network(widths, protocol.pictures)
    if not path.is_file():
        learn(Method(learner(model, teacher, train, seed)), protocol.recipe(epochs), train, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(model, path)
    return checkpoint.load(model, path)


def learner(model: Any, teacher: Any, train: Rows, seed: int) -> Any:
    goal = sparsekd.Classification()
    if teacher is None:
        return Plain(model, goal)
    torch.manual_seed(1000 + seed)  # the SAD meta-network
    taps = [f"blocks.{last}.relu2" for last in (1, 3, 5, 7)]
    options: dict[str, Any] = {"goal": goal, "alpha": ALPHA, "beta": BETA}
    return sparsekd.Distiller(teacher.eval(), model, taps, taps, example_inputs=train.examples(2), **options)


def schedule_of(method: str, protocol: Protocol) -> tuple[Schedule, dict[str, Any], int]:
    """The schedule, options and epochs of a student that trains one round dense, and one after each prune."""
    targets = tuple(round(1 - point, 6) for point in sorted(protocol.points, reverse=True))
    every = protocol.round_epochs
    epochs = (len(targets) + 1) * every
    if method != "ss-sad":
        return ListedSchedule(targets, every, unit="latency_us"), {}, epochs
    start = round(targets[0] / 2, 6)  # what the ticket gives, before the teacher comes
    ticket = LinearSchedule(start, every, final=start, unit="latency_us")
    options = {"initial": ticket, "initial_epochs": 2 * every}
    return ListedSchedule(targets, every, start=start, unit="latency_us"), options, epochs + 2 * every


def train_all(options: argparse.Namespace) -> None:
    out, folder = Path(options.out), Path(options.data)
    protocol = protocol_of(options)
    costs = CostTable.load(out / COSTS)
    pictures = protocol.pictures
    whole, test = pictures.load(folder)
    train, for_rounds = (pictures.first(whole, count) for count in (protocol.images, protocol.round_images))
    done = {(row["seed"], row["method"], row["way"]) for row in rows_in(out) if row["last"]}
    for seed in range(options.seeds):
        dense: dict[str, Any] = {"train": train, "seed": seed, "protocol": protocol}
        teacher = dense_network(out, "teacher", TEACHER, protocol.teacher_epochs, **dense, teacher=None)
        dense_network(out, "student", STUDENT, protocol.dense_epochs, **dense, teacher=teacher)
        for name in ("teacher", "student"):
            if (seed, name, "dense") not in done:
                fresh = network(TEACHER if name == "teacher" else STUDENT, pictures)
                model = checkpoint.load(fresh, out / f"seed{seed}" / f"{name}.safetensors")
                of_student = costs if name == "student" else None
                append(out, row_of(seed, name, "dense", 1.0, model, pictures, test, of_student, 0.0, True))
        for method in METHOD_NAMES:
            for way in WAYS:
                if (seed, method, way) not in done:
                    one_student(out, seed, method, way, protocol, for_rounds, test, costs, teacher)


def one_student(
    out: Path,
    seed: int,
    method: str,
    way: str,
    protocol: Protocol,
    train: Rows,
    test: Rows,
    costs: CostTable,
    teacher: Any,
) -> None:
    """Prunes the dense student to every point; a row for each, written when the last one is there."""
    student = checkpoint.load(network(STUDENT, protocol.pictures), out / f"seed{seed}" / "student.safetensors")
    schedule, more, epochs = schedule_of(method, protocol)
    began, ready = time.process_time(), []
    pruner_options: dict[str, Any] = {"pattern": PATTERN, "exclude": not_pruned(student), "seed": seed, "costs": costs}
    staged: Any = METHODS[method](
        learner(student, teacher, train, seed),
        schedule,
        epochs=epochs,
        example_inputs=train.examples(2),
        **pruner_options,
        **WAYS[way],
        **more,
    )
    last, pictures = min(protocol.points), protocol.pictures

    def after_round(removed: float) -> None:
        point = round(1 - removed, 6)
        if point in protocol.points:
            path = out / f"seed{seed}" / f"{method}-{way}-{point:g}.safetensors"
            checkpoint.save(student, path)
            seconds = time.process_time() - began
            ready.append(row_of(seed, method, way, point, student, pictures, test, costs, seconds, point == last))

    learn(staged, protocol.recipe(epochs), train, seed, after_round)
    for row in ready:
        append(out, row)


def row_of(
    seed: int,
    method: str,
    way: str,
    point: float,
    model: Any,
    pictures: Pictures,
    test: Rows,
    costs: CostTable | None,
    seconds: float,
    last: bool,
) -> dict[str, Any]:
    weights, kept = sparsekd.pruning.count_weights(model, not_pruned(model))
    x = pictures.example(1)
    dense_macs, macs = sparsekd.pruning.count_macs(model, (x,), not_pruned(model))
    return {
        "seed": seed,
        "method": method,
        "way": way,
        "point": point,
        "accuracy": accuracy(frozen_at(model, x, 1, 0.5), test),
        "predicted_us": None if costs is None else costs.predict(model),
        "weights_kept": kept / weights,
        "macs_kept": macs / dense_macs,
        "densities": {name: round(layer.density, 4) for name, layer in sparse_layers(model)},
        "train_cpu_seconds": round(seconds, 1),
        "last": last,
    }


def sparse_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "block_mask")]


def append(out: Path, row: dict[str, Any]) -> None:
    with (out / ROWS).open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(in_one_line(row), flush=True)


def in_one_line(row: dict[str, Any]) -> str:
    predicted = "" if row["predicted_us"] is None else f", {row['predicted_us']:.0f} us predicted"
    measured = f", {row['measured_us']:.0f} measured" if row.get("measured_us") else ""
    return (
        f"seed {row['seed']} {row['method']} {row['way']} @ latency {row['point']:g}: {row['accuracy']:.2%}, "
        f"{row['weights_kept']:.1%} of the weights, {row['macs_kept']:.1%} of the multiply-adds{predicted}{measured}"
    )


def rows_in(out: Path) -> list[dict[str, Any]]:
    path = out / ROWS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def protocol_of(options: argparse.Namespace) -> Protocol:
    """Of the options, or of the folder, where an earlier call has written it: rows of two protocols do not mix."""
    protocol = Protocol(
        tuple(options.points),
        options.images,
        options.round_images or options.images,
        options.teacher_epochs,
        options.dense_epochs,
        options.round_epochs,
        dataset=options.dataset,
    )
    fields = json.loads(json.dumps(asdict(protocol)))
    path = Path(options.out) / "protocol.json"
    if path.is_file() and json.loads(path.read_text()) != fields:
        raise ValueError(f"benchmarks.equal_latency: {path} holds another protocol, got {fields}; take another --out")
    path.write_text(json.dumps(fields) + "\n")
    return protocol


def measure_costs(options: argparse.Namespace) -> None:
    """The table that all students are pruned by."""
    torch.manual_seed(0)
    pictures = DATASETS[options.dataset]
    model: Any = network(STUDENT, pictures).eval()
    x = pictures.example(options.batch)
    torch.set_num_threads(options.threads)
    costs = CostTable.measure(model, (x,), pattern=PATTERN, exclude=not_pruned(model))
    Path(options.out).mkdir(parents=True, exist_ok=True)
    costs.save(Path(options.out) / COSTS)
    least = costs.rest_us + sum(layer.us(0.02) for layer in costs.layers.values())
    print(f"{costs}; at least {least:.0f} us, {least / costs.dense_us:.2f} of the dense time")


def time_all(options: argparse.Namespace) -> None:
    """Export the students of the first seed, frozen at the batch and threads of the table of costs, and time each in a
    process of its own, in turns, and the dense one in OpenVINO too. Those of other seeds keep as many blocks in as many
    layers, so that their time is the same; only their accuracy is used."""
    out = Path(options.out)
    costs = CostTable.load(out / COSTS)
    protocol = Protocol(**json.loads((out / "protocol.json").read_text()))
    torch.set_num_threads(costs.threads)
    rows = [{**row, "measured_us": None} for row in rows_in(out) if row["method"] != "teacher"]
    rows.append({**next(row for row in rows if row["way"] == "dense"), "method": "openvino"})
    timed = [row for row in rows if row["seed"] == rows[0]["seed"]]
    x = protocol.pictures.example(costs.batch)
    turns: list[list[float]] = [[] for _ in timed]
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(place) for place in range(len(timed))]
        for row, folder in zip(timed, folders, strict=True):
            folder.mkdir()
            row["absent"] = write_student(out, row, protocol.pictures, costs, x, folder, options.layer_ms)
        for _ in range(TURNS):
            for row, folder, taken in zip(timed, folders, turns, strict=True):
                if row["absent"] is None:
                    runtime = "OpenVINO" if row["method"] == "openvino" else "sparsekd.runtime"
                    turn = deploy.turn(runtime, folder, costs.threads, options.seconds)
                    row["absent"] = turn.get("absent")
                    taken += [turn["us"]] if row["absent"] is None else []
    for row, taken in zip(timed, turns, strict=True):
        row["measured_us"] = statistics.median(taken) if row["absent"] is None else None
        print(in_one_line(row), flush=True)
    about = {"protocol": asdict(protocol), "batch": costs.batch, "threads": costs.threads, "dense_us": costs.dense_us}
    about["costs_sha256"] = hashlib.sha256((out / COSTS).read_bytes()).hexdigest()
    command = shlex.join(["python", "-m", "benchmarks.equal_latency", *sys.argv[1:]])
    write_json(options.json, command, rows, {**machine(), **about})


def write_student(
    out: Path, row: dict[str, Any], pictures: Pictures, costs: CostTable, x: Tensor, folder: Path, layer_ms: float
) -> str | None:
    """The files that it is timed from; or why there are none."""
    name = "student" if row["way"] == "dense" else f"{row['method']}-{row['way']}-{row['point']:g}"
    model = checkpoint.load(network(STUDENT, pictures), out / f"seed{row['seed']}" / f"{name}.safetensors")
    try:
        frozen = frozen_at(model, x, costs.threads, layer_ms)
        deploy.write_files(frozen, (x,), folder, onnx=row["method"] == "openvino")
    except ImportError as error:
        return str(error)
    return None


def chart(options: argparse.Namespace) -> None:
    contents = json.loads(Path(options.json).read_text())
    Path(options.svg).parent.mkdir(parents=True, exist_ok=True)
    Path(options.svg).write_text(picture(contents["rows"], contents["machine"], METHOD_NAMES, tuple(WAYS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["costs", "train", "time", "chart"])
    parser.add_argument("--out", metavar="DIR", help="tables, students and rows (runs/equal-latency)")
    parser.add_argument("--data", metavar="DIR", help="the idx files of Fashion-MNIST, plain or .xz, or CIFAR-100")
    parser.add_argument("--dataset", choices=DATASETS, default="fashion-mnist")
    parser.add_argument("--json", metavar="FILE", help="benchmarks/results/equal_latency.json for Fashion-MNIST")
    parser.add_argument("--svg", metavar="FILE", help="docs/equal_latency.svg for Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--points", type=float, nargs="+", default=[0.5, 0.3, 0.2])
    parser.add_argument("--images", type=int, default=16_000)
    parser.add_argument("--round-images", type=int, help="that a student which is pruned sees (--images)")
    parser.add_argument("--teacher-epochs", type=int, default=6)
    parser.add_argument("--dense-epochs", type=int, default=3)
    parser.add_argument("--round-epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="of the latency (1)")
    parser.add_argument("--threads", type=int, default=1, help="of the latency (1)")
    parser.add_argument("--layer-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=0.3, help="to time a network for")
    options = parser.parse_args()
    suffix = "" if options.dataset == "fashion-mnist" else f"-{options.dataset}"
    options.out = options.out or f"runs/equal-latency{suffix}"
    options.json = options.json or f"benchmarks/results/equal_latency{suffix}.json"
    options.svg = options.svg or f"docs/equal_latency{suffix}.svg"
    if options.step == "train" and options.data is None:
        parser.error("train needs --data")
    {"costs": measure_costs, "train": train_all, "time": time_all, "chart": chart}[options.step](options)
    sys.exit(0)


if __name__ == "__main__":
    main()
