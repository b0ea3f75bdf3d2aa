"""Seconds and joules per call that can be compared: warm-up, interleaved windows, medians, an interval for each ratio.

Windows of A and B alternate (A B, B A, A B, ...), so that drift of clock and temperature meets both alike, and the
ratio is taken inside each round. The interval of its median is read off the order statistics: it assumes no
distribution, needs no resampling, and says the coverage it really has (H. A. David, H. N. Nagaraja, Order Statistics,
section 7.1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass

from ..timing import in_turns, timed
from .channel import Machine
from .meter import EnergyMeter, Reading

_SETTLED = 0.05  # two passes of warm-up whose seconds per call differ by less are warm
_PATIENCE = 5  # warm-up may take so many times the seconds asked for


@dataclass(frozen=True)
class Interval:
    """A median with the interval that covers the true one with probability `confidence`."""

    value: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Measurement:
    """One function: medians over its windows, and the windows.

    joules_per_call and watts are None unless every window had a counter (`reason` says why). `round_seconds` and
    `round_joules` are the same figures per window, `ticks` the fewest counter updates of any window, `idle_subtracted`
    as in `Reading`, the median per call. `warning` joins what the windows and the warm-up said.
    """

    seconds_per_call: float
    joules_per_call: float | None
    watts: float | None
    source: str
    calls: int
    ticks: int
    idle_subtracted: float | None
    round_seconds: tuple[float, ...]
    round_joules: tuple[float, ...] | None
    reason: str | None = None
    warning: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Several functions measured in turns. Ratios are function / baseline: below 1 is faster, or less energy."""

    baseline: str
    measurements: dict[str, Measurement]
    seconds_ratio: dict[str, Interval]
    joules_ratio: dict[str, Interval | None]


