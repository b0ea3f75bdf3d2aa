"""What this machine offers sparsekd, and for everything that is missing the reason and the way out.

Nothing here may fail: a part that cannot even be asked is reported with what it raised.
"""

from __future__ import annotations

import importlib
import os
import platform
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from . import processor
from .energy import Machine, available_sources

Import = Callable[[str], ModuleType]


def collect(
    import_module: Import = importlib.import_module, machine: Machine | None = None, measure: bool = False
) -> dict[str, Any]:
    """The facts as plain dicts, lists, strings and numbers, ready for json.

    Keys: python, cpu, threads, torch, triton, gpu, energy, dispatch; with `measure` also peak, which keeps all threads
    busy for half a second. A part that is missing has a "reason". Takes a few seconds where there are energy counters,
    whose update period is measured. Tests hand in `import_module` and `machine`.
    """
    # torch first: its OpenMP run time is then the one the compiled kernels share.
    torch, torch_reason = _imported(import_module, "torch", "`pip install torch`")
    native, native_reason = _imported(import_module, "sparsekd._C", "`pip install sparsekd` builds it")
    threads = _threads(torch, torch_reason, native)
    return {
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "cpu": _cpu(native, native_reason, machine.cpuinfo if machine else processor.CPUINFO),
        **({"peak": _peak(native, native_reason, threads["torch"] or os.cpu_count() or 1)} if measure else {}),
        "threads": threads,
        "torch": _version(torch, torch_reason),
        "triton": _version(*_imported(import_module, "triton", "`pip install triton` (Linux)")),
        "gpu": _gpu(torch, torch_reason),
        "energy": _energy(machine),
        "dispatch": _dispatch(import_module),
    }


# What the CPU kernels are where none was chosen: the module is missing, or SPARSEKD_CPU_ISA asks for what is not there.
NO_KERNELS = {False: "pure-torch reference", True: "none: float32 ops on the CPU will raise"}


def report(facts: dict[str, Any] | None = None) -> str:
    """The facts of `collect()` as text: one line per part, an indented line per reason; then what runs ops."""
    facts = collect() if facts is None else facts
    cpu, threads, gpu = facts["cpu"], facts["threads"], facts["gpu"]
    isas = f"{cpu['isa']} chosen of {', '.join(cpu['isas'])}" if cpu["isa"] else NO_KERNELS[bool(cpu["isas"])]
    forced = f" (SPARSEKD_CPU_ISA={cpu['forced']})" if cpu["forced"] else ""
    rows = [
        ("python", f"{facts['python']['version']} on {facts['python']['platform']}", None),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores", None),
        ("cpu kernels", isas + forced, cpu["reason"]),
        ("cpu cache", _cache_said(cpu["l1_data"]), None),
        *([("cpu peak", _said(facts["peak"]), facts["peak"]["reason"])] if "peak" in facts else []),
        ("threads", f"{threads['torch'] or 'unknown'}, OpenMP: {threads['openmp'] or 'unknown'}", threads["reason"]),
        ("torch", facts["torch"]["version"] or "missing", facts["torch"]["reason"]),
        ("triton", facts["triton"]["version"] or "missing", facts["triton"]["reason"]),
        ("gpu", "; ".join(gpu["devices"]) or "none", gpu["reason"]),
    ]
    for status in facts["energy"]["sources"]:
        tick = f", updated every {1e3 * status['tick']:.3g} ms" if status["tick"] else ""
        seen = f"readable: {', '.join(status['devices'])}{tick}" if status["readable"] else "not readable"
        rows.append((f"energy {status['source']}", seen, status["reason"]))
    if facts["energy"]["reason"]:
        rows.append(("energy", "unknown", facts["energy"]["reason"]))
    dispatch = facts["dispatch"]
    if dispatch["reason"]:
        rows.append(("ops", "unknown", dispatch["reason"]))
    width = max(len(name) for name, _, _ in rows)
    lines = []
    for name, value, reason in rows:
        lines.append(f"{name:<{width}}  {value}")
        if reason:
            lines.append(f"{'':<{width}}    {reason}")
    lines += [line for device in _devices(dispatch["ops"]) for line in _ops_on(device, dispatch["ops"])]
    return "\n".join(lines)


def _devices(ops: dict[str, dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(device for chosen in ops.values() for device in chosen))


def _ops_on(device: str, ops: dict[str, dict[str, str]]) -> list[str]:
    """What runs the ops on a device: each kernel once, and below it the ops that it runs."""
    by_kernel: dict[str, list[str]] = {}
    for op, chosen in ops.items():
        if device in chosen:
            by_kernel.setdefault(chosen[device], []).append(op)
    lines = [f"ops on {device}"]
    for kernel, names in by_kernel.items():
        lines += [f"  {kernel}", *textwrap.wrap(", ".join(names), 100, initial_indent=_DEEP, subsequent_indent=_DEEP)]
    return lines


_DEEP = 6 * " "


def _attempt(question: Callable[[], Any]) -> tuple[Any, str | None]:
    """(answer, None), or (None, what was raised): a broken part has to be reported, whatever it raises."""
    try:
        return question(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _imported(import_module: Import, name: str, fix: str) -> tuple[Any, str | None]:
    module, reason = _attempt(lambda: import_module(name))
    return module, f"import {name} failed with {reason}; {fix}" if reason else None


def _joined(*reasons: str | None) -> str | None:
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason)) or None


def _energy(machine: Machine | None) -> dict[str, Any]:
    found, reason = _attempt(lambda: available_sources(machine))
    # a list for the tuple of devices, the way json gives it back
    sources = [vars(status) | {"devices": list(status.devices)} for status in found or []]
    return {"sources": sources, "reason": reason}


