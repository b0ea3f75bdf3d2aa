"""Running totals over the channels of an open source, which windows subtract from each other.

A thread reads in between only where it must: power has to be integrated, and a counter that wraps has to be seen before
it wraps twice.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from .channel import Channel, CounterError, Machine, Source

POWER_PERIOD = 0.02  # seconds between two samples of power; sensors refresh every 20-100 ms (arXiv 2312.02741)
_WRAP_PERIOD = 10.0  # the smallest range seen, 65.5 kJ, takes 65 s at 1 kW
_MAX_WATTS = 10e3  # of one socket: a step back that would mean more power than this is a reset, not a wrap


@dataclass(frozen=True)
class Snapshot:
    """Totals at one moment: joules per device since the source was opened, None for a device that is lost."""

    joules: dict[str, float | None]
    samples: int


class _Total:
    """The joules one channel has moved since it was first read."""

    def __init__(self, channel: Channel, now: float) -> None:
        self.channel = channel
        self.joules = 0.0
        self.lost: str | None = None
        self._at = now
        self._last = channel.read()

    def update(self, now: float) -> None:
        """Read the channel; after a failure `joules` is None for the rest of this source's life."""
        if self.lost is not None:
            return
        try:
            value = self.channel.read()
            self.joules += self._step(value, now)
        except CounterError as error:
            self.lost = str(error)
            return
        self._last, self._at = value, now

    def _step(self, value: float, now: float) -> float:
        if self.channel.is_power:
            return 0.5 * (value + self._last) * (now - self._at)
        step = value - self._last
        if step >= 0:
            return step
        wrapped = step + (self.channel.wrap or 0.0)
        if 0 <= wrapped <= _MAX_WATTS * (now - self._at + 0.1):  # 0.1 s: a counter moves in ticks
            return wrapped
        raise CounterError(
            f"{self.channel.name}: the counter went from {self._last:.6g} J back to {value:.6g} J: the device or its "
            "driver was reset, or the machine slept; close the meter and measure again"
        )


class Totals:
    """All channels of one open source, read together, and the thread that reads them while a window is open."""

    def __init__(self, source: Source, machine: Machine) -> None:
        self.source = source
        self._machine = machine
        self._lock = threading.Lock()
        try:
            self._totals = [_Total(channel, machine.clock()) for channel in source.channels]
        except CounterError:
            source.close()
            raise
        self._samples = 0
        self._sampled_at = machine.clock()
        self._windows = 0
        self._longest_gap = 0.0
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None
        self.is_power = any(channel.is_power for channel in source.channels)

    def reasons(self) -> str:
        return "; ".join(total.lost for total in self._totals if total.lost is not None)

    @property
    def longest_gap(self) -> float:
        """Longest time between two samples since the thread was started, in seconds."""
        return self._longest_gap

    @property
    def windows(self) -> int:
        return self._windows

    def snapshot(self, *, windows: int = 0) -> Snapshot:
        """Read every channel now; `windows` is +1 where a window begins and -1 where it ends."""
        with self._lock:
            self._sample()
            if windows > 0 and self._windows == 0:
                self._start_thread()
            self._windows += windows
            stopped = self._stop_thread() if windows < 0 and self._windows == 0 else None
            joules = {t.channel.name: None if t.lost is not None else t.joules for t in self._totals}
            shot = Snapshot(joules, self._samples)
        if stopped is not None:
            stopped.join()
        return shot

    def close(self) -> None:
        """Close the source; windows still open end as unavailable, since a closed counter must not be read."""
        with self._lock:
            for total in self._totals:
                total.lost = total.lost or f"{total.channel.name}: the meter was closed inside the window"
            stopped = self._stop_thread()
            self.source.close()
        if stopped is not None:
            stopped.join()

    def _sample(self) -> None:
        now = self._machine.clock()
        if self._windows:
            self._longest_gap = max(self._longest_gap, now - self._sampled_at)
        for total in self._totals:
            # Power is the power of the moment it is read at; several devices are not read at the same moment.
            total.update(self._machine.clock())
        self._samples += 1
        self._sampled_at = now

    def _start_thread(self) -> None:
        self._longest_gap = 0.0
        period = POWER_PERIOD if self.is_power else _WRAP_PERIOD
        if not self.is_power and all(channel.wrap is None for channel in self.source.channels):
            return
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stop, period), daemon=True)
        self._thread.start()

    def _stop_thread(self) -> threading.Thread | None:
        if self._stop is not None:
            self._stop.set()
        stopped, self._stop, self._thread = self._thread, None, None
        return stopped

    def _run(self, stop: threading.Event, period: float) -> None:
        while not stop.wait(period):
            with self._lock:
                if not stop.is_set():
                    self._sample()
