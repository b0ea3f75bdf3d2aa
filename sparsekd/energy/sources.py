"""Which counter makes a reading: the first that can be read, in a fixed order, or the one asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .channel import Channel, CounterError, Machine, Source
from .linux import open_hwmon, open_perf, open_rapl
from .nvml import open_nvml

CUDA_LABELS = ("nvml-counter", "nvml-power-integral")
CPU_LABELS = ("rapl", "perf", "hwmon")
LABELS = (*CUDA_LABELS, *CPU_LABELS, "unavailable")

# A counter that has not moved for this long stands still: the slowest known, 1 s, would have moved twice.
_STANDSTILL_SECONDS = 2.5


@dataclass(frozen=True)
class SourceStatus:
    """Whether a source can be read here; `tick` is the seconds between two updates, `reason` why not and the fix."""

    source: str
    readable: bool
    devices: tuple[str, ...] = ()
    tick: float | None = None
    reason: str | None = None


def open_source(label: str, machine: Machine, devices: Sequence[str], domains: Sequence[str] | None) -> Source:
    """Open one source by its label and find its tick. Raises CounterError."""
    if label in CUDA_LABELS:
        source = open_nvml(machine, devices, integrate=label == "nvml-power-integral")
    else:
        source = {"rapl": open_rapl, "perf": open_perf, "hwmon": open_hwmon}[label](machine, domains)
    try:
        source.tick = max(_ticks(source.channels, machine))
    except BaseException:
        source.close()
        raise
    return source


def open_first(
    labels: Sequence[str], machine: Machine, devices: Sequence[str], domains: Sequence[str] | None
) -> Source:
    """Open the first source that can be read; the CounterError of none says why for each of them."""
    reasons: dict[str, list[str]] = {}
    for label in labels:
        try:
            return open_source(label, machine, devices, domains)
        except CounterError as error:
            reasons.setdefault(str(error), []).append(label)
    raise CounterError("; ".join(f"{', '.join(same)}: {reason}" for reason, same in reasons.items()))


def available_sources(machine: Machine | None = None, domains: Sequence[str] | None = None) -> list[SourceStatus]:
    """Try every source of this machine, with the reason and the fix for each that cannot be read.

    Takes up to a few seconds: the tick of each counter is measured.
    """
    found = []
    for label in LABELS[:-1]:
        try:
            source = open_source(label, machine or Machine(), ("cuda",), None if label in CUDA_LABELS else domains)
        except CounterError as error:
            found.append(SourceStatus(label, False, reason=str(error)))
        else:
            found.append(SourceStatus(label, True, tuple(c.name for c in source.channels), source.tick))
            source.close()
    return found


def _ticks(channels: list[Channel], machine: Machine) -> list[float]:
    """Seconds between two updates of each channel, seen by polling until every counter has moved four times.

    The first change only marks an edge; the three intervals after it are averaged. One read per known tick makes
    sure that the channel can be read at all.
    """
    changes: dict[int, list[float]] = {i: [] for i, channel in enumerate(channels) if channel.tick is None}
    last = [channel.read() for channel in channels]
    begin = machine.clock()
    while any(len(times) < 4 for times in changes.values()) and machine.clock() - begin < _STANDSTILL_SECONDS:
        machine.sleep(max(0.0005, 0.01 * (machine.clock() - begin)))  # a slow counter is not asked a thousand times
        for i, times in changes.items():
            value = channels[i].read()
            if value != last[i]:
                last[i] = value
                times.append(machine.clock())
    for i, times in changes.items():
        if not times:
            raise CounterError(
                f"{channels[i].name}: the counter stands still (no change in {_STANDSTILL_SECONDS} s), so it counts "
                "nothing here; leave it out with EnergyMeter(domains=[...]) or measure on another machine"
            )
    known = [channel.tick for channel in channels if channel.tick is not None]
    return known + [
        (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else _STANDSTILL_SECONDS
        for times in changes.values()
    ]


def parse_devices(device: object) -> tuple[str, ...]:
    """Names of the devices to measure, from "cpu", "cuda", "cuda:1", a torch.device or a list of cuda ones.

    Raises ValueError for anything else.
    """
    items = list(device) if isinstance(device, (list, tuple)) else [device]
    names = tuple(str(item) for item in items)
    is_cpu = names in (("cpu",), ("cpu:0",))
    if is_cpu or (names and all(re.fullmatch(r"cuda(:\d+)?", name) for name in names)):
        return ("cpu",) if is_cpu else names
    raise ValueError(
        f"EnergyMeter: device must be 'cpu', 'cuda', 'cuda:<n>' or a list of cuda devices, got {device!r}; to measure "
        "both, open one meter inside the other"
    )
