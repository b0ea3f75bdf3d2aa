"""What a counter looks like to the meter, and the machine it is looked for on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .perf import perf_event_open


class CounterError(RuntimeError):
    """A counter cannot be read; the message says why and what to do about it."""


@dataclass(frozen=True)
class Channel:
    """One counter of one device.

    `read()` gives joules since any origin or, with `is_power`, the watts of this moment. It raises `CounterError`.
    `wrap` is the joules at which a counter starts again at 0. `tick` is the seconds between two updates of the
    counter where the hardware's manual gives them; None means that the meter measures them.
    """

    name: str
    read: Callable[[], float]
    is_power: bool = False
    wrap: float | None = None
    tick: float | None = None


@dataclass
class Source:
    """The channels that together make one reading, under one label."""

    label: str
    channels: list[Channel]
    tick: float = 0.0
    close: Callable[[], None] = lambda: None


def cuda_uuids() -> list[str] | None:
    """UUIDs of the GPUs in the order in which torch numbers them; None while torch has not started CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]


def synchronize_cuda() -> None:
    """Wait for every GPU this process has put work on. Idle GPUs are left alone: a wait would start a context there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    for i in range(torch.cuda.device_count()):
        if i == torch.cuda.current_device() or torch.cuda.memory_reserved(i):
            torch.cuda.synchronize(i)


@dataclass(frozen=True)
class Machine:
    """Where counters are looked for, and the clock. The defaults are this machine; tests hand in their own.

    `nvml` is a module with the functions of nvidia-ml-py (None imports it when a GPU is asked for). `clock` must be
    monotonic: wall-clock time steps when the date is set.
    """

    powercap: Path = Path("/sys/class/powercap")
    hwmon: Path = Path("/sys/class/hwmon")
    events: Path = Path("/sys/bus/event_source/devices")
    cpuinfo: Path = Path("/proc/cpuinfo")
    container_marks: tuple[Path, ...] = (Path("/.dockerenv"), Path("/run/.containerenv"))
    nvml: Any = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    perf_open: Callable[[int, int, int], int] = perf_event_open
    cuda_uuids: Callable[[], list[str] | None] = cuda_uuids
    synchronize: Callable[[], None] = synchronize_cuda
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
