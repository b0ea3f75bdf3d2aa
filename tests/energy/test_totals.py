"""The arithmetic below windows: wraps, integrals, and the thread that watches both."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.energy import Machine
from sparsekd.energy import totals as totals_module
from sparsekd.energy.channel import Channel, Source
from sparsekd.energy.totals import Totals

from .hardware import Board, make_machine


def test_two_wraps_are_seen_by_the_thread(monkeypatch):
    monkeypatch.setattr(totals_module, "_WRAP_PERIOD", 0.01)
    begin = time.perf_counter()
    watts, wrap = 100.0, 25.0  # wraps every 0.25 s
    channel = Channel("package-0", lambda: watts * (time.perf_counter() - begin) % wrap, wrap=wrap)
    threads = threading.active_count()
    totals = Totals(Source("rapl", [channel], tick=1e-3), Machine())
    first, began_at = totals.snapshot(windows=1), time.perf_counter()
    time.sleep(0.8)
    last, seconds = totals.snapshot(windows=-1), time.perf_counter() - began_at
    assert last.joules["package-0"] - first.joules["package-0"] == pytest.approx(watts * seconds, abs=2.0)
    assert threading.active_count() == threads


@given(
    st.floats(10.0, 1e5),
    st.lists(st.tuples(st.floats(0.0, 0.999), st.sampled_from(["", "begin", "end"])), min_size=1, max_size=40),
)
def test_windows_over_a_wrapping_counter_add_up(wrap, moves):
    """Any nesting of windows: each holds exactly the joules moved between its two ends, wraps included."""
    moved = [0.0]
    board = Board()
    channel = Channel("package-0", lambda: moved[0] % wrap, wrap=wrap)
    totals = Totals(Source("rapl", [channel], tick=1e-3), make_machine(board))
    open_windows, done = [], []
    for share, event in moves:
        moved[0] += share * wrap
        board.advance(1e4)
        if event == "begin":
            open_windows.append((totals.snapshot(), moved[0]))
        elif event == "end" and open_windows:
            begin, at = open_windows.pop()
            done.append((totals.snapshot().joules["package-0"] - begin.joules["package-0"], moved[0] - at))
        else:
            totals.snapshot()
    for measured, true in done:
        assert measured == pytest.approx(true, abs=1e-9 * wrap * len(moves))
        assert measured >= 0


@given(st.lists(st.tuples(st.floats(1e-3, 100.0), st.floats(1.0, 1e3)), min_size=1, max_size=30))
def test_the_power_integral_is_the_trapezoid(samples):
    board = Board()
    watts = [samples[0][1]]
    totals = Totals(Source("hwmon", [Channel("rail", lambda: watts[0], is_power=True)], tick=0.1), make_machine(board))
    begin, expected = totals.snapshot(), 0.0
    for seconds, level in samples:
        board.advance(seconds)
        expected += 0.5 * (watts[0] + level) * seconds
        watts[0] = level
        end = totals.snapshot()
    assert end.joules["rail"] - begin.joules["rail"] == pytest.approx(expected)
    assert end.samples - begin.samples == len(samples)
