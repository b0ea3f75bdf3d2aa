"""The cross-check of the energy meter with Zeus."""

import sys
from pathlib import Path
from types import SimpleNamespace

from benchmarks.power import zeus_check
from sparsekd.energy import EnergyMeter, Machine, Reading

ROOT = Path(__file__).parents[2]


class FakeZeus:
    """zeus.monitor.ZeusMonitor, whose windows end with these joules."""

    def __init__(self, gpu=None, cpu=None, dram=None):
        self.measured = SimpleNamespace(gpu_energy=gpu or {}, cpu_energy=cpu, dram_energy=dram)
        self.calls = []

    def begin_window(self, key):
        self.calls.append(("begin", key))

    def end_window(self, key):
        self.calls.append(("end", key))
        return self.measured


def reading(source="nvml-counter", ticks=1000, **per_device):
    devices = {name.replace("_", ":"): joules for name, joules in per_device.items()}
    return Reading(sum(devices.values()), 10.0, 1.0, source, ticks, None, devices)


def test_zeus_meters_the_same_work():
    zeus = FakeZeus(cpu={0: 1.0})
    machine = Machine(powercap=ROOT / "none", hwmon=ROOT / "none", events=ROOT / "none")
    ours, theirs = zeus_check.both(lambda: zeus.calls.append("work"), EnergyMeter("cpu", machine=machine), zeus)
    assert zeus.calls == [("begin", "check"), "work", ("end", "check")] and theirs is zeus.measured
    assert ours.joules is None and zeus_check.rows(ours, theirs) == [] and zeus_check.verdict(ours, []) == 2


def test_each_gpu_and_the_sum_of_all_sockets_are_compared():
    ours = reading(cuda_0=100.0, cuda_1=200.0)
    found = zeus_check.rows(ours, FakeZeus(gpu={0: 101.0, 1: 199.0}).measured)
    assert found == [("cuda:0", 100.0, 101.0), ("cuda:1", 200.0, 199.0)] and zeus_check.verdict(ours, found) == 0
    assert zeus_check.verdict(ours, zeus_check.rows(ours, FakeZeus(gpu={0: 101.0, 1: 150.0}).measured)) == 1
    ours = reading("rapl", package=90.0, dram=10.0)
    found = zeus_check.rows(ours, FakeZeus(cpu={0: 60.0, 1: 29.0}, dram={0: 11.0}).measured)
    assert found == [("cpu", 100.0, 100.0)]


def test_without_zeus_there_is_nothing_to_compare(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    assert zeus_check.main([]) == 2
    assert "pip install zeus" in capsys.readouterr().out
