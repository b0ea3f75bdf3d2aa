"""The energy meter on made-up hardware: a board whose clock and joules the test moves, a powercap tree, an NVML."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import sys
import threading
import time
from bisect import bisect_right
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.energy import (
    LABELS,
    EnergyMeter,
    Machine,
    available_sources,
    compare,
    measure,
    median_interval,
)
from sparsekd.energy import totals as totals_module
from sparsekd.energy.channel import Channel, Source
from sparsekd.energy.perf import perf_event_open
from sparsekd.energy.totals import Totals


class Board:
    """A clock that moves when told to, and the energy used until any moment."""

    def __init__(self, idle_watts: float = 50.0) -> None:
        self.idle_watts = idle_watts
        self.watts = idle_watts
        self.times, self.joules = [0.0], [0.0]
        self.on_advance = []

    def clock(self) -> float:
        return self.times[-1]

    def advance(self, seconds: float, watts: float | None = None) -> None:
        self.watts = self.idle_watts if watts is None else watts
        self.times.append(self.times[-1] + seconds)
        self.joules.append(self.joules[-1] + seconds * self.watts)
        for hook in self.on_advance:
            hook()

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def joules_at(self, moment: float) -> float:
        """Energy until `moment`, linear between the moves."""
        i = min(max(bisect_right(self.times, moment), 1), len(self.times) - 1)
        if len(self.times) == 1:
            return 0.0
        (t0, t1), (j0, j1) = self.times[i - 1 : i + 1], self.joules[i - 1 : i + 1]
        return j1 if t1 == t0 else j0 + (j1 - j0) * min((moment - t0) / (t1 - t0), 1.0)

    def counted(self, tick: float) -> float:
        """What a counter that is updated every `tick` seconds shows now."""
        return self.joules_at(math.floor(self.clock() / tick + 1e-9) * tick)


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class FakeNVML:
    """The functions of nvidia-ml-py that the meter calls. `fails` maps a function name to an NVML error code."""

    NVMLError = NVMLError

    def __init__(self, board: Board, gpus: int = 1, tick: float = 0.02, names: tuple[str, ...] | None = None) -> None:
        self.board, self.gpus, self.tick = board, gpus, tick
        self.names = names or ("H200",) * gpus
        self.fails: dict[str, int] = {}
        self.fails_on: dict[tuple[str, int], int] = {}
        self.frozen: set[int] = set()
        self.mig = 0
        self.opened = 0

    def _call(self, function: str, gpu: int | None = None) -> None:
        code = self.fails.get(function) or self.fails_on.get((function, gpu))
        if code:
            raise NVMLError(code)
        assert function == "nvmlInit" or self.opened > 0, f"{function} after nvmlShutdown"

    def nvmlInit(self) -> None:
        self._call("nvmlInit")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self._call("nvmlShutdown")
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._call("nvmlDeviceGetCount")
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self._call("nvmlDeviceGetHandleByIndex", index)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        index = int(uuid.removeprefix("GPU-"))
        self._call("nvmlDeviceGetHandleByUUID", index)
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        self._call("nvmlDeviceGetMigMode", handle)
        return [self.mig, self.mig]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle)
        # GPU i draws i + 1 times the board's power
        return 7_000_000 + (0 if handle in self.frozen else round(1e3 * (handle + 1) * self.board.counted(self.tick)))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        self._call("nvmlDeviceGetPowerUsage", handle)
        return round(1e3 * (handle + 1) * self.board.watts)

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[SimpleNamespace]:
        assert fields == [186]  # NVML_FI_DEV_POWER_INSTANT in nvml.h
        self._call("nvmlDeviceGetFieldValues", handle)
        milliwatts = round(1e3 * (handle + 1) * self.board.watts)
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=milliwatts))]


class Powercap:
    """/sys/class/powercap whose counters follow the board, `shares` of its power each."""

    def __init__(
        self, root: Path, board: Board, zones: dict[str, tuple[str, float]], range_joules: float = 1000
    ) -> None:
        self.root, self.board, self.range_uj, self.frozen = root, board, round(range_joules * 1e6), set()
        self.zones = zones
        root.mkdir(parents=True)
        for zone, (name, _) in zones.items():
            (root / zone).mkdir()
            (root / zone / "name").write_text(f"{name}\n")
            (root / zone / "max_energy_range_uj").write_text(f"{self.range_uj}\n")
        self.write()
        board.on_advance.append(self.write)

    def write(self) -> None:
        for zone, (_, share) in self.zones.items():
            if zone not in self.frozen:
                microjoules = round(share * self.board.counted(1e-3) * 1e6) % self.range_uj
                (self.root / zone / "energy_uj").write_text(f"{microjoules}\n")


ONE_SOCKET = {"intel-rapl:0": ("package-0", 1.0)}
# psys holds the packages, core lies in one, mmio shows one again: only packages and dram (0.1 + 0.2) may be added.
TWO_SOCKETS = {
    "intel-rapl:0": ("package-0", 1.0),
    "intel-rapl:0:0": ("core", 0.7),
    "intel-rapl:0:1": ("dram", 0.1),
    "intel-rapl:1": ("package-1", 2.0),
    "intel-rapl:1:0": ("uncore", 0.4),
    "intel-rapl:1:1": ("dram", 0.2),
    "intel-rapl:2": ("psys", 9.0),
    "intel-rapl-mmio:0": ("package-0", 1.0),
}


@pytest.fixture
def board() -> Board:
    return Board()


def make_machine(board: Board, root: Path = Path("/nonexistent"), **options: object) -> Machine:
    """The board's machine: no counter but those under `root` and in `options`."""
    defaults: dict[str, object] = {
        "powercap": root / "powercap",
        "hwmon": root / "hwmon",
        "events": root / "events",
        "nvml": FakeNVML(board, gpus=0),
        "environ": {},
        "cuda_uuids": lambda: None,
        "synchronize": lambda: None,
        "clock": board.clock,
        "sleep": board.sleep,
    }
    return Machine(**{**defaults, **options})


