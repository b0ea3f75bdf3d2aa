"""powercap, perf and hwmon on made-up trees of sysfs."""

import errno
import os
from pathlib import Path

import pytest

from sparsekd.energy import EnergyMeter

from .hardware import JETSON, ONE_SOCKET, TWO_SOCKETS, Powercap, assert_unavailable, make_hwmon, make_machine, make_pmu


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
    assert_unavailable(meter.reading, "rapl", "modprobe intel_rapl_msr", "perf", "modprobe rapl", "hwmon")


def test_zones_masked_by_a_container(board, tmp_path):
    (tmp_path / "powercap").mkdir()
    (tmp_path / "powercap" / "intel-rapl:0").symlink_to(tmp_path / "masked")
    (tmp_path / "container").touch()
    with EnergyMeter("cpu", source="rapl", machine=make_machine(board, tmp_path)) as meter:
        pass
    assert_unavailable(meter.reading, "systempaths=unconfined")


def test_a_virtual_machine_is_named_as_what_it_is(board, tmp_path):
    (tmp_path / "cpuinfo").write_text("model name\t: EPYC\nflags\t\t: fpu hypervisor avx2\n")
    (tmp_path / "container").touch()  # a container in a virtual machine: the host is the only way
    with EnergyMeter("cpu", machine=make_machine(board, tmp_path)) as meter:
        pass
    assert_unavailable(meter.reading, "measure on the host")
    assert "modprobe rapl" not in meter.reading.reason and "docker" not in meter.reading.reason


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


@pytest.mark.parametrize(
    ("deny", "fix"),
    [(errno.EACCES, "sysctl kernel.perf_event_paranoid=0"), (errno.EPERM, "docker run --cap-add PERFMON")],
)
def test_perf_not_allowed_names_the_fix(board, tmp_path, deny, fix):
    perf_open, _, _ = make_pmu(tmp_path, board, deny=deny)
    with EnergyMeter("cpu", source="perf", machine=make_machine(board, tmp_path, perf_open=perf_open)) as meter:
        pass
    assert_unavailable(meter.reading, fix)


@pytest.mark.parametrize(
    "file", ["type", "cpumask", "events/energy-pkg", "events/energy-ram.scale", "events/energy-pkg.unit"]
)
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
