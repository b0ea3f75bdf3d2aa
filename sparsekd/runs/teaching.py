"""What the students of a run learn from a teacher that is run once for all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import distributed, energy
from ..data import Rows, Task
from ..teacher_cache import TeacherCache
from .runtime import Runtime, rank
from .steps import TaughtBatch

MOST_BYTES = 1 << 30  # of memory for what a teacher says
_AT_ONCE = 512  # rows for which it is run


def in_fast_layout(teacher: nn.Module) -> nn.Module:
    """The same teacher, its weights in channels_last: they put the features into it, too, and a large batch takes two
    thirds of the time."""
    return teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def kept_teacher(
    teacher: nn.Module,
    task: Task,
    runtime: Runtime,
    say: Callable[[str], None],
    views: int = 0,
    seed: int = 0,
    path: Path | None = None,
) -> TeacherCache | None:
    """What the teacher says and sees of every train row; None where it has to be run in every step, because rows are
    drawn anew, or there are too many of them.

    views: of rows that are augmented, in how many fixed views of each it is run; 0: in every step.
    path: of a file that other processes read, too; None: in memory.
    """
    part, taps = task.train, getattr(teacher, "tap_names", ())
    if not isinstance(part, Rows) or (part.prepare is not None and not views):
        return None
    views = 1 if part.prepare is None else views
    with energy.EnergyMeter(runtime.device) as meter, runtime.autocast():
        options: dict[str, Any] = {"rows": len(part), "example_inputs": part.examples(2), "max_bytes": sys.maxsize}
        cache = TeacherCache(teacher, taps, views=views, path=path, **options)
        of_rows = f"{len(part)} rows" + (f" in {views} views" if views > 1 else "")
        if cache.num_bytes > MOST_BYTES:
            say(
                f"the teacher is run in every step: what it says of {of_rows} would take {cache.num_bytes / 1e6:.0f} MB"
            )
            return None
        for view in range(views):
            if cache.holds(torch.arange(len(part)), view):
                continue
            seen = _in_view(part, view, seed)
            for rows, (inputs, _) in seen.numbered(_AT_ONCE, None, rank(), distributed.num_ranks()):
                if len(rows):
                    cache.add(rows, inputs, view)
        cache.synchronize()
    say(
        f"the teacher has been run once on {of_rows} in {meter.reading.seconds:.1f} s for all its students; "
        f"what it says takes {cache.num_bytes / 1e6:.0f} MB"
    )
    return cache


def taught_batches(
    part: Rows,
    kept: TeacherCache,
    runtime: Runtime,
    batch_size: int,
    generator: torch.Generator,
    rank: int,
    ranks: int,
    *,
    seed: int = 0,
    epoch: int = 1,
) -> Iterator[TaughtBatch]:
    """The batches of an epoch, each with what the teacher says of it: in the view whose turn it is."""
    view = (epoch - 1) % kept.views
    for rows, (inputs, target) in _in_view(part, view, seed).numbered(batch_size, generator, rank, ranks):
        yield inputs, target, kept[rows, view].to(runtime.device)


def _in_view(part: Rows, view: int, seed: int) -> Rows:
    """The rows in one of the views that all students of a seed share."""
    if part.prepare is None:
        return part
    return part.in_view(torch.Generator().manual_seed(1_000_003 * seed + 500_009 + view))
