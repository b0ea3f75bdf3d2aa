"""What the students of a run learn from a teacher that is run once for all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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


def kept_teacher(teacher: nn.Module, task: Task, runtime: Runtime, say: Callable[[str], None]) -> TeacherCache | None:
    """What the teacher says and sees of every train row; None where it has to be run in every step, because rows are
    augmented or drawn anew, or there are too many of them."""
    part, taps = task.train, getattr(teacher, "tap_names", ())
    if not isinstance(part, Rows) or part.prepare is not None:
        return None
    with energy.EnergyMeter(runtime.device) as meter, runtime.autocast():
        options: dict[str, Any] = {"rows": len(part), "example_inputs": part.examples(2), "max_bytes": sys.maxsize}
        cache = TeacherCache(teacher, taps, **options)
        if cache.num_bytes > MOST_BYTES:
            say(
                f"the teacher is run in every step: what it says of {len(part)} rows would take "
                f"{cache.num_bytes / 1e6:.0f} MB"
            )
            return None
        for rows, (inputs, _) in part.numbered(_AT_ONCE, None, rank(), distributed.num_ranks()):
            if len(rows):
                cache.add(rows, inputs)
        cache.synchronize()
    say(
        f"the teacher has been run once on {len(part)} rows in {meter.reading.seconds:.1f} s for all its students; "
        f"what it says takes {cache.num_bytes / 1e6:.0f} MB"
    )
    return cache


def taught_batches(
    part: Rows, kept: TeacherCache, runtime: Runtime, batch_size: int, generator: torch.Generator, rank: int, ranks: int
) -> Iterator[TaughtBatch]:
    """The batches of an epoch, each with what the teacher says of it."""
    for rows, (inputs, target) in part.numbered(batch_size, generator, rank, ranks):
        yield inputs, target, kept[rows].to(runtime.device)
