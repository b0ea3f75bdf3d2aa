"""The whole job, as arXiv 2401.10484 counts it: training of a student and inference over the test part.

    python -m benchmarks.headline run --out runs/headline --threads 2 --minutes 3     # goes on where it was stopped
    python -m benchmarks.headline table --out runs/headline --json benchmarks/results/headline.json
    python -m benchmarks.headline floor --out runs/headline --json benchmarks/results/headline_floor.json

On movietweetings (or, by --task, a group of films such as movies-categorical), in turns, each job in a process of its
own:

    plain torch   dense SAD as one would write it: the teacher in every step, the loss of lib/plain_sad.py
    SAD           the same with this library: a cache of the teacher, our loss, channels_last, one kernel for AdamW
    SP-SAD, LTH-SAD, SS-SAD at .45, .3, .2 and .1 of the multiply-adds, with the same
    SP-SAD at once, ...   the same, before the first step ("at once by snip": by a saliency, not for
                          SS-SAD); if --jobs names them

All train for as many passes over the same batches, and keep the epoch of smallest validation error; --recipe long is
that of twice as many passes. A job takes the pass of the teacher that fills the cache (every job pays all of it, though
a run shares it), training with its validation, and the test part in batches of 512; freezing would take longer than it
saves on so few rows. Reading the data and the teacher's own training are in none: both sides need them alike. `table`
marks the density of each method that has the smallest validation error, of those that have run; where a job has other
turns, it leaves out the seconds of those in which other processes had more than a twentieth of the machine. `floor`
times single steps beside what they cannot take less than (lib/floor.py), of dense students and of those that are pruned
at once, and shows which ops take their time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib import plain_sad
from benchmarks.lib.floor import floor_of
from benchmarks.lib.timing import Elsewhere, machine, write_json
from sparsekd import checkpoint, energy
from sparsekd.data import Task
from sparsekd.data.movies import GROUPS
from sparsekd.models.maps import in_training_layout
from sparsekd.runs import RunConfig, record, tasks, teaching
from sparsekd.runs.epochs import SCORED, fit, picked_epoch
from sparsekd.runs.learners import learner_of
from sparsekd.runs.memory import keep_freed_memory
from sparsekd.runs.plans.network import AT_ONCE, Network, Plan
from sparsekd.runs.runtime import Runtime
from sparsekd.runs.steps import Rate, Stepper

TASKS = ("movietweetings", *(f"movies-{group}" for group in GROUPS))
DENSITIES = (0.45, 0.3, 0.2, 0.1)
RECIPE, LONG = "ours", "long"
PLAIN = "plain torch"
BATCH = 512  # of inference
STEPS = 40  # that are timed for a floor
LONGEST = 12  # ops whose shares of a step are shown
ELSEWHERE = 0.05  # share of the machine that other processes may have
ROWS = "rows.jsonl"


def read(options: argparse.Namespace) -> tuple[Task, Plan]:
    name, _, group = options.task.partition("-")
    of_task = {"group": group} if group else {}
    if options.recipe != RECIPE:
        of_task["recipe"] = options.recipe
    config = RunConfig(name, data_dir=options.data, densities=DENSITIES, options=of_task, quick=options.quick)
    config = tasks.complete(config)
    task = tasks.entry_of(config.task).load(config)
    return task, tasks.plan_of(task, config)


def networks_of(plan: Plan) -> dict[str, Network]:
    """Name of a job -> the student that it trains."""
    students = [*plan.students, *(net for score in AT_ONCE for net in plan.at_once(score).students)]
    pruned = {f"{net.name} @ {net.densities[0]:g}": net for net in students if net.densities}
    sad = next(net for net in plan.students if net.folder == "sad")
    return {PLAIN: sad, "SAD": sad, **pruned}


def network_of(plan: Plan, job: str) -> Network:
    networks = networks_of(plan)
    if job not in networks:
        raise ValueError(f"benchmarks.headline: --jobs must be of {', '.join(networks)}, got {job!r}")
    return networks[job]


def teacher_of(options: argparse.Namespace, task: Task, plan: Plan) -> nn.Module:
    """Trained now, or read where an earlier call has."""
    folder = Path(options.out) / f"seed{options.seed}" / "teacher"
    model = record.fresh(plan.teacher, options.seed)
    if not (folder / "done").is_file():
        fit(model, task, plan.teacher, seed=options.seed, folder=folder)
        (folder / "done").touch()
    return checkpoint.load(model, folder / plan.teacher.file(None)).eval()


def job(options: argparse.Namespace) -> dict[str, Any]:
    """One row: what the job took, and how good its student is."""
    task, plan = read(options)
    network = network_of(plan, options.job)
    teacher = teacher_of(options, task, plan)
    student = record.fresh(network, options.seed)
    work = plain if options.job == PLAIN else ours
    with Elsewhere() as elsewhere, tempfile.TemporaryDirectory() as folder:
        measured = work(task, network, teacher, student, options.seed, Path(folder))
    took = [value for name, value in measured.items() if name.endswith("_seconds")]
    joules = measured.pop("joules")
    return {
        "task": options.task,
        "recipe": options.recipe,
        "job": options.job,
        "seed": options.seed,
        "turn": options.turn,
        "seconds": sum(took),
        **measured,
        "joules": None if None in joules else sum(joules),
        "elsewhere": elsewhere.share,
        "threads": torch.get_num_threads(),
        "quick": options.quick,
    }


def plain(task: Task, network: Network, teacher: nn.Module, student: nn.Module, seed: int, folder: Path) -> Any:
    """Dense SAD in plain torch."""
    with energy.EnergyMeter("cpu") as training:
        state, val = plain_sad.train(task, network, teacher, student, seed)
    student.load_state_dict(state)
    with energy.EnergyMeter("cpu") as inference:
        prediction = predicted(student.eval(), task)
    return {
        "train_seconds": training.reading.seconds,
        "infer_seconds": inference.reading.seconds,
        "val_mse": val,
        **scored(task, prediction),
        "joules": [training.reading.joules, inference.reading.joules],
    }


def ours(task: Task, network: Network, teacher: nn.Module, student: nn.Module, seed: int, folder: Path) -> Any:
    """What `sparsekd run` does for one student."""
    keep_freed_memory()
    meters = [energy.EnergyMeter("cpu") for _ in range(3)]
    with meters[0]:
        kept = teaching.kept_teacher(teaching.in_fast_layout(teacher), task, Runtime(), print)
    with meters[1]:
        epochs = fit(student, task, network, teacher=teacher, kept=kept, seed=seed, folder=folder)
    density = network.densities[0] if network.densities else None
    with meters[2]:
        model = checkpoint.load(record.fresh(network, seed), folder / network.file(density))
        with in_training_layout(model):
            prediction = predicted(model.eval(), task)
    picked = picked_epoch(epochs, density or 1.0, network.recipe.select, task.goal.judge)
    assert picked is not None
    stages = ("teacher", "train", "infer")
    return {
        **{f"{stage}_seconds": meter.reading.seconds for stage, meter in zip(stages, meters, strict=True)},
        "val_mse": picked["val_mse"],
        **scored(task, prediction),
        "epochs": [{"seconds": round(e["seconds"], 3), "density": round(e["density"], 4)} for e in epochs],
        "joules": [meter.reading.joules for meter in meters],
    }


def predicted(model: Callable[..., Any], task: Task) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(*inputs) for inputs, _ in task.test.batches(BATCH)])


def scored(task: Task, prediction: Tensor) -> dict[str, float]:
    measured = task.goal.measure(prediction, task.test.target)  # type: ignore[attr-defined]
    return {f"test_{name}": value for name, value in measured.items()}


def run(options: argparse.Namespace) -> None:
    """All jobs that are not in the file yet, in turns, as long as there is time for the longest one known."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows_of(options)  # refuses a folder of another task before a teacher is trained
    task, plan = read(options)
    teacher_of(options, task, plan)
    names = options.jobs or [name for name in networks_of(plan) if " at once" not in name]
    del task, plan
    began = time.monotonic()
    for turn in range(options.turns):
        for name in names:
            known = rows_in(out)
            if any((row["job"], row["seed"], row["turn"]) == (name, options.seed, turn) for row in known):
                continue
            left = 60 * options.minutes - (time.monotonic() - began)
            if left < 1.15 * expected(known, name):
                print(f"{left:.0f} s left: no time for {name}; the same call goes on from here", flush=True)
                return
            in_a_process(options, name, turn)


