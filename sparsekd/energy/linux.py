"""Counters the Linux kernel shows: powercap (RAPL), perf energy events, hwmon rails.

Formats: kernel Documentation/power/powercap/powercap.rst, Documentation/hwmon/sysfs-interface.rst (energy in uJ, power
in uW, voltage in mV, current in mA), /sys/bus/event_source/devices/power (scale: joules of one count).
"""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from .channel import Channel, CounterError, Machine, Source

_ZONE = re.compile(r"(?P<control>intel-rapl(?:-mmio)?):(?P<package>\d+)(?P<sub>:\d+)?$")

# Rails that hold everything below them, so that nothing is counted twice; the first entry that matches is taken.
_WHOLE_RAILS = ("ina3221/VDD_IN", "ina3221/POM_5V_IN", "amd_energy/Esocket*", "power_meter/*")


def _missing(machine: Machine, module: str) -> str:
    """Why a machine shows no counter of its processor, and the way out."""
    info = machine.cpuinfo.read_text() if machine.cpuinfo.exists() else ""
    if re.search(r"^flags\s*:.*\bhypervisor\b", info, re.MULTILINE):
        return "this is a virtual machine, to which its host shows no energy counter: measure on the host"
    if any(mark.exists() for mark in machine.container_marks):
        return "a container hides it: `docker run --security-opt systempaths=unconfined`, or measure outside"
    return f"on x86 bare metal load it with `sudo modprobe {module}`"


def _text(path: Path, fix: str) -> str:
    try:
        return path.read_text().strip()
    except PermissionError as error:
        raise CounterError(f"{path} is not readable by this user: {fix}") from error
    except OSError as error:
        raise CounterError(f"{path} cannot be read ({error.strerror or error})") from error


def _number(path: Path, scale: float, fix: str) -> float:
    text = _text(path, fix)
    try:
        return int(text) * scale
    except ValueError as error:
        raise CounterError(f"{path} should hold an integer, got {text[:40]!r}") from error


def _file_channel(name: str, path: Path, scale: float, fix: str, **options: float | bool | None) -> Channel:
    return Channel(name, lambda: _number(path, scale, fix), **options)  # type: ignore[arg-type]


def _selected(channels: list[Channel], domains: Sequence[str] | None, where: Path) -> list[Channel]:
    """The channels whose names match `domains` (fnmatch patterns), all without; equal names get a number."""
    names = Counter(c.name for c in channels)
    seen: Counter[str] = Counter()
    unique = []
    for channel in channels:
        seen[channel.name] += 1
        suffix = f"#{seen[channel.name]}" if names[channel.name] > 1 else ""
        unique.append(replace(channel, name=channel.name + suffix))
    if domains is None:
        return unique
    kept = [c for c in unique if any(fnmatch(c.name, pattern) for pattern in domains)]
    if not kept:
        raise CounterError(f"no domain under {where} matches {list(domains)}; there are {[c.name for c in unique]}")
    return kept


def open_rapl(machine: Machine, domains: Sequence[str] | None) -> Source:
    """Every package and every dram zone of /sys/class/powercap: the parts of a socket that do not overlap.

    core and uncore lie inside package, psys around it, and intel-rapl-mmio shows the same package once more: counting
    any of them too would count joules twice.
    """
    root, missing = machine.powercap, _missing(machine, "intel_rapl_msr")
    zones: dict[str, list[tuple[str, Path, bool]]] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if match := _ZONE.match(path.name):
            zones.setdefault(match["control"], []).append((match["package"], path, match["sub"] is not None))
    chosen = zones.get("intel-rapl") or zones.get("intel-rapl-mmio")
    if not chosen:
        raise CounterError(f"no RAPL zone under {root}: {missing}")
    if not (chosen[0][1] / "name").exists():
        raise CounterError(f"the RAPL zones under {root} are empty: {missing}")
    fix = f"`sudo chmod a+r {root}/intel-rapl*/energy_uj` (until the next boot; a udev rule for powercap keeps it)"
    package_names = {number: _text(path / "name", fix) for number, path, is_sub in chosen if not is_sub}
    channels = []
    for number, path, _ in chosen:
        zone = _text(path / "name", fix)
        if zone.startswith("package") or zone == "dram":
            name = f"dram/{package_names.get(number, number)}" if zone == "dram" else zone
            wrap = _number(path / "max_energy_range_uj", 1e-6, fix)
            channels.append(_file_channel(name, path / "energy_uj", 1e-6, fix, wrap=wrap))
    if not channels:
        raise CounterError(f"{root} has RAPL zones, but neither package nor dram among them: {missing}")
    return Source("rapl", _selected(channels, domains, root))


def open_perf(machine: Machine, domains: Sequence[str] | None) -> Source:
    """The perf events power/energy-pkg/ and power/energy-ram/, one per socket: 64-bit counts that do not wrap."""
    root = machine.events / "power"
    if not (root / "type").exists():
        raise CounterError(f"no perf energy events, {root} is missing: {_missing(machine, 'rapl')}")
    fix = "`sudo sysctl kernel.perf_event_paranoid=0` (until the next boot)"
    fds: list[int] = []
    channels = []
    try:
        kind = int(_number(root / "type", 1, fix))
        cpus = _cpu_list(_text(root / "cpumask", fix))
        for event, domain in (("energy-pkg", "package"), ("energy-ram", "dram")):
            if not (root / "events" / event).exists():
                continue
            config = _event_config(_text(root / "events" / event, fix))
            scale = _joules_per_count(root / "events" / event, fix)
            for cpu in cpus:
                fds.append(_perf_fd(machine, kind, config, cpu, event, fix))
                channels.append(Channel(f"{domain}@cpu{cpu}", _perf_reader(fds[-1], scale)))
        if not channels:
            raise CounterError(f"{root}/events has neither energy-pkg nor energy-ram")
        channels = _selected(channels, domains, root)
    except BaseException as error:
        _close_all(fds)
        if isinstance(error, ValueError):
            raise CounterError(f"{root} holds what no kernel is known to write there: {error}") from error
        raise
    return Source("perf", channels, close=lambda: _close_all(fds))