def _version(module: Any, reason: str | None) -> dict[str, Any]:
    version, failed = (None, None) if module is None else _attempt(lambda: str(module.__version__))
    return {"version": version, "reason": _joined(reason, failed)}


def _cpu(native: Any, reason: str | None, cpuinfo: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": processor.name(cpuinfo),
        "cores": os.cpu_count(),
        "isas": [],
        "isa": None,
        "forced": os.environ.get("SPARSEKD_CPU_ISA"),
        "l1_data": None,
        "reason": None,
    }
    if native is None:
        facts["reason"] = f"every op runs on its pure-torch reference: {reason}"
        return facts
    isas, isas_failed = _attempt(lambda: [str(isa) for isa in native.isas()])
    facts["isas"] = isas or []
    facts["isa"], isa_failed = _attempt(lambda: str(native.isa()))
    cache, cache_failed = _attempt(lambda: native.l1_data_cache())
    facts["l1_data"] = cache and {"bytes": int(cache[0]), "source": str(cache[1])}
    facts["reason"] = _joined(isas_failed, isa_failed, cache_failed)
    return facts


def _peak(native: Any, reason: str | None, threads: int) -> dict[str, Any]:
    """Multiply-adds in float32, 1e9 operations a second, of one thread and of all, for each vector instruction set."""
    facts: dict[str, Any] = {"threads": threads, "gflops": {}, "avx512_over_avx2": None, "reason": reason}
    if native is None:
        return facts
    chosen, failed = _attempt(lambda: str(native.isa()))
    names, names_failed = _attempt(lambda: [str(isa) for isa in native.isas() if isa != "scalar"])
    facts["reason"] = _joined(failed, names_failed)
    if facts["reason"]:
        return facts

    def measured(isa: str) -> list[float]:
        native.use_isa(isa)
        return [round(native.peak_gflops(count, 0.1), 1) for count in (1, threads)]

    for isa in names:
        facts["gflops"][isa], failed = _attempt(lambda isa=isa: measured(isa))  # type: ignore[misc]
        facts["reason"] = _joined(facts["reason"], failed)
    native.use_isa(chosen)
    narrow, wide = facts["gflops"].get("avx2"), facts["gflops"].get("avx512")
    if narrow and wide:
        facts["avx512_over_avx2"] = round(wide[0] / narrow[0], 2)
    if not names:
        facts["reason"] = "only the scalar kernels run here, which have no peak of their own"
    return facts


def _cache_said(cache: dict[str, Any] | None) -> str:
    """What the kernels take the first level's data cache to be."""
    if cache is None:
        return "unknown"
    said = {"assumed": "assumed, since this machine does not say"}.get(cache["source"], f"by {cache['source']}")
    return f"L1 data {cache['bytes'] / 1024:g} KiB, {said}"


def _said(peak: dict[str, Any]) -> str:
    there = {isa: rates for isa, rates in peak["gflops"].items() if rates}
    said = [
        f"{isa} {rates[0]:g} GFLOP/s on one thread, {rates[1]:g} on {peak['threads']}" for isa, rates in there.items()
    ]
    ratio = peak["avx512_over_avx2"]
    if ratio:  # units of 512 bits reach nearly twice as much, less the clock that they cost
        width = "full" if ratio > 1.25 else "half"
        said.append(f"512-bit multiply-adds do {ratio:g} times the work of 256-bit ones: {width} width")
    return "; ".join(said) or "unknown"


def _threads(torch: Any, torch_reason: str | None, native: Any) -> dict[str, Any]:
    """Threads of torch, and whose OpenMP they are: torch's own, which the kernels share, unless two are loaded."""
    count, count_failed = (None, torch_reason) if torch is None else _attempt(lambda: int(torch.get_num_threads()))
    openmp, openmp_failed = (None, None) if native is None else _attempt(lambda: str(native.openmp()))
    libraries = openmp_libraries()
    several = None
    if len(libraries) > 1:
        several = (
            "several OpenMP run times are loaded, which can stall each other: import torch first, and see which "
            "package brings its own"
        )
    others = [library for library in libraries if library not in (openmp or "")]
    return {
        "torch": count,
        "openmp": ", ".join(filter(None, [openmp, *others])) or None,
        "libraries": libraries,
        "reason": _joined(count_failed, openmp_failed, several),
    }


def openmp_libraries(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Paths of the OpenMP run times mapped into this process; empty where the system does not say (not Linux)."""
    text, _ = _attempt(maps.read_text)
    paths = {line.split(maxsplit=5)[-1] for line in (text or "").splitlines() if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def _gpu(torch: Any, torch_reason: str | None) -> dict[str, Any]:
    if torch is None:
        return {"devices": [], "reason": torch_reason}
    if not getattr(torch.version, "cuda", None) and not getattr(torch.version, "hip", None):
        return {"devices": [], "reason": f"torch {torch.__version__} is built without CUDA; see https://pytorch.org"}
    available, failed = _attempt(torch.cuda.is_available)
    if not available:
        why = failed or "torch sees no GPU: `nvidia-smi` should list one, and CUDA_VISIBLE_DEVICES should not hide it"
        return {"devices": [], "reason": why}
    devices, failed = _attempt(lambda: [_gpu_line(torch, i) for i in range(torch.cuda.device_count())])
    return {"devices": devices or [], "reason": failed}


def _gpu_line(torch: Any, index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"cuda:{index} {found.name}, compute {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"


def _dispatch(import_module: Import) -> dict[str, Any]:
    described, reason = _attempt(lambda: import_module("sparsekd.backends").describe())
    return {"ops": described or {}, "reason": reason and f"sparsekd.backends.describe() failed with {reason}"}
