"""Windows over counters, and what a reading says."""

import dataclasses
import itertools
import json
import math
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.energy import LABELS, EnergyMeter, Machine, Reading

from .hardware import (
    JETSON,
    ONE_SOCKET,
    Board,
    FakeNVML,
    Powercap,
    assert_unavailable,
    gpu_meter,
    make_hwmon,
    make_machine,
)


def test_a_reading_is_seven_figures_and_what_qualifies_them():
    names = [field.name for field in dataclasses.fields(Reading)]
    assert names[:7] == ["joules", "seconds", "watts", "source", "ticks", "idle_subtracted", "per_device"]
    assert Reading(6.0, 2.0, 3.0, "rapl", 100, None, {"package-0": 6.0}).reason is None
    assert LABELS == ("nvml-counter", "nvml-power-integral", "rapl", "perf", "hwmon", "unavailable")


def test_too_short_a_window_is_refused_with_the_length_needed(board):
    meter = gpu_meter(board, FakeNVML(board, tick=0.1))
    assert meter.required_seconds == pytest.approx(5.0, rel=0.02)
    with meter.window() as window:
        board.advance(0.05, watts=500.0)
    assert_unavailable(window.reading, "did not move", "5 s is needed")
    with meter.window() as window:
        board.advance(1.0, watts=500.0)
    assert window.reading.joules == pytest.approx(500.0, rel=0.1) and window.reading.ticks in (9, 10)
    assert "5 s is needed" in window.reading.warning
    with meter.window() as window:
        board.advance(6.0, watts=500.0)
    assert window.reading.warning is None
    meter.close()


def test_a_window_that_holds_an_edge_but_no_tick_is_refused(board):
    meter = gpu_meter(board, FakeNVML(board, tick=0.1))
    assert meter.source == "nvml-counter"
    board.advance(math.ceil(board.clock() * 10) / 10 - board.clock() - 0.01, watts=500.0)
    with meter.window() as window:
        board.advance(0.02, watts=500.0)  # the counter moves by a whole tick here
    meter.close()
    assert_unavailable(window.reading, "cannot resolve")


def test_the_slowest_counter_decides(board):
    nvml = FakeNVML(board, gpus=2)
    read = nvml.nvmlDeviceGetTotalEnergyConsumption
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda gpu: read(gpu) if gpu else round(1e3 * board.counted(0.2))
    meter = gpu_meter(board, nvml)
    assert meter.required_seconds == pytest.approx(10.0, rel=0.03)
    meter.close()


def test_power_that_was_hardly_sampled_is_flagged(board, tmp_path):
    """The made-up clock jumps 20 s while the thread sleeps, as it does in an interpreter that is kept busy."""
    make_hwmon(tmp_path, {"hwmon0": JETSON})
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        board.advance(20.0)
    assert meter.reading.ticks < 10 and "20 s between two samples" in meter.reading.warning


def test_a_clock_that_is_set_changes_nothing(board, monkeypatch):
    assert Machine().clock is time.perf_counter and time.get_clock_info("perf_counter").monotonic
    steps = itertools.cycle([0.0, 1e9, -1e9])
    monkeypatch.setattr(time, "time", lambda: next(steps))
    monkeypatch.setattr(time, "time_ns", lambda: round(next(steps)))
    with EnergyMeter("cpu", machine=dataclasses.replace(make_machine(board), clock=time.perf_counter)) as meter:
        time.sleep(0.02)
    assert 0.02 <= meter.reading.seconds < 5


def test_nested_and_overlapping_windows_share_a_counter(board):
    meter = gpu_meter(board, FakeNVML(board, tick=0.001))
    outer, inner, late = meter.window(), meter.window(), meter.window()
    with outer:
        board.advance(1.0, watts=100.0)
        with inner:
            board.advance(1.0, watts=300.0)
            late.__enter__()
            board.advance(1.0, watts=200.0)
        board.advance(1.0, watts=100.0)
    board.advance(1.0, watts=10.0)
    late.__exit__(None, None, None)
    meter.close()
    joules = [window.reading.joules for window in (outer, inner, late)]
    assert joules == pytest.approx([700.0, 500.0, 310.0], rel=0.01)


