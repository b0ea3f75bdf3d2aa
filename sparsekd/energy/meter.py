"""EnergyMeter: windows of time over a counter, and the reading of each.

A window is the difference of two readings of running totals (`totals.py`), so windows may nest, overlap and live in
several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from .channel import CounterError, Machine
from .sources import CPU_LABELS, CUDA_LABELS, open_first, parse_devices
from .totals import POWER_PERIOD, Snapshot, Totals

# A gap this many ticks long between two samples of power (a busy interpreter) is said in the reading.
_GAP_TICKS = 10


@dataclass(frozen=True)
class Reading:
    """What one window measured.

    joules           energy of all devices, None exactly when source is "unavailable"
    seconds          length of the window by a monotonic clock
    watts            joules / seconds, None with joules
    source           nvml-counter, nvml-power-integral, rapl, perf, hwmon or unavailable
    ticks            updates of the slowest counter (samples of power) that fit in the window: an error of about 1/ticks
    idle_subtracted  joules of idling that were taken off; None when joules is the gross energy
    per_device       joules of each device, None for one that was lost
    reason           why source is "unavailable", and the fix; None otherwise
    warning          what makes the figure doubtful, and the window length needed; None otherwise
    """

    joules: float | None
    seconds: float
    watts: float | None
    source: str
    ticks: int
    idle_subtracted: float | None
    per_device: dict[str, float | None]
    reason: str | None = None
    warning: str | None = None


class Window:
    """One window of a meter, used as a context manager; `reading` is there once it has ended."""

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter = meter
        self._reading: Reading | None = None

    @property
    def reading(self) -> Reading:
        """The finished window's Reading. Raises RuntimeError while the window is open."""
        if self._reading is None:
            raise RuntimeError("Window.reading: the window has not ended yet; read it after the with block")
        return self._reading

    def __enter__(self) -> Window:
        self._totals, self._reason = self._meter._opened()
        self._idle_watts = self._meter._idle_watts
        self._meter._machine.synchronize()
        self._begin = self._totals.snapshot(windows=1) if self._totals else None
        self._began_at = self._meter._machine.clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:  # after an error the GPU may never answer, and its error would hide the first
            self._meter._machine.synchronize()
        seconds = self._meter._machine.clock() - self._began_at
        if self._totals is None or self._begin is None:
            self._reading = _unavailable(seconds, {}, self._reason)
            return
        end = self._totals.snapshot(windows=-1)
        self._reading = _reading(self._totals, self._begin, end, seconds, self._idle_watts, self._meter.min_ticks)


