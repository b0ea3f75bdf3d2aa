"""NVIDIA GPUs through NVML (`nvidia-ml-py`, imported as `pynvml`): the energy counter, or power integrated over time.

https://docs.nvidia.com/deploy/nvml-api/ : nvmlDeviceGetTotalEnergyConsumption counts millijoules since the driver was
loaded (Volta and newer); power is milliwatts, instantaneous by field 186 and a one-second average otherwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .channel import Channel, CounterError, Machine, Source

_FIELD_POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT of nvml.h

# NVML does not tell how often its sensors refresh. 20-100 ms was seen for power on data-centre GPUs
# (arXiv 2312.02741, section 4); the slow end is taken, so that a window is rather called too short than good enough.
_INSTANT_TICK = 0.1
_AVERAGE_TICK = 1.0

# NVML error code -> what to do about it
_FIXES = {
    3: "this GPU or virtual GPU has no such counter",
    4: "run as a user who may open /dev/nvidia* (in a container: --gpus all with NVIDIA's container toolkit)",
    6: "no GPU has this UUID; see `nvidia-smi -L`",
    9: "load the NVIDIA driver: `sudo modprobe nvidia`",
    12: "install the NVIDIA driver (in a container: --gpus all with NVIDIA's container toolkit)",
    15: "the GPU fell off the bus: see `dmesg | grep Xid`, then reset it or restart the machine",
    16: "reset the GPU: `sudo nvidia-smi --gpu-reset`",
    18: "driver and library differ in version: restart the machine",
}


@contextmanager
def _explained(nvml: Any, name: str, call: str) -> Iterator[None]:
    """Turn an NVML error inside the block into a CounterError that says what to do."""
    try:
        yield
    except nvml.NVMLError as error:
        code = getattr(error, "value", None)
        fix = _FIXES.get(code, "see `nvidia-smi`") if isinstance(code, int) else "see `nvidia-smi`"
        raise CounterError(f"{name}: {call} says {error!s}: {fix}") from error


def open_nvml(machine: Machine, devices: Sequence[str], *, integrate: bool) -> Source:
    """Open the GPUs that `devices` ("cuda", "cuda:1", ...) names, all of them by counter or all by power integral.

    Raises CounterError where a GPU cannot be read.
    """
    nvml = machine.nvml
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise CounterError("nvidia-ml-py is not installed: `pip install nvidia-ml-py`") from error
    with _explained(nvml, "NVML", "nvmlInit"):
        nvml.nvmlInit()
    try:
        opener = _power_channel if integrate else _counter_channel
        channels = [opener(nvml, handle, name) for name, handle in _chosen(nvml, machine, devices)]
    except BaseException:
        nvml.nvmlShutdown()
        raise
    return Source("nvml-power-integral" if integrate else "nvml-counter", channels, close=nvml.nvmlShutdown)


def _chosen(nvml: Any, machine: Machine, devices: Sequence[str]) -> list[tuple[str, Any]]:
    """(name, handle) of each device asked for, numbered as CUDA numbers them in this process."""
    visible = _visible(nvml, machine)
    if not visible:
        raise CounterError("no GPU is visible to this process: see `nvidia-smi -L` and CUDA_VISIBLE_DEVICES")
    if "cuda" in devices:
        wanted = list(range(len(visible)))
    else:
        wanted = sorted({int(device.partition(":")[2]) for device in devices})
    if wanted[-1] >= len(visible):
        raise CounterError(f"cuda:{wanted[-1]} was asked for, and {len(visible)} GPU(s) are visible to this process")
    chosen = [(f"cuda:{i}", visible[i]) for i in wanted]
    for name, handle in chosen:
        _refuse_mig(nvml, name, handle)
    return chosen


def _visible(nvml: Any, machine: Machine) -> list[Any]:
    """Handles of the GPUs CUDA shows to this process, in CUDA's order: an NVML index is no CUDA index."""
    uuids = machine.cuda_uuids()
    with _explained(nvml, "NVML", "listing the GPUs"):
        if uuids is not None:
            return [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        by_slot = machine.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        if not by_slot and len({nvml.nvmlDeviceGetName(handle) for handle in handles}) > 1:
            raise CounterError(
                "GPUs of several models, which CUDA numbers by speed and NVML by slot: set "
                "CUDA_DEVICE_ORDER=PCI_BUS_ID, or start CUDA (torch.cuda.init()) before the meter"
            )
        mask = machine.environ.get("CUDA_VISIBLE_DEVICES")
        return handles if mask is None else _masked(mask, handles, [nvml.nvmlDeviceGetUUID(h) for h in handles])


def _masked(mask: str, handles: list[Any], uuids: list[str]) -> list[Any]:
    """What CUDA_VISIBLE_DEVICES leaves; like CUDA, stop at the first entry that names no GPU."""
    left: list[Any] = []
    for entry in (part.strip() for part in mask.split(",")):
        if entry.startswith("MIG-"):
            raise CounterError(
                f"CUDA_VISIBLE_DEVICES names {entry}: energy is counted for a whole GPU, not for a MIG instance; "
                "measure on a GPU without MIG"
            )
        index = int(entry) if entry.isdecimal() else next((i for i, u in enumerate(uuids) if u.startswith(entry)), -1)
        if not entry or not 0 <= index < len(handles):
            break
        left.append(handles[index])
    return left


def _refuse_mig(nvml: Any, name: str, handle: Any) -> None:
    try:
        current = nvml.nvmlDeviceGetMigMode(handle)[0]
    except nvml.NVMLError:  # GPUs without MIG do not support the question
        return
    if current:
        raise CounterError(
            f"{name} is split by MIG: its counter covers the whole GPU, other instances included; switch MIG off "
            "(`sudo nvidia-smi -mig 0`) or measure on another GPU"
        )


def _counter_channel(nvml: Any, handle: Any, name: str) -> Channel:
    def read() -> float:
        with _explained(nvml, name, "nvmlDeviceGetTotalEnergyConsumption"):
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1e-3  # mJ

    read()
    return Channel(name, read)


def _power_channel(nvml: Any, handle: Any, name: str) -> Channel:
    def average() -> float:
        with _explained(nvml, name, "nvmlDeviceGetPowerUsage"):
            return float(nvml.nvmlDeviceGetPowerUsage(handle)) * 1e-3  # mW

    def instant() -> float:
        with _explained(nvml, name, "nvmlDeviceGetFieldValues"):
            field = nvml.nvmlDeviceGetFieldValues(handle, [_FIELD_POWER_INSTANT])[0]
            if field.nvmlReturn:
                raise nvml.NVMLError(field.nvmlReturn)
            return float(field.value.uiVal) * 1e-3

    read: Callable[[], float] = instant
    tick = _INSTANT_TICK
    try:
        instant()
    except CounterError:  # older drivers lack the field; the average is the same power, one second late
        average()
        read, tick = average, _AVERAGE_TICK
    return Channel(name, read, is_power=True, tick=tick)