def gpu_meter(
    board: Board, nvml: FakeNVML, device: object = "cuda", environ: dict | None = None, **options
) -> EnergyMeter:
    return EnergyMeter(device, machine=make_machine(board, nvml=nvml, environ=environ or {}), **options)


def assert_unavailable(reading, *said: str) -> None:
    assert reading.source == "unavailable" and reading.joules is None and reading.watts is None
    for words in said:
        assert words in reading.reason


# --- RAPL -------------------------------------------------------------------------------------------------------------


def test_rapl_reads_a_package(board, tmp_path):
    Powercap(tmp_path / "powercap", board, ONE_SOCKET)
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        board.advance(2.0, watts=80.0)
    reading = meter.reading
    assert reading.source == "rapl" and reading.reason is None and reading.warning is None
    assert reading.joules == pytest.approx(160.0, rel=1e-3) and reading.seconds == pytest.approx(2.0)
    assert reading.watts == pytest.approx(80.0, rel=1e-3)
    assert reading.idle_subtracted is None
    assert 900 <= reading.ticks <= 2000  # the tick is 1 ms, found by polling every 0.5 ms


def test_rapl_adds_sockets_and_dram_once(board, tmp_path):
    Powercap(tmp_path / "powercap", board, TWO_SOCKETS)
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        board.advance(1.0, watts=100.0)
    each = {"package-0": 100.0, "dram/package-0": 10.0, "package-1": 200.0, "dram/package-1": 20.0}
    assert meter.reading.per_device == pytest.approx(each, rel=1e-3)
    assert meter.reading.joules == pytest.approx(330.0, rel=1e-3)


def test_rapl_uses_mmio_only_alone(board, tmp_path):
    Powercap(tmp_path / "powercap", board, {"intel-rapl-mmio:0": ("package-0", 1.0)})
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        board.advance(1.0, watts=100.0)
    assert meter.reading.joules == pytest.approx(100.0, rel=1e-3)


def test_domains_choose_what_is_added(board, tmp_path):
    Powercap(tmp_path / "powercap", board, TWO_SOCKETS)
    machine = make_machine(board, tmp_path)
    with EnergyMeter("cpu", domains=["package-*"], machine=machine) as meter:
        board.advance(1.0, watts=100.0)
    assert set(meter.reading.per_device) == {"package-0", "package-1"}
    with EnergyMeter("cpu", domains=["gpu*"], machine=machine) as meter:
        board.advance(1.0)
    assert_unavailable(meter.reading, "gpu*", "package-0")


def test_equal_zone_names_stay_apart(board, tmp_path):
    Powercap(tmp_path / "powercap", board, {"intel-rapl:0": ("package-0", 1.0), "intel-rapl:1": ("package-0", 2.0)})
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        board.advance(1.0, watts=100.0)
    assert meter.reading.per_device == pytest.approx({"package-0#1": 100.0, "package-0#2": 200.0}, rel=1e-3)


def test_rapl_wraps_around(board, tmp_path):
    Powercap(tmp_path / "powercap", board, ONE_SOCKET, range_joules=1000)
    meter = EnergyMeter("cpu", machine=make_machine(board, tmp_path))
    board.advance(9.5, watts=100.0)  # 50 J before the end of the range
    with meter:
        board.advance(3.0, watts=100.0)
    assert meter.reading.joules == pytest.approx(300.0, rel=1e-3)


