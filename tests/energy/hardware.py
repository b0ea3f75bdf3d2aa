"""Made-up hardware: a board whose clock and joules a test moves, a powercap tree, a PMU, hwmon chips, an NVML."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from pathlib import Path
from types import SimpleNamespace

from sparsekd.energy import (
    EnergyMeter,
    Machine,
)


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


def make_machine(board: Board, root: Path = Path("/nonexistent"), **options: object) -> Machine:
    """The board's machine: no counter but those under `root` and in `options`."""
    defaults: dict[str, object] = {
        "powercap": root / "powercap",
        "hwmon": root / "hwmon",
        "events": root / "events",
        "cpuinfo": root / "cpuinfo",
        "container_marks": (root / "container",),
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
        "events/energy-pkg.unit": "Joules",
        "events/energy-ram.unit": "Joules",
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