def test_with_blocks_of_one_meter_nest(board):
    nvml = FakeNVML(board, tick=0.001)
    meter = gpu_meter(board, nvml)
    with meter:
        board.advance(1.0, watts=100.0)
        with meter:
            board.advance(1.0, watts=300.0)
        assert meter.reading.joules == pytest.approx(300.0, rel=0.01)
        assert nvml.opened == 1
    assert meter.reading.joules == pytest.approx(400.0, rel=0.01)
    assert nvml.opened == 0


def test_cpu_and_gpu_meters_nest(board, tmp_path):
    Powercap(tmp_path / "powercap", board, ONE_SOCKET)
    machine = make_machine(board, tmp_path, nvml=FakeNVML(board, gpus=2, tick=0.001))
    with EnergyMeter("cpu", machine=machine) as cpu, EnergyMeter("cuda:1", machine=machine) as gpu:
        board.advance(2.0, watts=100.0)
    assert (cpu.reading.source, gpu.reading.source) == ("rapl", "nvml-counter")
    # The GPU's counter is opened inside the CPU's window, which takes a little of the board's time.
    assert gpu.reading.joules == pytest.approx(400.0, rel=0.01) and cpu.reading.joules >= 199.0


def test_windows_in_threads():
    began_at = time.perf_counter()
    board = Board()
    nvml = FakeNVML(board)
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: round(1e5 * (time.perf_counter() - began_at))  # 100 W
    machine = make_machine(board, nvml=nvml, clock=time.perf_counter, sleep=time.sleep)
    meter = EnergyMeter("cuda", machine=machine, min_ticks=1)
    readings = []

    def work(seconds: float) -> None:
        for _ in range(5):
            with meter.window() as window:
                time.sleep(seconds)
            readings.append(window.reading)

    threads = [threading.Thread(target=work, args=(0.01 * (i + 1),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meter.close()
    assert len(readings) == 20 and nvml.opened == 0
    for reading in readings:
        # The window is read just outside its clock, so its energy covers a little more.
        assert reading.joules >= 100 * reading.seconds - 0.01


def test_idle_power_is_measured_and_subtracted(board):
    board.idle_watts = 60.0
    with gpu_meter(board, FakeNVML(board, gpus=2, tick=0.001), idle_seconds=1.0) as meter:
        board.advance(4.0, watts=100.0)
    reading = meter.reading
    assert reading.idle_subtracted == pytest.approx(3 * 60.0 * 4, rel=0.01)
    assert reading.joules == pytest.approx(3 * 40.0 * 4, rel=0.02)
    assert reading.per_device == pytest.approx({"cuda:0": 160.0, "cuda:1": 320.0}, rel=0.03)


def test_idle_is_measured_long_enough_for_the_counter(board):
    meter = gpu_meter(board, FakeNVML(board, tick=0.1))
    idle = meter.measure_idle(0.01)
    assert idle.seconds >= 4.9 and idle.warning is None and idle.idle_subtracted is None
    with meter.window(), pytest.raises(RuntimeError, match="a window of this meter is open"):
        meter.measure_idle(1.0)
    meter.close()


def test_idle_that_cannot_be_measured_gives_no_gross_joules(board):
    nvml = FakeNVML(board, tick=0.02)
    meter = gpu_meter(board, nvml, idle_seconds=1.0)
    board.on_advance.append(lambda: nvml.frozen.add(0) if board.clock() > 0.2 else None)
    with meter:
        board.advance(4.0)
    assert_unavailable(meter.reading, "idle power could not be measured")


def test_gpu_work_is_waited_for_at_both_ends_but_not_after_an_error(board):
    waits = []
    machine = make_machine(board, synchronize=lambda: waits.append(board.clock()))
    with EnergyMeter("cpu", machine=machine):
        board.advance(1.0)
    assert len(waits) == 2
    meter = EnergyMeter("cpu", machine=machine)
    with pytest.raises(KeyError, match="mine"), meter:
        raise KeyError("mine")
    assert len(waits) == 3 and meter.reading.source == "unavailable"


def test_work_that_fails_still_has_a_reading(board):
    nvml = FakeNVML(board)
    meter = gpu_meter(board, nvml)
    with pytest.raises(KeyError), meter:
        board.advance(2.0, watts=100.0)
        raise KeyError
    assert meter.reading.joules == pytest.approx(200.0, rel=0.02) and nvml.opened == 0


def test_closing_inside_a_window_never_reads_a_closed_counter(board):
    meter = gpu_meter(board, FakeNVML(board))  # the fake asserts that nothing is called after nvmlShutdown
    with meter.window() as window:
        board.advance(2.0)
        meter.close()
    assert_unavailable(window.reading, "closed inside the window")


def test_reading_too_early_is_an_error(board):
    meter = EnergyMeter("cpu", machine=make_machine(board))
    with pytest.raises(RuntimeError, match="no window has ended"):
        _ = meter.reading
    with meter.window() as window, pytest.raises(RuntimeError, match="not ended"):
        _ = window.reading


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:x", [], ["cpu", "cuda"], 3])
def test_bad_devices(device):
    with pytest.raises(ValueError, match="device must be"):
        EnergyMeter(device)


@pytest.mark.parametrize(
    "options",
    [{"source": "rapl", "device": "cuda"}, {"source": "tdp"}, {"idle_seconds": -1}, {"min_ticks": 0}],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match="EnergyMeter"):
        EnergyMeter(**{"device": "cpu", **options})


def test_the_default_device_follows_cuda(board):
    nvml = FakeNVML(board, gpus=2)
    with EnergyMeter(machine=make_machine(board, nvml=nvml)) as meter:
        board.advance(1.0)
    assert "rapl" in meter.reading.reason
    with EnergyMeter(machine=make_machine(board, nvml=nvml, cuda_uuids=lambda: ["GPU-1"])) as meter:
        board.advance(2.0, watts=100.0)
    assert meter.reading.watts == pytest.approx(200.0, rel=0.02)


def test_torch_devices_are_understood(board):
    torch = pytest.importorskip("torch")
    with EnergyMeter(torch.device("cuda", 0), machine=make_machine(board, nvml=FakeNVML(board))) as meter:
        board.advance(2.0)
    assert meter.reading.source == "nvml-counter"


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.floats(1e-3, 30.0),
    watts=st.floats(1.0, 700.0),
    tick=st.sampled_from([0.001, 0.02, 0.1]),
    min_ticks=st.integers(1, 100),
    idle=st.sampled_from([0.0, 1.0]),
    gpus=st.integers(0, 3),
    lost=st.booleans(),
)
def test_a_reading_is_a_measurement_or_says_why_not(seconds, watts, tick, min_ticks, idle, gpus, lost):
    board = Board(idle_watts=20.0)
    nvml = FakeNVML(board, gpus=gpus, tick=tick)
    with gpu_meter(board, nvml, idle_seconds=idle, min_ticks=min_ticks) as meter:
        board.advance(seconds, watts=watts)
        if lost:
            nvml.fails["nvmlDeviceGetTotalEnergyConsumption"] = 15
    reading = meter.reading
    assert reading.seconds == pytest.approx(seconds)
    assert (reading.joules is None) == (reading.source == "unavailable") == (reading.reason is not None)
    assert (reading.joules is None) == (reading.watts is None)
    json.dumps(dataclasses.asdict(reading))
    if lost or gpus == 0:
        assert reading.joules is None
    if reading.joules is None:
        return
    share = sum(range(1, gpus + 1))
    assert reading.joules == pytest.approx(sum(reading.per_device.values()))
    assert reading.watts * reading.seconds == pytest.approx(reading.joules)
    assert (reading.idle_subtracted is None) == (idle == 0)
    # A counter's two ends are off by less than one tick each (and the millijoule it counts in).
    slack = share * (
        max(watts, 20.0) * 1.1 * tick + 0.01 + 20.0 * seconds * 1.5 / max(min_ticks, 1 / tick) * (idle > 0)
    )
    assert reading.joules + (reading.idle_subtracted or 0.0) == pytest.approx(share * watts * seconds, abs=slack)
    assert (reading.warning is None) == (reading.ticks >= min_ticks)
    assert reading.ticks <= seconds / tick * 1.05 + 1