def test_a_reset_counter_is_not_taken_for_a_wrap(board, tmp_path):
    tree = Powercap(tmp_path / "powercap", board, ONE_SOCKET, range_joules=262_144)
    board.advance(10.0, watts=100.0)
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        board.advance(1.0, watts=100.0)
        tree.frozen.add("intel-rapl:0")
        (tree.root / "intel-rapl:0" / "energy_uj").write_text("5\n")  # a wrap to here would be 260 kJ in one second
    assert_unavailable(meter.reading, "package-0", "reset")


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


def test_rapl_permission_denied_names_the_fix(board, tmp_path, monkeypatch):
    Powercap(tmp_path / "powercap", board, ONE_SOCKET)
    read_text = Path.read_text

    def guarded(path, *args, **kwargs):
        if path.name == "energy_uj":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    with EnergyMeter("cpu", source="rapl", machine=make_machine(board, tmp_path)) as meter:
        pass
    assert_unavailable(meter.reading, "sudo chmod a+r", "intel-rapl*/energy_uj")


def test_one_unreadable_socket_is_no_total(board, tmp_path):
    tree = Powercap(tmp_path / "powercap", board, TWO_SOCKETS)
    (tree.root / "intel-rapl:1" / "energy_uj").write_text("garbage")
    tree.frozen.add("intel-rapl:1")
    with EnergyMeter("cpu", source="rapl", machine=make_machine(board, tmp_path)) as meter:
        board.advance(1.0)
    assert_unavailable(meter.reading, "intel-rapl:1/energy_uj", "garbage")


def test_a_socket_that_vanishes_inside_the_window(board, tmp_path):
    tree = Powercap(tmp_path / "powercap", board, TWO_SOCKETS)
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        board.advance(1.0, watts=100.0)
        tree.frozen.add("intel-rapl:1")
        (tree.root / "intel-rapl:1" / "energy_uj").unlink()
    assert_unavailable(meter.reading, "intel-rapl:1/energy_uj")
    assert meter.reading.per_device["package-1"] is None
    assert meter.reading.per_device["package-0"] == pytest.approx(100.0, rel=1e-3)


def test_a_counter_that_never_moves_is_refused_at_once(board, tmp_path):
    zones = {"intel-rapl:1": ("package-1", 1.0), "intel-rapl:1:1": ("dram", 0.1)}
    tree = Powercap(tmp_path / "powercap", board, zones)
    tree.frozen.add("intel-rapl:1:1")
    with EnergyMeter("cpu", source="rapl", machine=make_machine(board, tmp_path)) as meter:
        board.advance(1.0)
    assert_unavailable(meter.reading, "dram/package-1", "stands still")


def test_a_counter_that_stops_is_not_zero_joules(board, tmp_path):
    tree = Powercap(tmp_path / "powercap", board, TWO_SOCKETS)
    meter = EnergyMeter("cpu", machine=make_machine(board, tmp_path))
    assert meter.source == "rapl"
    tree.frozen.update({"intel-rapl:1"})
    with meter:
        board.advance(1.0, watts=100.0)
    assert_unavailable(meter.reading, "package-1 did not move")
    assert meter.reading.per_device["package-1"] is None


@pytest.mark.parametrize("zones", [{}, {"intel-rapl:0": ("psys", 1.0)}], ids=["none", "psys alone"])
def test_no_zone_says_what_to_do(board, tmp_path, zones):
    Powercap(tmp_path / "powercap", board, zones)
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        pass
    assert_unavailable(meter.reading, "rapl", "intel_rapl_msr", "perf", "hwmon")


def test_zones_masked_by_a_container(board, tmp_path):
    (tmp_path / "powercap").mkdir()
    (tmp_path / "powercap" / "intel-rapl:0").symlink_to(tmp_path / "masked")
    with EnergyMeter("cpu", source="rapl", machine=make_machine(board, tmp_path)) as meter:
        pass
    assert_unavailable(meter.reading, "systempaths=unconfined")


# --- perf -------------------------------------------------------------------------------------------------------------


def make_pmu(root: Path, board: Board, *, deny: int = 0):
    """The power PMU of two sockets; a file descriptor's read gives the count, as the kernel does."""
    power = root / "events" / "power"
    (power / "events").mkdir(parents=True)
    for path, text in {
        "type": "9",
        "cpumask": "0,14",
        "events/energy-pkg": "event=0x02",
        "events/energy-pkg.scale": "2.5e-4",
        "events/energy-ram": "event=0x03",
        "events/energy-ram.scale": "5e-4",
    }.items():
        (power / path).write_text(text + "\n")
    opened: dict[int, tuple[int, int]] = {}

    def perf_open(kind: int, config: int, cpu: int) -> int:
        if deny:
            raise OSError(deny, os.strerror(deny))
        assert kind == 9
        fd = os.open(os.devnull, os.O_RDONLY)
        opened[fd] = (config, cpu)
        return fd

    real_read = os.read

    def read(fd: int, size: int) -> bytes:
        if fd not in opened:
            return real_read(fd, size)
        os.fstat(fd)  # OSError once the descriptor has been closed
        config, cpu = opened[fd]
        joules = board.counted(1e-3) * (1.0 if config == 2 else 0.1) * (1 + cpu / 14)
        return round(joules / (2.5e-4 if config == 2 else 5e-4)).to_bytes(8, "little")

    return perf_open, read, opened