class EnergyMeter:
    """Measure the energy of a block of code::

        with EnergyMeter("cpu") as meter:
            work()
        meter.reading.joules      # None where there is no counter; meter.reading.reason says why

    Args:
        device: "cpu", "cuda" (every GPU this process sees), "cuda:1", a torch.device or a list of cuda devices. None is
            "cuda" once torch has started CUDA in this process, else "cpu". For both, nest two meters.
        source: a label of `LABELS` to insist on; "auto" takes the first that can be read.
        domains: fnmatch patterns of the CPU channels to add up, e.g. ``["package-*"]`` to leave dram out.
        idle_seconds: measure the idle power for so long when the meter opens, and subtract it. Open it when all is
            loaded: a GPU with a CUDA context idles higher than one without.
        min_ticks: fewer counter updates than this in a window give a warning; none at all, no joules.

    `with meter` is one window; `meter.window()` gives more on the same open counter, nested or in other threads. GPU
    work is waited for at both ends. A counter that cannot be read raises nothing: the reading says so. Raises
    ValueError for arguments out of range.
    """

    def __init__(
        self,
        device: object = None,
        *,
        source: str = "auto",
        domains: Sequence[str] | None = None,
        idle_seconds: float = 0.0,
        min_ticks: int = 50,
        machine: Machine | None = None,
    ) -> None:
        self._machine = machine or Machine()
        if device is None:
            device = "cpu" if self._machine.cuda_uuids() is None else "cuda"
        self._devices = parse_devices(device)
        labels = CPU_LABELS if self._devices == ("cpu",) else CUDA_LABELS
        if source not in ("auto", *labels):
            raise ValueError(
                f"EnergyMeter: source for {', '.join(self._devices)} must be auto or one of {', '.join(labels)}, "
                f"got {source!r}"
            )
        if not 0 <= idle_seconds < float("inf") or min_ticks < 1:
            raise ValueError(
                "EnergyMeter: idle_seconds must be finite and >= 0 and min_ticks >= 1, got "
                f"idle_seconds={idle_seconds}, min_ticks={min_ticks}"
            )
        self.min_ticks = min_ticks
        self._labels = labels if source == "auto" else (source,)
        self._domains = domains
        self._idle_seconds = idle_seconds
        self._idle_watts: dict[str, float] | None = None
        self._totals: Totals | None = None
        self._reason: str | None = None
        self._lock = threading.RLock()
        self._stack: list[Window] = []
        self._last: Window | None = None

    def __enter__(self) -> EnergyMeter:
        window = self.window()
        window.__enter__()
        self._stack.append(window)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._last = self._stack.pop()
        try:
            self._last.__exit__(kind, error, tb)
        finally:
            if not self._stack:
                self.close()

    @property
    def reading(self) -> Reading:
        """Reading of the `with` block that ended last. Raises RuntimeError before the first has ended."""
        if self._last is None:
            raise RuntimeError("EnergyMeter.reading: no window has ended yet; read it after the with block")
        return self._last.reading

    @property
    def source(self) -> str:
        """Label of the counter in use; opens it."""
        totals, _ = self._opened()
        return totals.source.label if totals else "unavailable"

    @property
    def required_seconds(self) -> float:
        """Shortest window with min_ticks counter updates; 0 where there is no counter. Opens the counter."""
        totals, _ = self._opened()
        return self.min_ticks * totals.source.tick if totals else 0.0

    def window(self) -> Window:
        """A new window: `with meter.window() as window: ...`, then `window.reading`. `close` the meter in the end."""
        return Window(self)

    def measure_idle(self, seconds: float) -> Reading:
        """Do nothing for `seconds` (longer where the counter needs it); later windows have this power subtracted.

        Raises RuntimeError while a window is open, since that would not be idling.
        """
        with self._lock:
            totals, reason = self._opened()
            if totals is None:
                return _unavailable(0.0, {}, reason)
            return self._baseline(totals, seconds)

    def close(self) -> None:
        """Let go of the counter; a later window opens it again, and measures the idle power again."""
        with self._lock:
            totals, self._totals, self._reason, self._idle_watts = self._totals, None, None, None
        if totals is not None:
            totals.close()

    def _opened(self) -> tuple[Totals | None, str | None]:
        """The open counter or the reason why there is none; tried once until the meter is closed."""
        with self._lock:
            if self._totals is None and self._reason is None:
                try:
                    source = open_first(self._labels, self._machine, self._devices, self._domains)
                    self._totals = Totals(source, self._machine)
                    self._open_baseline(self._totals)
                except CounterError as error:
                    self._reason = str(error)
            return self._totals, self._reason

    def _open_baseline(self, totals: Totals) -> None:
        if not self._idle_seconds:
            return
        idle = self._baseline(totals, self._idle_seconds)
        if idle.joules is None:  # gross joules must not pass for net ones
            self.close()
            raise CounterError(f"the idle power could not be measured: {idle.reason}")

    def _baseline(self, totals: Totals, seconds: float) -> Reading:
        if totals.windows:
            raise RuntimeError("EnergyMeter.measure_idle: a window of this meter is open; measure idling before it")
        seconds = max(seconds, self.min_ticks * totals.source.tick)
        self._machine.synchronize()
        begin = totals.snapshot(windows=1)
        began_at = self._machine.clock()
        self._machine.sleep(seconds)
        seconds = self._machine.clock() - began_at
        reading = _reading(totals, begin, totals.snapshot(windows=-1), seconds, None, self.min_ticks)
        if reading.joules is not None:
            self._idle_watts = {name: (joules or 0.0) / seconds for name, joules in reading.per_device.items()}
        return reading


def _unavailable(seconds: float, per_device: dict[str, float | None], reason: str | None) -> Reading:
    return Reading(None, seconds, None, "unavailable", 0, None, per_device, reason or "no counter")


def _reading(
    totals: Totals,
    begin: Snapshot,
    end: Snapshot,
    seconds: float,
    idle_watts: dict[str, float] | None,
    min_ticks: int,
) -> Reading:
    """The difference of two snapshots, or why it is no measurement."""
    tick = totals.source.tick
    ticks = int(seconds / tick * (1 + 1e-9))  # a window of exactly n ticks has n
    if totals.is_power:
        ticks = min(ticks, end.samples - begin.samples)
    needed = f"a window of at least {min_ticks * tick:.3g} s is needed"
    gross: dict[str, float] = {}
    for name, last in end.joules.items():
        first = begin.joules[name]
        if last is not None and first is not None:
            gross[name] = last - first
    # Nothing that is switched on uses nothing: 0 J is a counter that was not updated, not a measurement.
    known: dict[str, float | None] = {name: gross.get(name) or None for name in end.joules}
    if len(gross) < len(known):
        return _unavailable(seconds, known, totals.reasons())
    if ticks < 1 or None in known.values():
        still = ", ".join(name for name, joules in known.items() if joules is None)
        why = f"{still} did not move" if still else "the counter cannot resolve it"
        return _unavailable(seconds, known, f"window of {seconds:.3g} s, counter tick {tick:.3g} s: {why}; {needed}")
    warnings = []
    if ticks < min_ticks:
        warnings.append(f"only {ticks} counter updates ({tick:.3g} s each) in {seconds:.3g} s; {needed}")
    if totals.is_power and totals.longest_gap > _GAP_TICKS * max(tick, POWER_PERIOD):
        warnings.append(f"{totals.longest_gap:.3g} s between two samples of power since the outermost window began")
    idle = {name: watts * seconds for name, watts in idle_watts.items()} if idle_watts else {}
    net: dict[str, float | None] = {name: joules - idle.get(name, 0.0) for name, joules in gross.items()}
    joules = sum(gross.values()) - sum(idle.values())
    return Reading(
        joules=joules,
        seconds=seconds,
        watts=joules / seconds,
        source=totals.source.label,
        ticks=ticks,
        idle_subtracted=sum(idle.values()) if idle_watts else None,
        per_device=net,
        warning="; ".join(warnings) or None,
    )
