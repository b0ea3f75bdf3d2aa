"""Joules, seconds and watts of a piece of work, each with the counter it came from.

    with EnergyMeter() as meter:
        work()
    print(meter.reading)

The "66.67 % less GPU power" of arXiv 2401.10484 is 75 W for 40 minutes against 75 W for 120: the same power for a third
of the time, so what fell is the energy (50 Wh from 150 Wh). Hence joules, seconds and watts are three figures here.

`sources` finds the counters of the machine (`nvml` and `linux` know how to read them), `meter` turns a counter into
windows, `protocol` repeats windows until a figure can be trusted. A machine without a readable counter gives
`joules=None`, never 0 and never an estimate.
"""

from __future__ import annotations

from .channel import Machine
from .meter import EnergyMeter, Reading, Window
from .protocol import Comparison, Interval, Measurement, compare, measure, median_interval
from .sources import LABELS, SourceStatus, available_sources

__all__ = [
    "LABELS",
    "Comparison",
    "EnergyMeter",
    "Interval",
    "Machine",
    "Measurement",
    "Reading",
    "SourceStatus",
    "Window",
    "available_sources",
    "compare",
    "measure",
    "median_interval",
]
