"""Ours beside its peers by the package's timer (`sparsekd.timing`), and what machine the figures belong to."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from sparsekd import _C, processor, timing


def compare(
    ours: Callable[[], object],
    peers: Mapping[str, Callable[[], object]],
    seconds: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Median microseconds of all, and the median and quartiles of the fastest peer / ours over neighbouring samples."""
    taken = timing.samples({"ours": ours, **peers}, seconds, rounds=15, clock=clock)
    our_samples = taken.pop("ours")
    us = {name: statistics.median(sample) * 1e6 for name, sample in taken.items()}
    best = min(us, key=lambda name: us[name])
    ratios = [b / a for a, b in zip(our_samples, taken[best], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "us": statistics.median(our_samples) * 1e6,
        "dense_us": us.pop(best),
        **{f"{name}_us": time for name, time in us.items()},
        "peer": best,
        "speedup": middle,
        "speedup_low": low,
        "speedup_high": high,
    }


def busy_seconds() -> tuple[float, float]:
    """Of all processors and of this process alone, since they began. Linux only."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]  # waiting for a disk is idle too
    own = os.times()
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), own.user + own.system


class Elsewhere:
    """What other processes took meanwhile, as a share of all processors.

    with Elsewhere() as elsewhere: ...
    """

    def __enter__(self) -> Elsewhere:
        self.began, self.busy = time.perf_counter(), busy_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        seconds, busy = time.perf_counter() - self.began, busy_seconds()
        others = (busy[0] - self.busy[0]) - (busy[1] - self.busy[1])
        self.share = max(0.0, others / seconds / (os.cpu_count() or 1))


def bandwidth(megabytes: int = 256) -> float:
    """GB/s, read and written, of torch copying a tensor that fits no cache."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    taken = timing.samples({"copy": lambda: target.copy_(source)}, 0.2, rounds=5)
    return 2 * source.numel() * 4 / min(taken["copy"]) * 1e-9


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": f"{processor.name()} ({processor.generation()})",
        "isa": _C.isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": Path(_C.openmp().split(" ")[0]).name,
        "fma_peak_gflops": round(_C.peak_gflops(torch.get_num_threads(), 0.2), 1),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(
    path: str | Path, command: str, rows: list[dict[str, Any]], taken_on: dict[str, Any] | None = None
) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "machine": taken_on or machine(), "rows": rows}, indent=1) + "\n")