def _joules_per_count(event: Path, fix: str) -> float:
    unit = _text(event.with_name(f"{event.name}.unit"), fix)
    if unit != "Joules":
        raise CounterError(f"{event}.unit should hold Joules, got {unit[:40]!r}")
    return float(_text(event.with_name(f"{event.name}.scale"), fix))


def _perf_fd(machine: Machine, kind: int, config: int, cpu: int, event: str, fix: str) -> int:
    try:
        return machine.perf_open(kind, config, cpu)
    except PermissionError as error:
        if error.errno == errno.EPERM:  # of a seccomp filter; the kernel's own check says EACCES
            fix = "a container forbids the call: `docker run --cap-add PERFMON`"
        raise CounterError(f"perf_event_open(power/{event}/) is not allowed to this user: {fix}") from error
    except OSError as error:
        raise CounterError(f"perf_event_open(power/{event}/) failed: {error}") from error


def _perf_reader(fd: int, scale: float) -> Callable[[], float]:
    def read() -> float:
        try:
            return int.from_bytes(os.read(fd, 8), "little") * scale
        except OSError as error:
            raise CounterError(f"the perf energy event can no longer be read: {error}") from error

    return read


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _cpu_list(text: str) -> list[int]:
    """Parse a kernel CPU list: 0,14-15 -> [0, 14, 15]."""
    cpus: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def _event_config(text: str) -> int:
    """Parse a perf event alias: event=0x02 -> 2."""
    match = re.fullmatch(r"event=(0x[0-9a-fA-F]+)", text)
    if match is None:
        raise CounterError(f"a perf energy event should read event=0x.., got {text[:40]!r}")
    return int(match[1], 16)


def open_hwmon(machine: Machine, domains: Sequence[str] | None) -> Source:
    """Energy or power rails of /sys/class/hwmon, named "chip/label".

    Rails may hold one another, and nothing in sysfs says which. Without `domains` only rails known to hold everything
    are taken (the Jetson module's input, AMD sockets, the chassis' power meter).
    """
    root = machine.hwmon
    found: list[Channel] = []
    for chip in sorted(root.iterdir()) if root.is_dir() else []:
        found.extend(_rails(chip))
    if not found:
        raise CounterError(
            f"no energy or power rail under {root}; there is one on a Jetson (JetPack 5 or newer) and, after "
            "`sudo modprobe acpi_power_meter`, on servers whose firmware measures"
        )
    if domains is None:
        for pattern in _WHOLE_RAILS:
            if any(fnmatch(c.name, pattern) for c in found):
                return Source("hwmon", _selected(found, [pattern, f"{pattern}#*"], root))
        raise CounterError(
            f"none of the rails under {root} is known to hold the whole machine: name those to add up, none of which "
            f"may hold another: EnergyMeter(domains=[...]) from {[c.name for c in found]}"
        )
    return Source("hwmon", _selected(found, domains, root))


def _rails(chip: Path) -> list[Channel]:
    """Every rail of one chip, by its counter where it has one, else its power, else (ina*) volts times amperes."""
    if not (chip / "name").exists():
        return []
    chip_name = _text(chip / "name", "")
    files = {path.name for path in chip.iterdir()}
    rails: dict[str, Channel] = {}
    for file in sorted(files):
        match = re.fullmatch(r"(energy|power|in)(\d+)_(input|average)", file)
        if match is None or match[2] in rails:  # sorted: energy3 comes before in3 and power3
            continue
        kind, number, _ = match.groups()
        label = next((f"{k}{number}_label" for k in ("energy", "power", "in") if f"{k}{number}_label" in files), None)
        name = f"{chip_name}/{_text(chip / label, '') if label else kind + number}"
        fix = f"`sudo chmod a+r {chip / file}`"
        if kind == "energy":
            rails[number] = _file_channel(name, chip / file, 1e-6, fix)
        elif kind == "power":
            rails[number] = _file_channel(name, chip / file, 1e-6, fix, is_power=True, tick=_interval(chip, number))
        elif chip_name.startswith("ina") and f"curr{number}_input" in files and f"power{number}_input" not in files:
            rails[number] = Channel(
                name, _volts_amperes(chip, number, fix), is_power=True, tick=_interval(chip, number)
            )
    return list(rails.values())


def _volts_amperes(chip: Path, number: str, fix: str) -> Callable[[], float]:
    volts, amperes = chip / f"in{number}_input", chip / f"curr{number}_input"
    return lambda: _number(volts, 1e-3, fix) * _number(amperes, 1e-3, fix)


def _interval(chip: Path, number: str) -> float:
    """Seconds between two updates of a power rail; 0.1 where the driver does not say."""
    for file in (chip / f"power{number}_average_interval", chip / "update_interval"):
        if file.exists():
            return max(_number(file, 1e-3, ""), 1e-3)
    return 0.1