def test_perf_events_of_two_sockets(board, tmp_path, monkeypatch):
    perf_open, read, opened = make_pmu(tmp_path, board)
    monkeypatch.setattr(os, "read", read)
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path, perf_open=perf_open)) as meter:
        board.advance(1.0, watts=100.0)
    assert meter.reading.source == "perf"
    each = {"package@cpu0": 100.0, "package@cpu14": 200.0, "dram@cpu0": 10.0, "dram@cpu14": 20.0}
    assert meter.reading.per_device == pytest.approx(each, rel=1e-2)
    assert len(opened) == 4
    for fd in opened:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_perf_not_allowed_names_the_fix(board, tmp_path):
    perf_open, _, _ = make_pmu(tmp_path, board, deny=errno.EACCES)
    with EnergyMeter("cpu", source="perf", machine=make_machine(board, tmp_path, perf_open=perf_open)) as meter:
        pass
    assert_unavailable(meter.reading, "kernel.perf_event_paranoid=0")


@pytest.mark.parametrize("file", ["type", "cpumask", "events/energy-pkg", "events/energy-ram.scale"])
def test_perf_files_that_hold_nonsense(board, tmp_path, file):
    perf_open, _, opened = make_pmu(tmp_path, board)
    (tmp_path / "events" / "power" / file).write_text("nonsense")
    with EnergyMeter("cpu", source="perf", machine=make_machine(board, tmp_path, perf_open=perf_open)) as meter:
        pass
    assert_unavailable(meter.reading, "nonsense")
    for fd in opened:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_perf_events_that_fail_half_way_are_closed(board, tmp_path):
    allow, _, opened = make_pmu(tmp_path, board)

    def perf_open(kind: int, config: int, cpu: int) -> int:
        if len(opened) == 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return allow(kind, config, cpu)

    with EnergyMeter("cpu", source="perf", machine=make_machine(board, tmp_path, perf_open=perf_open)) as meter:
        pass
    assert_unavailable(meter.reading, "Too many open files")
    assert len(opened) == 3
    for fd in opened:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_the_real_system_call_counts():
    """The software event cpu-clock (type 1, config 0) counts nanoseconds of CPU 0 on any Linux that allows it."""
    try:
        fd = perf_event_open(1, 0, 0)
    except OSError as error:
        pytest.skip(f"perf_event_open: {error}")
    try:
        first = int.from_bytes(os.read(fd, 8), "little")
        time.sleep(0.05)
        nanoseconds = int.from_bytes(os.read(fd, 8), "little") - first
    finally:
        os.close(fd)
    assert 0.04e9 < nanoseconds < 5e9


def test_the_real_system_call_reports_errno():
    with pytest.raises(OSError):
        perf_event_open(2**31, 0, 0)


# --- hwmon ------------------------------------------------------------------------------------------------------------


def make_hwmon(root: Path, chips: dict[str, dict[str, str]]) -> None:
    for chip, files in chips.items():
        (root / "hwmon" / chip).mkdir(parents=True)
        for name, text in files.items():
            (root / "hwmon" / chip / name).write_text(text + "\n")


JETSON = {
    "name": "ina3221",
    "update_interval": "50",
    "in1_label": "VDD_IN",
    "in1_input": "5000",
    "curr1_input": "3000",
    "in2_label": "VDD_CPU_GPU_CV",
    "in2_input": "5000",
    "curr2_input": "1000",
    "in4_input": "12",
}


def test_jetson_takes_the_rail_that_holds_the_others(board, tmp_path):
    make_hwmon(tmp_path, {"hwmon0": {"name": "cpu_thermal", "temp1_input": "4000"}, "hwmon1": JETSON})
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        board.advance(10.0)
    assert meter.reading.source == "hwmon"
    assert meter.reading.per_device == pytest.approx({"ina3221/VDD_IN": 150.0})  # 5 V x 3 A x 10 s


