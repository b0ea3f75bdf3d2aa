"""The one timer of the package: functions take turns, so that a busy moment and a drift of the clock meet all of them.

    us = {name: 1e6 * seconds for name, seconds in timing.medians({"dense": dense, "sparse": sparse}, 0.1).items()}

On the CPU a sample is a loop between two readings of a clock. On a GPU it is a queue of calls between two events of the
stream: the device sleeps until all of them are queued, so that it is never Python that is timed.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")
Call = Callable[[], object]

LEAST_ROUNDS, MOST_ROUNDS = 5, 300
LOOP_SECONDS = 50e-6  # a sample of a faster call is a loop of at most
MOST_CALLS = 100  # calls
QUEUE_SECONDS = 200e-6  # of work between two events, in at most
MOST_QUEUED = 20  # calls, and at least two
MOST_QUEUED_ROUNDS = 15
SLEEP_CYCLES = 200_000  # of the device, about 0.1 ms; doubled until the host is ahead
MOST_SLEEP_CYCLES = SLEEP_CYCLES * 2**9


def medians(
    calls: Mapping[Name, Call], seconds: float, *, rounds: int | None = None, device: torch.device | None = None
) -> dict[Name, float]:
    """Median seconds of one call of each."""
    taken = samples(calls, seconds, rounds=rounds, device=device)
    return {name: statistics.median(column) for name, column in taken.items()}


def samples(
    calls: Mapping[Name, Call],
    seconds: float,
    *,
    rounds: int | None = None,
    clock: Callable[[], float] | None = None,
    device: torch.device | None = None,
) -> dict[Name, list[float]]:
    """Seconds of one call of each, sampled in turns.

    Args:
        calls: name -> function without arguments; each is called twice before the first sample.
        seconds: the time to spend on all, about.
        rounds: so many samples of each, whose loops are long enough for ``seconds`` in all; None: loops of 50 us for
            as long as ``seconds``, at least 5 rounds; of queues on a GPU at most 15.
        clock: of the CPU, default ``time.perf_counter``; ``time.thread_time`` leaves out what other processes took, and
            is right for single-threaded calls only.
        device: a CUDA device times by its own events on its current stream.
    """
    if device is not None and device.type == "cuda":
        return _queued(calls, seconds, rounds, device)
    clock = clock or time.perf_counter
    began = clock()
    loops = {}
    for name, call in calls.items():
        call()
        once = max(timed(call, 1, clock), 1e-9)
        if rounds is None:
            loops[name] = max(1, min(MOST_CALLS, int(LOOP_SECONDS / once)))
        else:
            loops[name] = max(1, round(seconds / len(calls) / rounds / max(once, 1e-7)))
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in in_turns(calls, rounds or MOST_ROUNDS):
        if rounds is None and min(map(len, taken.values()), default=0) >= LEAST_ROUNDS and clock() - began > seconds:
            break
        for name in turn:
            taken[name].append(timed(calls[name], loops[name], clock))
    return taken


def in_turns(names: Iterable[Name], rounds: int) -> Iterator[Sequence[Name]]:
    """The names for each round, every other one in reverse: what comes first is not always the same."""
    ordered = list(names)
    for turn in range(rounds):
        yield ordered[::-1] if turn % 2 else ordered


def timed(
    call: Call, calls: int, clock: Callable[[], float] = time.perf_counter, synchronize: Call = lambda: None
) -> float:
    """Seconds of one call, of so many in a row."""
    synchronize()
    began = clock()
    for _ in range(calls):
        call()
    synchronize()
    return (clock() - began) / calls


def _queued(
    calls: Mapping[Name, Call], seconds: float, rounds: int | None, device: torch.device
) -> dict[Name, list[float]]:
    with torch.cuda.device(device):
        queue = _Queue()
        for call in calls.values():  # compiles, allocates, searches
            for _ in range(3):
                call()
        once = {name: max(queue.sample(name, call, 2), 1e-7) for name, call in calls.items()}
        loops = {name: max(2, min(MOST_QUEUED, int(QUEUE_SECONDS / one))) for name, one in once.items()}
        turn = sum(once[name] * loops[name] for name in calls)
        rounds = rounds or max(LEAST_ROUNDS, min(MOST_QUEUED_ROUNDS, int(seconds / max(turn, 1e-7))))
        taken: dict[Name, list[float]] = {name: [] for name in calls}
        for names in in_turns(calls, rounds):
            for name in names:
                taken[name].append(queue.sample(name, calls[name], loops[name]))
    return taken


class _Queue:
    """Samples on the current stream, and how long it has to sleep for the host to be ahead of each call."""

    def __init__(self) -> None:
        self._cycles: dict[Any, int] = {}

    def sample(self, name: Any, call: Call, calls: int) -> float:
        """Device seconds of one call, of so many queued behind a sleep."""
        while True:
            cycles = self._cycles.setdefault(name, SLEEP_CYCLES)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            ahead = not begin.query()  # the device still sleeps, and everything is queued
            end.synchronize()
            if ahead or cycles >= MOST_SLEEP_CYCLES:
                break
            self._cycles[name] = 2 * cycles
        if not ahead:
            warnings.warn(
                f"sparsekd.timing: {name} waits for the device itself, so its time has Python in it", stacklevel=2
            )
        return begin.elapsed_time(end) * 1e-3 / calls