def measure(
    fn: Callable[[], object],
    *,
    seconds: float = 1.0,
    warmup: float = 1.0,
    rounds: int = 5,
    cooldown: float = 0.0,
    device: object = None,
    meter: EnergyMeter | None = None,
    machine: Machine | None = None,
) -> Measurement:
    """Seconds per call of `fn` always, joules per call where there is a counter. Arguments as in `compare`."""
    found = compare(
        {"fn": fn},
        seconds=seconds,
        warmup=warmup,
        rounds=rounds,
        cooldown=cooldown,
        device=device,
        meter=meter,
        machine=machine,
    )
    return found.measurements["fn"]


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    warmup: float = 1.0,
    rounds: int = 7,
    cooldown: float = 0.0,
    confidence: float = 0.95,
    device: object = None,
    meter: EnergyMeter | None = None,
    machine: Machine | None = None,
) -> Comparison:
    """Measure functions against each other; the first is the baseline.

        compare({"dense": dense_step, "sparse": sparse_step}).seconds_ratio["sparse"]

    Each function is called without arguments, many times in a row; an inference and a training step both do.

    seconds     length of one window; made longer where the counter needs it for `meter.min_ticks` updates
    warmup      at least so many seconds for each function, then on until the seconds per call have settled
    rounds      windows per function. A 95 % interval needs 6; fewer give the range, with the coverage it has
    cooldown    idle seconds before each window, to start every window at the same temperature
    device      as in `EnergyMeter`; `meter` replaces the one made here (by one with idle_seconds, say) and is left open

    Raises ValueError for arguments out of range. What `fn` raises passes through.
    """
    if not functions or rounds < 1 or not 0 < confidence < 1:
        raise ValueError(
            "sparsekd.energy.compare: expected at least one function, rounds >= 1 and 0 < confidence < 1, got "
            f"{len(functions)} functions, rounds={rounds}, confidence={confidence}"
        )
    if not (0 < seconds < math.inf and 0 <= warmup < math.inf and 0 <= cooldown < math.inf):
        raise ValueError(
            "sparsekd.energy.compare: expected finite seconds > 0, warmup >= 0 and cooldown >= 0, got "
            f"seconds={seconds}, warmup={warmup}, cooldown={cooldown}"
        )
    machine = machine or Machine()
    with nullcontext(meter) if meter is not None else closing(EnergyMeter(device, machine=machine)) as used:
        length = max(seconds, 1.05 * used.required_seconds)  # 5 % for a call that is faster than in the warm-up
        per_call, settled = _warm_up(functions, warmup, machine)
        calls = {name: max(1, math.ceil(length / per_call[name])) for name in functions}
        readings = _interleaved(functions, calls, used, rounds, lambda: machine.sleep(cooldown) if cooldown else None)
    measurements = {name: _summary(readings[name], calls[name], settled[name]) for name in functions}
    baseline, *others = functions
    return Comparison(
        baseline,
        measurements,
        {
            name: _ratio(measurements[name].round_seconds, measurements[baseline].round_seconds, confidence)
            for name in others
        },
        {name: _joules_ratio(measurements[name], measurements[baseline], confidence) for name in others},
    )


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Median of independent values and the narrowest pair of order statistics that covers it with `confidence`.

    (x_(k), x_(n+1-k)) covers the median with probability 1 - 2 P[Binomial(n, 1/2) < k]. With n < 6 no pair reaches
    95 %: the range is returned with the coverage that it has. Raises ValueError without values.
    """
    ordered = sorted(values)
    n = len(ordered)
    if n == 0:
        raise ValueError("sparsekd.energy.median_interval: expected at least one value, got none")
    k, below, coverage = 1, 0.5**n, 1 - 2 * 0.5**n
    while k + 1 <= n // 2:
        below += math.comb(n, k) * 0.5**n
        if 1 - 2 * below < confidence:
            break
        k, coverage = k + 1, 1 - 2 * below
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[n - k], max(coverage, 0.0))


def _warm_up(
    functions: Mapping[str, Callable[[], object]], seconds: float, machine: Machine
) -> tuple[dict[str, float], dict[str, bool]]:
    """Run all functions in turns until their seconds per call settle: (seconds per call, whether it settled)."""

    def seconds_of(fn: Callable[[], object], calls: int) -> float:
        return max(timed(fn, calls, machine.clock, machine.synchronize), 1e-9)

    per_call = {name: seconds_of(fn, 1) for name, fn in functions.items()}  # compiles, allocates
    began_at = machine.clock()
    while True:
        before = dict(per_call)
        for name, fn in functions.items():
            per_call[name] = seconds_of(fn, max(1, math.ceil(0.25 * seconds / per_call[name])))
        settled = {name: abs(per_call[name] - before[name]) <= _SETTLED * before[name] for name in functions}
        elapsed, wanted = machine.clock() - began_at, seconds * len(functions)
        if elapsed >= wanted and (all(settled.values()) or elapsed >= _PATIENCE * wanted):
            return per_call, settled


def _interleaved(
    functions: Mapping[str, Callable[[], object]],
    calls: Mapping[str, int],
    meter: EnergyMeter,
    rounds: int,
    cool: Callable[[], None],
) -> dict[str, list[Reading]]:
    """One window of every function per round, every other round in reverse order."""
    readings: dict[str, list[Reading]] = {name: [] for name in functions}
    for turn in in_turns(functions, rounds):
        for name in turn:
            cool()
            fn = functions[name]
            with meter.window() as window:
                for _ in range(calls[name]):
                    fn()
            readings[name].append(window.reading)
    return readings


def _summary(readings: Sequence[Reading], calls: int, settled: bool) -> Measurement:
    unread = next((reading for reading in readings if reading.joules is None), None)
    seconds = tuple(reading.seconds / calls for reading in readings)
    joules = None if unread else tuple(reading.joules / calls for reading in readings if reading.joules is not None)
    idle = [reading.idle_subtracted / calls for reading in readings if reading.idle_subtracted is not None]
    warnings = [] if settled else ["the seconds per call did not settle in the warm-up"]
    warnings += dict.fromkeys(reading.warning for reading in readings if reading.warning)
    return Measurement(
        seconds_per_call=statistics.median(seconds),
        joules_per_call=statistics.median(joules) if joules else None,
        watts=None if unread else statistics.median(r.watts for r in readings if r.watts is not None),
        source=unread.source if unread else readings[0].source,
        calls=calls,
        ticks=min(reading.ticks for reading in readings),
        idle_subtracted=statistics.median(idle) if idle and not unread else None,
        round_seconds=seconds,
        round_joules=joules,
        reason=unread.reason if unread else None,
        warning="; ".join(warnings) or None,
    )


def _ratio(values: Sequence[float], baseline: Sequence[float], confidence: float) -> Interval:
    return median_interval([value / base for value, base in zip(values, baseline, strict=True)], confidence)


def _joules_ratio(measurement: Measurement, baseline: Measurement, confidence: float) -> Interval | None:
    """None without a counter, and where subtracting the idle power leaves nothing to divide by."""
    ours, base = measurement.round_joules, baseline.round_joules
    if ours is None or base is None or min(base) <= 0:
        return None
    return _ratio(ours, base, confidence)