def test_rails_that_may_overlap_have_to_be_named(board, tmp_path):
    agx = JETSON | {"in1_label": "VDD_GPU_SOC"}
    make_hwmon(tmp_path, {"hwmon1": agx})
    machine = make_machine(board, tmp_path)
    with EnergyMeter("cpu", source="hwmon", machine=machine) as meter:
        board.advance(10.0)
    assert_unavailable(meter.reading, "ina3221/VDD_GPU_SOC", "domains=")
    with EnergyMeter("cpu", domains=["ina3221/VDD_*"], machine=machine) as meter:
        board.advance(10.0)
    assert meter.reading.joules == pytest.approx(200.0)


def test_hwmon_counters_and_averages(board, tmp_path):
    make_hwmon(
        tmp_path,
        {
            "hwmon0": {"name": "amd_energy", "energy1_label": "Ecore000", "energy1_input": "0"}
            | {"energy2_label": "Esocket0", "energy2_input": "0", "power2_input": "1"},
            "hwmon1": {"name": "power_meter", "power1_average": "90000000", "power1_average_interval": "1000"},
        },
    )

    def write() -> None:
        (tmp_path / "hwmon" / "hwmon0" / "energy2_input").write_text(str(round(board.counted(1e-3) * 1e6)))

    board.on_advance.append(write)
    machine = make_machine(board, tmp_path)
    with EnergyMeter("cpu", machine=machine) as meter:
        board.advance(2.0, watts=70.0)
    assert meter.reading.per_device == pytest.approx({"amd_energy/Esocket0": 140.0}, rel=1e-3)
    with EnergyMeter("cpu", domains=["power_meter/*"], machine=machine) as meter:
        board.advance(2.0)
    assert meter.reading.per_device == pytest.approx({"power_meter/power1": 180.0})
    assert meter.reading.ticks <= 2 and "50 s is needed" in meter.reading.warning


def test_a_rail_that_reads_zero_is_not_zero_joules(board, tmp_path):
    make_hwmon(tmp_path, {"hwmon0": JETSON | {"curr1_input": "0"}})
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        board.advance(10.0)
    assert_unavailable(meter.reading, "ina3221/VDD_IN did not move")


# --- NVML -------------------------------------------------------------------------------------------------------------


def test_nvml_counters_of_several_gpus(board):
    nvml = FakeNVML(board, gpus=3)
    with gpu_meter(board, nvml) as meter:
        board.advance(2.0, watts=100.0)
    assert meter.reading.source == "nvml-counter"
    assert meter.reading.per_device == pytest.approx({"cuda:0": 200.0, "cuda:1": 400.0, "cuda:2": 600.0}, rel=0.02)
    assert meter.reading.joules == pytest.approx(1200.0, rel=0.02)
    assert 90 <= meter.reading.ticks <= 100
    assert nvml.opened == 0


@pytest.mark.parametrize(
    ("device", "environ", "watts"),
    [
        ("cuda:1", {}, 2),
        (["cuda:0", "cuda:2"], {}, 4),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "2,0"}, 4),
        ("cuda:0", {"CUDA_VISIBLE_DEVICES": "2,0"}, 3),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-1"}, 2),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "1,-1,0"}, 2),
    ],
)
def test_the_gpus_asked_for_are_the_ones_cuda_numbers(board, device, environ, watts):
    with gpu_meter(board, FakeNVML(board, gpus=3), device, environ) as meter:
        board.advance(2.0, watts=100.0)
    assert meter.reading.watts == pytest.approx(100.0 * watts, rel=0.02)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_no_visible_gpu(board, hidden):
    nvml = FakeNVML(board, gpus=2)
    with gpu_meter(board, nvml, environ={"CUDA_VISIBLE_DEVICES": hidden}) as meter:
        pass
    assert_unavailable(meter.reading, "no GPU is visible")
    assert nvml.opened == 0


def test_a_gpu_that_is_not_there(board):
    with gpu_meter(board, FakeNVML(board, gpus=1), "cuda:1") as meter:
        pass
    assert_unavailable(meter.reading, "cuda:1", "1 GPU(s)")