def expected(rows: Iterable[dict[str, Any]], name: str) -> float:
    """Seconds that a job takes with its start; of one that has not run, as long as the longest that has."""
    took = {row["job"]: row["wall_seconds"] for row in rows}
    return took.get(name, max(took.values(), default=0.0))


def in_a_process(options: argparse.Namespace, name: str, turn: int) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.headline", "job", "--job", name, "--turn", str(turn)]
    command += ["--out", options.out, "--seed", str(options.seed), "--threads", str(options.threads)]
    command += ["--task", options.task, "--recipe", options.recipe, *(["--quick"] if options.quick else [])]
    command += [] if options.data is None else ["--data", options.data]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1]) | {"wall_seconds": time.monotonic() - began}
    with (Path(options.out) / ROWS).open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(in_one_line(row), flush=True)


def in_one_line(row: dict[str, Any]) -> str:
    return (
        f"seed {row['seed']} turn {row['turn']} {row['job']}: {row['seconds']:.1f} s ({row['train_seconds']:.1f} of "
        f"training), validation MSE {row['val_mse']:.4f}, test MSE {row['test_mse']:.4f}, "
        f"{row['elsewhere']:.1%} of the machine elsewhere"
    )


def rows_in(out: Path) -> list[dict[str, Any]]:
    path = out / ROWS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the folder. ValueError where they are of another task or recipe."""
    rows = rows_in(Path(options.out))
    for name in ("task", "recipe"):
        asked = getattr(options, name)
        others = {_told(row)[name] for row in rows} - {asked}
        if others:
            raise ValueError(
                f"benchmarks.headline: {options.out} has rows of {', '.join(sorted(others))}, got --{name} {asked}; "
                "take another --out"
            )
    return rows


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what rows did not say before there was a choice; MovieTweetings had the long recipe alone."""
    task = row.get("task", TASKS[0])
    return {"task": task, "recipe": LONG if task == TASKS[0] else RECIPE, **row}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each job the medians over its undisturbed turns of its seconds, and of their ratio to plain torch with the
    same seed, which ran in the same hour; means over seeds of the errors, of the test error with the deviation."""
    plain: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["job"] == PLAIN:
            plain.setdefault(row["seed"], []).append(row)
    missing = sorted({row["seed"] for row in rows} - plain.keys())
    if missing:
        raise ValueError(
            f"benchmarks.headline table: {PLAIN} has not run with seed {', '.join(map(str, missing))}, which all "
            f"others are compared with; python -m benchmarks.headline run --seed {missing[0]} --jobs '{PLAIN}'"
        )
    base = {seed: _median(of_seed, "seconds") for seed, of_seed in plain.items()}
    by_job: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_job.setdefault(row["job"], []).append({**row, "ratio": row["seconds"] / base[row["seed"]]})
    return [
        {
            "job": name,
            "seconds": _median(taken, "seconds"),
            "ratio": _median(taken, "ratio"),
            "train_seconds": _median(taken, "train_seconds"),
            "val_mse": statistics.fmean(row["val_mse"] for row in taken),
            "test_mse": statistics.fmean(row["test_mse"] for row in taken),
            "test_mse_deviation": _deviation(taken),
            "seeds": len({row["seed"] for row in taken}),
            "turns": len(taken),
            "chosen": False,
        }
        for name, taken in by_job.items()
    ]


def _deviation(rows: list[dict[str, Any]]) -> float | None:
    """Of the test error over seeds; the turns of one seed have the same."""
    of_seeds = list({row["seed"]: row["test_mse"] for row in rows}.values())
    return statistics.stdev(of_seeds) if len(of_seeds) > 1 else None


def _median(rows: list[dict[str, Any]], name: str) -> float:
    undisturbed = [row for row in rows if row["elsewhere"] <= ELSEWHERE] or rows
    return statistics.median(row[name] for row in undisturbed)


def table(options: argparse.Namespace) -> None:
    rows = rows_of(options)
    lines = summary(rows)
    for method in dict.fromkeys(line["job"].split(" @ ")[0] for line in lines):
        densities = [line for line in lines if line["job"].split(" @ ")[0] == method]
        min(densities, key=lambda line: line["val_mse"])["chosen"] = True
    print("| job | seconds | of plain torch | validation MSE | test MSE | runs |\n|---|---|---|---|---|---|")
    for line in lines:
        name = f"**{line['job']}**" if line["chosen"] else line["job"]
        deviation = line["test_mse_deviation"]
        spread = "" if deviation is None else f" ± {deviation:.4f}"
        print(
            f"| {name} | {line['seconds']:.1f} | {line['ratio']:.2f} | {line['val_mse']:.4f} "
            f"| {line['test_mse']:.4f}{spread} | {line['turns']} |"
        )
    if options.json:
        # The rows were taken before: what this moment has to say of the machine's speed is left out.
        about = {name: value for name, value in machine().items() if name not in ("fma_peak_gflops", "load_average")}
        write_json(options.json, this_command(), [*lines, *rows], about)


def this_command() -> str:
    return shlex.join(["python", "-m", "benchmarks.headline", *sys.argv[1:]])


def floor(options: argparse.Namespace) -> None:
    """A line for each job: a step, and what it cannot take less than."""
    rows = []
    for row in floors(options):
        rows.append(row)
        least = row["arithmetic_ms"] + row["traffic_ms"]
        print(
            f"{row['job']}: {row['step_ms']:.1f} ms a step; at least {least:.1f}, of which "
            f"{row['arithmetic_ms']:.1f} for {row['macs'] / 1e6:.0f} million multiply-adds at "
            f"{row['gflops']:.0f} GFLOP/s and {row['traffic_ms']:.1f} for {row['bytes'] / 1e6:.0f} MB at "
            f"{row['gigabytes_a_second']:.1f} GB/s",
            flush=True,
        )
        print("  " + ", ".join(f"{op} {share:.1%}" for op, share in row["ops_share"].items()), flush=True)
    if options.json:
        write_json(options.json, this_command(), rows)


def floors(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    task, plan = read(options)
    names = options.jobs or ("SAD", "LTH-SAD at once @ 0.1")
    most = max(network_of(plan, name).recipe.batch_size for name in names)
    few = dataclasses.replace(task, train=task.train.take(slice(0, STEPS * most)))
    teacher = teaching.in_fast_layout(teacher_of(options, task, plan))
    keep_freed_memory()
    kept = teaching.kept_teacher(teacher, few, Runtime(), print)
    if kept is None:
        raise RuntimeError("benchmarks.headline floor: what the teacher says takes too much memory to be kept")
    for name in names:
        network = network_of(plan, name)
        student = record.fresh(network, options.seed)
        method = learner_of(student, few, network, teacher, options.seed)
        stepper = Stepper(method, network.recipe.optimizer, Runtime())

        def epoch(number: int, network: Network = network) -> Any:
            shuffle = torch.Generator().manual_seed(number)
            return teaching.taught_batches(few.train, kept, Runtime(), network.recipe.batch_size, shuffle, 0, 1)

        method.before_training(islice(epoch(0), SCORED))
        stepper.learn(epoch(0), lambda _: Rate(lr=1e-3, weight_decay=0.0))
        began = time.perf_counter()
        stepper.learn(epoch(1), lambda _: Rate(lr=1e-3, weight_decay=0.0))
        step_ms = 1e3 * (time.perf_counter() - began) / few.train.steps(network.recipe.batch_size)
        least = floor_of(student, few.train.examples(network.recipe.batch_size))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            stepper.learn(epoch(2), lambda _: Rate(lr=1e-3, weight_decay=0.0))
        yield {
            "job": name,
            "batch": network.recipe.batch_size,
            "step_ms": step_ms,
            "arithmetic_ms": least.arithmetic_ms,
            "traffic_ms": least.traffic_ms,
            **dataclasses.asdict(least),
            "ops_share": longest_ops(profiled),
        }


def longest_ops(profiled: torch.profiler.profile) -> dict[str, float]:
    """The ops that take longest, each with its share of the time of all."""
    took = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    longest = sorted(took, key=lambda op: -took[op])[:LONGEST]
    return {op: round(took[op] / sum(took.values()), 4) for op in longest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["run", "job", "table", "floor"])
    parser.add_argument("--out", metavar="DIR", help="rows and the teacher (runs/headline, for films with their name)")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--recipe", choices=[RECIPE, LONG], default=RECIPE, help="long: of MovieTweetings alone")
    parser.add_argument("--data", metavar="DIR", help="of the task, if not the embedded MovieTweetings")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0, help="no job is begun that would take longer")
    parser.add_argument(
        "--jobs",
        nargs="+",
        metavar="NAME",
        help="these alone, as in 'LTH-SAD at once @ 0.1' (all that prune while they train)",
    )
    parser.add_argument("--quick", action="store_true", help="few rows: to see it work, not to quote")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--job", help="of the step job, which run calls")
    parser.add_argument("--turn", type=int, default=0)
    options = parser.parse_args()
    differs = [name for name in (options.task, options.recipe) if name not in (TASKS[0], RECIPE)]
    usual = "-".join(["runs/headline", *differs])
    options.out = options.out or usual
    torch.set_num_threads(options.threads)
    if options.step == "job":
        print(json.dumps(job(options)))
    else:
        {"run": run, "table": table, "floor": floor}[options.step](options)


if __name__ == "__main__":
    main()
