"""Networks of a run that are trained at once, each in a process of its own with its share of the threads.

The convolutions of a small network leave a second thread waiting for half of its time: two students side by side, one
thread each, are ready sooner than one after the other with two. A process trains, and no more; the run then goes on
from the state files that it finds, as after a kill, scores, measures and writes. So what goes wrong in a process is met
again by the run, which says it as if it had trained alone.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint
from ..data import Task
from ..teacher_cache import TeacherCache
from . import record, tasks
from .config import RunConfig
from .epochs import fit
from .memory import keep_freed_memory
from .plans.network import Network, Plan
from .runtime import OutOfTime, Runtime
from .teaching import in_fast_layout, kept_teacher

__all__ = ["fitted", "teacher_of", "train"]


def fitted(
    network: Network,
    seed: int,
    task: Task,
    settings: dict[str, Any],
    runtime: Runtime,
    folder: Path,
    teacher: nn.Module | None,
    kept: Callable[[], TeacherCache | None],
) -> list[dict[str, Any]]:
    """Train a network from where its folder says; returns its epochs."""
    model = record.fresh(network, seed).to(runtime.device)
    cache = kept() if network.alpha or network.beta else None
    options: dict[str, Any] = {"folder": folder, "settings": settings, "runtime": runtime}
    return fit(model, task, network, teacher=teacher, kept=cache, seed=seed, **options)


def teacher_of(plan: Plan, seed: int, out: Path) -> nn.Module:
    """The teacher of a seed as it was trained, on the CPU."""
    path = out / f"seed{seed}" / plan.teacher.folder / plan.teacher.file(None)
    return in_fast_layout(checkpoint.load(record.fresh(plan.teacher, seed), path))


def train(
    config: RunConfig,
    networks: Sequence[Network],
    seed: int,
    out: Path,
    runtime: Runtime,
    cache: Path | None,
    say: Callable[[str], None],
) -> None:
    """Train those of ``networks`` that have no rows yet, ``config.jobs`` at once.

    cache: of what the teacher says, where it has been run; None where none of them learns from it.
    """
    places = {network.folder: out / f"seed{seed}" / network.folder for network in networks}
    waiting = [folder for folder, place in places.items() if not (place / record.ROWS).is_file()]
    if len(waiting) < 2:  # one alone has all threads
        return
    at_once = min(config.jobs, len(waiting), torch.get_num_threads())
    threads = max(1, torch.get_num_threads() // at_once)
    beside = dataclasses.replace(runtime, alone=False)
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit locks of torch's threads
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(at_once, spawn, _start, (config, seed, out, beside, threads, cache)) as pool:
        try:
            for folder, trained in [(folder, pool.submit(_train, folder)) for folder in waiting]:
                error = trained.exception()
                if isinstance(error, OutOfTime):
                    pool.shutdown(cancel_futures=True)  # what trains has its last epoch, too
                if isinstance(error, BrokenProcessPool):
                    say(f"the process that trained {folder} ended ({type(error).__name__}); its training goes on here")
                elif error is not None:
                    raise error
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


@dataclasses.dataclass
class _Work:
    """What a process knows of the run."""

    config: RunConfig
    task: Task
    plan: Plan
    seed: int
    out: Path
    runtime: Runtime
    teacher: nn.Module | None
    kept: TeacherCache | None


_work: _Work | None = None


def _start(config: RunConfig, seed: int, out: Path, runtime: Runtime, threads: int, cache: Path | None) -> None:
    """What a process does first."""
    global _work
    _end_with_parent()
    os.environ["TQDM_DISABLE"] = "1"  # several bars on one line
    torch.set_num_threads(threads)
    keep_freed_memory()
    task = tasks.entry_of(config.task).load(config)
    plan = tasks.plan_of(task, config)
    teacher = kept = None
    if cache is not None:
        teacher = teacher_of(plan, seed, out)
        kept = kept_teacher(teacher, task, runtime, lambda line: None, plan.views, seed, cache)
    _work = _Work(config, task, plan, seed, out, runtime, teacher, kept)


def _train(folder: str) -> None:
    work = _work
    assert work is not None
    network = next(network for network in work.plan.networks if network.folder == folder)
    settings = record.settings_of_network(network, work.seed, work.task, work.plan, work.config, work.runtime)
    path = work.out / f"seed{work.seed}" / folder
    fitted(network, work.seed, work.task, settings, work.runtime, path, work.teacher, lambda: work.kept)


def _end_with_parent() -> None:
    """Nobody waits for this process once the run has gone, by Ctrl-C or by a kill."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