def test_gpus_of_several_models_need_an_order(board):
    nvml = FakeNVML(board, gpus=2, names=("L4", "H200"))
    with gpu_meter(board, nvml, "cuda:0") as meter:
        board.advance(2.0)
    assert_unavailable(meter.reading, "CUDA_DEVICE_ORDER=PCI_BUS_ID")
    with gpu_meter(board, nvml, "cuda:0", {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) as meter:
        board.advance(2.0)
    assert meter.reading.source == "nvml-counter"
    machine = make_machine(board, nvml=nvml, cuda_uuids=lambda: ["GPU-1", "GPU-0"])  # CUDA's own order: fastest first
    with EnergyMeter("cuda:0", machine=machine) as meter:
        board.advance(2.0, watts=100.0)
    assert meter.reading.watts == pytest.approx(200.0, rel=0.02)


@pytest.mark.parametrize(("code", "fix"), [(9, "modprobe nvidia"), (12, "driver"), (18, "restart"), (4, "/dev/nvidia")])
def test_nvml_that_does_not_start_names_the_fix(board, code, fix):
    nvml = FakeNVML(board)
    nvml.fails["nvmlInit"] = code
    with gpu_meter(board, nvml) as meter:
        pass
    assert_unavailable(meter.reading, fix)
    assert meter.reading.reason.count("nvmlInit") == 1  # the same reason of two sources is said once


def test_missing_nvidia_ml_py_names_the_fix(board, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with EnergyMeter("cuda", machine=make_machine(board, nvml=None)) as meter:
        pass
    assert_unavailable(meter.reading, "pip install nvidia-ml-py")


def test_no_counter_falls_to_the_power_integral(board):
    nvml = FakeNVML(board)
    nvml.fails["nvmlDeviceGetTotalEnergyConsumption"] = 3
    board.watts = 120.0
    with gpu_meter(board, nvml) as meter:
        board.advance(10.0, watts=120.0)
    assert meter.reading.source == "nvml-power-integral"
    assert meter.reading.joules == pytest.approx(1200.0)
    assert nvml.opened == 0


def test_one_gpu_without_a_counter_integrates_all(board):
    nvml = FakeNVML(board, gpus=2)
    nvml.fails_on["nvmlDeviceGetTotalEnergyConsumption", 1] = 3
    with gpu_meter(board, nvml) as meter:
        board.advance(10.0)
    assert meter.reading.source == "nvml-power-integral" and set(meter.reading.per_device) == {"cuda:0", "cuda:1"}


def test_average_power_needs_longer_windows(board):
    nvml = FakeNVML(board)
    nvml.fails |= {"nvmlDeviceGetTotalEnergyConsumption": 3, "nvmlDeviceGetFieldValues": 3}
    meter = gpu_meter(board, nvml)
    assert meter.required_seconds == pytest.approx(50.0)
    meter.close()
    del nvml.fails["nvmlDeviceGetFieldValues"]
    assert meter.required_seconds == pytest.approx(5.0)
    meter.close()


def test_no_permission_for_either(board):
    nvml = FakeNVML(board)
    nvml.fails |= {
        "nvmlDeviceGetTotalEnergyConsumption": 4,
        "nvmlDeviceGetFieldValues": 4,
        "nvmlDeviceGetPowerUsage": 4,
    }
    with gpu_meter(board, nvml) as meter:
        board.advance(1.0)
    assert_unavailable(meter.reading, "nvml-counter", "nvml-power-integral", "/dev/nvidia")
    assert nvml.opened == 0


def test_a_counter_that_stands_still_falls_to_power(board):
    nvml = FakeNVML(board)
    nvml.frozen.add(0)
    with gpu_meter(board, nvml) as meter:
        board.advance(10.0)
    assert meter.reading.source == "nvml-power-integral"
    with gpu_meter(board, nvml, source="nvml-counter") as meter:
        board.advance(10.0)
    assert_unavailable(meter.reading, "cuda:0", "stands still")


def test_a_counter_that_stops_inside_the_window(board):
    nvml = FakeNVML(board)
    meter = gpu_meter(board, nvml)
    with meter.window() as before:
        board.advance(2.0)
    with meter.window() as window:
        nvml.frozen.add(0)
        board.advance(2.0)
    meter.close()
    assert before.reading.joules > 0
    assert_unavailable(window.reading)
    assert window.reading.per_device == {"cuda:0": None}


def test_a_gpu_lost_inside_the_window(board):
    nvml = FakeNVML(board, gpus=2)
    with gpu_meter(board, nvml) as meter:
        board.advance(2.0, watts=100.0)
        nvml.fails_on["nvmlDeviceGetTotalEnergyConsumption", 1] = 15
    assert_unavailable(meter.reading, "cuda:1", "Xid")
    assert meter.reading.per_device == {"cuda:0": pytest.approx(200.0, rel=0.02), "cuda:1": None}
    assert meter.reading.seconds == pytest.approx(2.0)


def test_mig_is_refused(board):
    nvml = FakeNVML(board)
    nvml.mig = 1
    with gpu_meter(board, nvml) as meter:
        board.advance(2.0)
    assert_unavailable(meter.reading, "MIG", "nvidia-smi -mig 0")
    with gpu_meter(board, FakeNVML(board), environ={"CUDA_VISIBLE_DEVICES": "MIG-12ab"}) as meter:
        board.advance(2.0)
    assert_unavailable(meter.reading, "MIG-12ab")


def test_a_gpu_without_mig_is_no_error(board):
    nvml = FakeNVML(board)
    nvml.fails["nvmlDeviceGetMigMode"] = 3
    with gpu_meter(board, nvml) as meter:
        board.advance(2.0)
    assert meter.reading.source == "nvml-counter"


def test_power_is_integrated_by_a_thread_in_real_time():
    """Against the trapezoid rule over the very samples the meter took: nothing depends on how busy this machine is."""
    samples: list[tuple[float, float]] = []

    class Nvml(FakeNVML):
        def nvmlDeviceGetFieldValues(self, handle, fields):
            now = time.perf_counter()
            self.board.watts = 100.0 + 400.0 * (now % 0.2)
            samples.append((now, self.board.watts))
            return super().nvmlDeviceGetFieldValues(handle, fields)

    board = Board()
    nvml = Nvml(board)
    nvml.fails["nvmlDeviceGetTotalEnergyConsumption"] = 3
    machine = make_machine(board, nvml=nvml, clock=time.perf_counter, sleep=time.sleep)
    meter = EnergyMeter("cuda", machine=machine)
    assert meter.source == "nvml-power-integral"
    samples.clear()
    with meter:
        time.sleep(0.5)
    expected = sum(0.5 * (a[1] + b[1]) * (b[0] - a[0]) for a, b in itertools.pairwise(samples))
    assert meter.reading.joules == pytest.approx(expected, rel=0.01)
    assert len(samples) >= 5
    taken = len(samples)
    time.sleep(0.06)
    assert len(samples) == taken  # the thread has ended with the window


# --- windows ----------------------------------------------------------------------------------------------------------


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


def test_available_sources_names_every_source(board, tmp_path):
    Powercap(tmp_path / "powercap", board, TWO_SOCKETS)
    found = {status.source: status for status in available_sources(make_machine(board, tmp_path))}
    assert tuple(found) == LABELS[:-1]
    assert found["rapl"].readable and len(found["rapl"].devices) == 4 and found["rapl"].reason is None
    assert found["rapl"].tick == pytest.approx(1e-3, rel=0.6)
    for label in set(found) - {"rapl"}:
        assert not found[label].readable and found[label].reason


# --- properties of window arithmetic ----------------------------------------------------------------------------------


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


# --- measure and compare ----------------------------------------------------------------------------------------------


def call(board: Board, seconds: float, watts: float):
    return lambda: board.advance(seconds, watts)


def test_measure_without_a_counter_gives_seconds_alone(board):
    found = measure(call(board, 0.004, 100.0), device="cpu", machine=make_machine(board))
    assert found.seconds_per_call == pytest.approx(0.004)
    assert found.joules_per_call is None and found.round_joules is None and found.watts is None
    assert found.source == "unavailable" and "rapl" in found.reason
    assert len(found.round_seconds) == 5 and found.calls == 250


def test_compare_gives_ratios_of_seconds_and_joules(board):
    nvml = FakeNVML(board, tick=0.1)
    functions = {"dense": call(board, 0.010, 300.0), "sparse": call(board, 0.004, 250.0)}
    found = compare(functions, device="cuda", machine=make_machine(board, nvml=nvml))
    dense, sparse = found.measurements["dense"], found.measurements["sparse"]
    assert dense.joules_per_call == pytest.approx(3.0, rel=0.03)
    assert sparse.joules_per_call == pytest.approx(1.0, rel=0.03)
    assert dense.warning is None and dense.ticks >= 50  # windows were made long enough for the counter
    assert found.baseline == "dense" and set(found.seconds_ratio) == {"sparse"}
    assert found.seconds_ratio["sparse"].value == pytest.approx(0.4)
    joules = found.joules_ratio["sparse"]
    assert joules.low <= joules.value <= joules.high and joules.value == pytest.approx(1 / 3, rel=0.05)
    assert joules.confidence == pytest.approx(1 - 2 * 0.5**7)
    assert nvml.opened == 0
    json.dumps(dataclasses.asdict(found))


def test_windows_alternate_so_that_drift_cancels(board):
    """The machine slows down by the same step at every window; the ratio of equal functions must not see it."""
    order = []

    def work(name: str):
        def run() -> None:
            order.append(name)
            board.advance(0.01 * (1 + len(order) / 1e4), 100.0)

        return run

    found = compare({"a": work("a"), "b": work("b")}, seconds=0.1, warmup=0.1, rounds=8, machine=make_machine(board))
    a, b = (["a"] * found.measurements["a"].calls, ["b"] * found.measurements["b"].calls)
    assert order[-8 * len(a + b) :] == (a + b + b + a) * 4
    assert found.seconds_ratio["b"].value == pytest.approx(1.0, abs=5e-4)
    assert found.seconds_ratio["b"].low < 1.0 < found.seconds_ratio["b"].high


def test_warm_up_goes_on_until_the_time_settles(board):
    calls = itertools.count()
    work = measure(
        lambda: board.advance(0.01 + 0.2 * 0.9 ** next(calls), 100.0), warmup=0.5, machine=make_machine(board)
    )
    assert work.warning is None and work.seconds_per_call == pytest.approx(0.01, rel=0.1)


def test_idle_above_the_work_leaves_no_ratio_of_joules(board):
    board.idle_watts = 300.0
    machine = make_machine(board, nvml=FakeNVML(board, tick=0.01))
    meter = EnergyMeter("cuda", idle_seconds=1.0, machine=machine)
    found = compare({"a": call(board, 0.01, 200.0), "b": call(board, 0.01, 400.0)}, meter=meter, machine=machine)
    meter.close()
    assert found.measurements["a"].joules_per_call == pytest.approx(-1.0, rel=0.05)
    assert found.joules_ratio == {"b": None}


def test_cool_down_rests_before_every_window(board):
    def total(cooldown: float) -> float:
        began_at = board.clock()
        measure(call(board, 0.01, 100.0), machine=make_machine(board), device="cpu", cooldown=cooldown)
        return board.clock() - began_at

    assert total(3.0) - total(0.0) == pytest.approx(5 * 3.0)


def test_work_that_never_settles_is_flagged(board):
    calls = itertools.count()
    found = measure(lambda: board.advance(0.01 * 1.2 ** next(calls), 100.0), warmup=0.5, machine=make_machine(board))
    assert "did not settle" in found.warning


def test_one_lost_window_leaves_no_joules(board):
    nvml = FakeNVML(board, tick=0.01)
    board.on_advance.append(
        lambda: nvml.fails.update(nvmlDeviceGetTotalEnergyConsumption=15) if board.clock() > 8 else None
    )
    functions = {"dense": call(board, 0.010, 300.0), "sparse": call(board, 0.004, 250.0)}
    found = compare(functions, device="cuda", machine=make_machine(board, nvml=nvml))
    assert found.measurements["dense"].joules_per_call is None and "Xid" in found.measurements["dense"].reason
    assert found.joules_ratio == {"sparse": None}
    assert found.seconds_ratio["sparse"].value == pytest.approx(0.4)


def test_an_own_meter_with_idle_power_stays_open(board):
    board.idle_watts = 100.0
    nvml = FakeNVML(board, tick=0.01)
    machine = make_machine(board, nvml=nvml)
    meter = EnergyMeter("cuda", idle_seconds=1.0, machine=machine)
    found = measure(call(board, 0.01, 300.0), meter=meter, machine=machine, cooldown=0.5)
    assert found.joules_per_call == pytest.approx(2.0, rel=0.05)
    assert found.idle_subtracted == pytest.approx(1.0, rel=0.05)
    assert nvml.opened == 1
    meter.close()
    assert nvml.opened == 0


@pytest.mark.parametrize(
    "options", [{"rounds": 0}, {"seconds": 0.0}, {"seconds": math.inf}, {"warmup": -1.0}, {"cooldown": math.nan}]
)
def test_compare_refuses_bad_arguments(board, options):
    with pytest.raises(ValueError, match=r"energy\.compare"):
        compare({"a": lambda: None}, machine=make_machine(board), **options)
    with pytest.raises(ValueError, match=r"energy\.compare"):
        compare({}, machine=make_machine(board))


def test_median_interval_by_hand():
    # n = 6: 1 - 2/64. n = 10: 1 - 2 (1 + 10)/1024. n = 3: 1 - 2/8, less than asked for and said so.
    assert dataclasses.astuple(median_interval([6, 1, 5, 2, 4, 3])) == (3.5, 1, 6, 0.96875)
    assert dataclasses.astuple(median_interval(list(range(10)))) == (4.5, 1, 8, 1 - 22 / 1024)
    assert dataclasses.astuple(median_interval([3.0, 1.0, 2.0])) == (2.0, 1.0, 3.0, 0.75)
    assert dataclasses.astuple(median_interval([2.0])) == (2.0, 2.0, 2.0, 0.0)
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


@pytest.mark.parametrize("n", [5, 6, 9, 12])
def test_median_interval_covers_as_often_as_it_says(n):
    """Over all 2^n ways to fall below or above the median, count those whose order statistics still straddle it."""
    covered = 0
    for signs in itertools.product([-1.0, 1.0], repeat=n):
        interval = median_interval(signs, confidence=0.9)
        covered += interval.low < 0 < interval.high
    assert covered / 2**n == pytest.approx(interval.confidence)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=40), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_median_interval_properties(values, confidence):
    interval = median_interval(values, confidence)
    assert min(values) <= interval.low <= interval.value <= interval.high <= max(values)
    assert interval == median_interval(values[::-1], confidence)
    assert interval.confidence >= confidence or (interval.low, interval.high) == (min(values), max(values))
