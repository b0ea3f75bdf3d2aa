"""The main job: train a teacher, distil and prune students, freeze them, measure what it cost and what it won.

    results, folder = run(RunConfig("movietweetings", methods=("lth-sad",)))

`run` reads top to bottom; what is trained is in plans/, the training loop in epochs.py, what a trained network is worth
in evaluate.py, and what is written down of it in record.py.

    runs/movietweetings/
      results.json report.md report.html see report/
      baselines.json                     what needs no network, computed once
      seed0/<network>/model.safetensors  the picked epoch; sparse layers as their kept blocks, a file a density
      seed0/<network>/state.safetensors  where to go on after a kill, while it trains
      seed0/<network>/rows.json          its rows of the report, once finished
      seed0/teacher.cache                what the teacher says, while several processes learn from it (--jobs)
      seed0/<network>/recommender.safetensors  of a ranking: for sparsekd recommend

A later call with other methods or fewer seeds adds to the report: what else has finished in the folder stays in it.
A run that was stopped goes on after the last finished epoch of the network in training, with the same numbers as if it
had never stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint, distributed, report
from ..data import Task
from ..pruning import CostTable
from ..teacher_cache import TeacherCache
from . import baselines, budgets, jobs, record, tasks
from .config import RunConfig
from .epochs import STATE
from .folder import claimed
from .memory import keep_freed_memory
from .plans.network import Network, Plan
from .record import Finished, Row
from .runtime import OutOfTime, Runtime, is_over, rank, start, wait_for_all
from .state import check_same_settings
from .teaching import in_fast_layout, kept_teacher

__all__ = ["run"]

BASELINES = "baselines.json"
CACHE = "teacher.cache"  # of a seed, for as long as several processes learn from it


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def run(config: RunConfig, say: Callable[[str], None] = _print) -> tuple[dict[str, Any], Path]:
    """Do everything `config` asks for; returns the contents of results.json and the folder it lies in.

    Raises ValueError and FileNotFoundError for bad input, RuntimeError where training diverges or another process works
    in the folder, OSError where it cannot be written to (before anything is trained), OutOfTime when
    `stop_after` is over and KeyboardInterrupt on Ctrl-C; whatever had finished is on disk (results.json included), and
    the same call goes on from there.
    """
    deadline = math.inf if config.stop_after is None else time.monotonic() + 60 * config.stop_after
    config = tasks.complete(config)
    tasks.check_is_one(config)
    entry = tasks.entry_of(config.task)
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    loaded = entry.load(config)
    if entry.describe is not None and rank() == 0:
        say(entry.describe(loaded))
    runtime = start(config, entry.on_gpu, deadline)
    if config.jobs > 1 and (runtime.device != "cpu" or distributed.num_ranks() > 1):
        raise ValueError(
            f"sparsekd run: jobs share the threads of one CPU, got jobs {config.jobs} on {runtime.device} and "
            f"{distributed.num_ranks()} ranks; leave --jobs out, or give --device cpu"
        )
    task = loaded.to(runtime.device)
    out = tasks.folder_of(config, task)
    to_measure = config.unit == "latency_us" and config.costs is None
    plan = None if to_measure else _checked_plan(task, config)  # bad input raises before there is a folder
    with claimed(out) if rank() == 0 else nullcontext():
        if plan is None:
            config = _with_costs(config, task, out, say)
            plan = _checked_plan(task, config)
        if config.fresh and rank() == 0:
            clear(out)
        wait_for_all()
        # First: what these need is missing before anything was trained, or not at all. They compute with numpy, on the
        # CPU.
        about = record.settings_of_task(task, plan, config)
        baseline_scores = baselines.kept(loaded, out / BASELINES, about, anew=config.remeasure)
        work = _Run(config, task, plan, runtime, out, say, baseline_scores)
        for seed in range(config.seeds):
            work.train_all(seed)
        wait_for_all()
        return report.read(out), out


@dataclass
class _Run:
    """One run under way: what all of its networks share, and the rows that it has so far."""

    config: RunConfig
    task: Task
    plan: Plan
    runtime: Runtime
    out: Path
    say: Callable[[str], None]
    baseline_scores: list[dict[str, Any]]
    rows: list[Row] = field(default_factory=list)

    def train_all(self, seed: int) -> None:
        """The teacher and its students, one after the other; by `config.jobs` the students at once, since the teacher
        takes longest and is ready sooner with all threads."""
        path = self.out / f"seed{seed}" / CACHE if self.config.jobs > 1 else None
        if path is not None:
            for network in self.plan.networks:  # rows under other settings are refused before anything is trained
                self._earlier(network, seed)
        teacher = in_fast_layout(self.train(self.plan.teacher, seed))
        # Once a seed, and only if one of its students is not finished yet.
        kept = functools.cache(
            functools.partial(
                kept_teacher, teacher, self.task, self.runtime, self.say_once, self.plan.views, seed, path
            )
        )
        if path is not None:
            self._train_at_once(seed, path, kept)
        for student in self.plan.students:
            self.train(student, seed, teacher, kept)
        if rank() == 0:  # it may be of an earlier call that was stopped
            (self.out / f"seed{seed}" / CACHE).unlink(missing_ok=True)

    def _train_at_once(self, seed: int, path: Path, kept: Callable[[], TeacherCache | None]) -> None:
        """The students that an earlier call has not finished."""
        missing = [student for student in self.plan.students if self._earlier(student, seed)[0] is None]
        taught = any(student.alpha or student.beta for student in missing)
        if taught:
            kept()  # which writes the file that the processes read
        jobs.train(self.config, missing, seed, self.out, self.runtime, path if taught else None, self.say)

    def _earlier(self, network: Network, seed: int) -> tuple[Finished | None, list[Row]]:
        """What an earlier call has trained, and its rows. ValueError for a damaged file, and for other settings."""
        folder = self.out / f"seed{seed}" / network.folder
        before = record.kept_rows(folder / record.ROWS)
        if not before:
            return None, before
        finished = Finished(network, seed, folder, self._settings(network, seed), before[0]["epochs"])
        return self._checked(finished, before[0]), before

    def train(
        self,
        network: Network,
        seed: int,
        teacher: nn.Module | None = None,
        kept: Callable[[], TeacherCache | None] = lambda: None,
    ) -> nn.Module:
        """The network, trained; its rows are in the report then. Trains where an earlier run has not.

        kept: what the teacher says of every row, which is asked for by who learns from it.
        """
        folder = self.out / f"seed{seed}" / network.folder
        path = folder / record.ROWS
        finished, before = self._earlier(network, seed)
        if finished is None:
            settings = self._settings(network, seed)
            epochs = jobs.fitted(network, seed, self.task, settings, self.runtime, folder, teacher, kept)
            finished = Finished(network, seed, folder, settings, epochs)
        wait_for_all()
        if before and self.config.remeasure and is_over(self.runtime.deadline):
            raise OutOfTime(f"{network.name} seed {seed}: not measured again")
        if rank() == 0 and (not before or self.config.remeasure):
            self._write_rows(finished, path, before)
        wait_for_all()
        self.rows += json.loads(path.read_text())
        model = finished.load(finished.densities[-1]).to(self.runtime.device)
        if rank() == 0:
            report.write(self._results(model), self.out)
        return model

    def say_once(self, line: str) -> None:
        """Of several ranks the first one says it."""
        if rank() == 0:
            self.say(line)

    def _settings(self, network: Network, seed: int) -> dict[str, Any]:
        return record.settings_of_network(network, seed, self.task, self.plan, self.config, self.runtime)

    def _checked(self, finished: Finished, row: Row) -> Finished:
        """A network of an earlier run under the settings of then, which must be those of now."""
        then, now = row["settings"], finished.settings
        if self.config.remeasure:  # nothing of it is trained, so here may be another device
            now = now | {key: then[key] for key in self.runtime.settings() if key in then}
        check_same_settings(finished.folder / record.ROWS, then, now)
        return dataclasses.replace(finished, settings=then)

    def _write_rows(self, finished: Finished, path: Path, before: list[Row]) -> None:
        rows = record.rows_of(finished, self.task, self.plan, self.config, self.runtime, before)
        checkpoint.write_atomically(path, json.dumps(rows, indent=1).encode())
        record.write_for_serving(finished, self.task)
        (finished.folder / STATE).unlink(missing_ok=True)
        for row in rows:
            self.say(record.in_one_line(row, self.task))

    def _results(self, model: nn.Module) -> dict[str, Any]:
        """The contents of results.json as far as it goes; `model` is the network that has just finished."""
        common = record.settings_of_task(self.task, self.plan, self.config)
        rows = self.rows + record.other_rows(self.out, self.rows, common)
        results = {
            "command": self.config.command,
            "task": record.describe_task(self.task),
            "protocol": record.describe_protocol(self.plan, self.config, self.runtime, rows, model),
            "baselines": self.baseline_scores,
            "rows": rows,
        }
        if self.plan.published is not None:
            results["published"] = self.plan.published
        return results


def _with_costs(config: RunConfig, task: Task, out: Path, say: Callable[[str], None]) -> RunConfig:
    """The run with the costs of its student: rank 0 measures them, once for a folder."""
    if rank() == 0:
        path = budgets.measure(config, task, tasks.plain_student(task, config), out)
        say(f"the student is pruned by the costs of its layers in {path}")
    wait_for_all()
    return dataclasses.replace(config, costs=str(out / budgets.COSTS))


def _checked_plan(task: Task, config: RunConfig) -> Plan:
    """The plan. Raises FileNotFoundError or ValueError where a student cannot be pruned by its costs: now, not once the
    teacher is trained."""
    plan = tasks.plan_of(task, config)
    for network in plan.students:
        if network.costs is not None:
            CostTable.load(network.costs).check(network.make())
    return plan


def clear(out: Path) -> None:
    """Remove what runs write, and nothing else, from the folder."""
    for folder in out.glob("seed*"):
        if re.fullmatch(r"seed\d+", folder.name) and folder.is_dir():
            shutil.rmtree(folder)
    for name in (BASELINES, "results.json", "report.md", "report.html"):
        (out / name).unlink(missing_ok=True)
