"""The energy meter against Zeus, over one window of the same work.

    pip install zeus; python -m benchmarks.power.zeus_check

Zeus (https://ml.energy/zeus) reads the same counters with other code, so it is a check and no source: sparsekd.energy
neither needs nor imports it. Exit status: 0 both agree, 1 they do not, 2 there is nothing to compare.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from sparsekd.energy import EnergyMeter, Reading


def both(work: Callable[[], object], meter: EnergyMeter, monitor: Any) -> tuple[Reading, Any]:
    """Our Reading and Zeus's Measurement of one call of `work`; each library's window lies inside 1 ms of the other."""
    with meter.window() as window:
        monitor.begin_window("check")
        work()
        theirs = monitor.end_window("check")
    return window.reading, theirs


def rows(ours: Reading, theirs: Any) -> list[tuple[str, float, float]]:
    """(device, our joules, Zeus's): each GPU, or all packages with all dram."""
    if ours.joules is None:
        return []
    if ours.source.startswith("nvml"):
        pairs = [
            (name, joules, theirs.gpu_energy.get(int(name.removeprefix("cuda:"))))
            for name, joules in ours.per_device.items()
        ]
        return [(name, joules, other) for name, joules, other in pairs if joules is not None and other is not None]
    known = [*(theirs.cpu_energy or {}).values(), *(theirs.dram_energy or {}).values()]
    return [("cpu", ours.joules, sum(known))] if known else []


def verdict(ours: Reading, found: list[tuple[str, float, float]]) -> int:
    """Equal up to one update of the counter at either end of each window, and 1 %."""
    if not found:
        return 2
    allowed = 0.01 + 4 / max(ours.ticks, 1)
    return int(any(abs(joules - other) > allowed * other for _, joules, other in found))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="of work, longer where the counter needs it")
    args = parser.parse_args(argv)
    try:
        zeus = importlib.import_module("zeus.monitor")
    except ImportError as error:
        print(f"nothing to compare: import zeus.monitor failed with {error}; `pip install zeus`")
        return 2
    meter = EnergyMeter(args.device)
    seconds = max(args.seconds, meter.required_seconds)
    ours, theirs = both(lambda: _multiply(args.device, seconds), meter, zeus.ZeusMonitor())
    meter.close()
    found = rows(ours, theirs)
    for name, joules, other in found:
        print(f"{name:8} ours {joules:9.2f} J  Zeus {other:9.2f} J  ratio {joules / other:.4f}  ({ours.source})")
    if not found:
        print(f"nothing to compare: {ours.reason or 'Zeus has no counter of ' + args.device}")
    return verdict(ours, found)


def _multiply(device: str, seconds: float) -> None:
    a = torch.randn(1024, 1024, device=device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        (a @ a).sum().item()  # waits, so that the queue does not outlast the window


if __name__ == "__main__":
    sys.exit(main())
