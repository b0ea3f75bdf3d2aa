"""The day there is a GPU, for a quarter of an hour: a first run of 8 minutes, a second of 4, nothing lost when cut off.

    python -m benchmarks.gpu.run prepare --python python3.12   # before: the package, and the compile cache
    python -m benchmarks.gpu.run first --out DIR         # again after an interruption: it goes on where it was
    python -m benchmarks.gpu.run second --out DIR
    python -m benchmarks.gpu.run first --rehearse        # every step of it here, interpreted, on tiny shapes

Each step is a process with a time limit. What it measures is a line of JSON on the disk at once (rows/*.jsonl); which
steps have finished, and how, is in state.json; after each step everything is packed into DIR.tar.gz. A step that ran
out of time, or failed, is run again by the next call; one that has finished is not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "gpu-cache"  # of Triton: one path on both machines, or its keys differ
TESTS = ["tests/cuda", "tests/freeze/test_cuda.py"]
LAYERS = ["--batch", "256", "--density", "0.5", "0.3", "0.1", "--mask", "wide", "free"]


@dataclass(frozen=True)
class Step:
    """A command of at most ``seconds``; ``rehearsal`` replaces its arguments on a machine without a GPU."""

    name: str
    seconds: int
    command: list[str]
    rehearsal: list[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a program that must be there, else the step says so and is left out


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def _pytest(*arguments: str, workers: int = 14) -> list[str]:
    spread = ["-n", str(workers)] if workers and importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *spread, *arguments]


def first(out: str) -> list[Step]:
    """Whether it is right, then what decides what to do next: 8 minutes."""
    preset = ["--batch", "256", "--density", "0.3", "--acceptance", "--preset", "--out", out]
    network = ["infer", "--network", "resnet50", "--batch", "256", "--compiled", "--frozen-alone", "--out", out]
    train = ["train", "--network", "wrn-28-10", "--batch", "128", "--density", "0.3", "--compiled", "--out", out]
    energy = ["energy", "--network", "resnet50", "--density", "0.3", "--window", "3", "--rounds", "3"]
    losses = _module("attention", "--pair", "resnet", "--json", f"{out}/losses_resnet.json")
    return [
        Step("ceilings", 20, _module("gpu.ceilings", "--out", out)),
        Step("tests", 90, _pytest(*TESTS), _pytest("tests/cuda/test_index.py", "tests/cuda/test_plan.py", workers=0)),
        Step("trips", 60, _module("gpu.trips", "--out", out)),
        Step("layers", 90, _module("gpu.layers", *LAYERS, "--acceptance", "--out", out)),
        Step("preset", 40, _module("gpu.layers", *preset)),
        Step("network", 75, _module("gpu.network", *network)),
        Step("training", 50, _module("gpu.network", *train)),
        Step("energy", 60, _module("gpu.network", *energy, "--cooldown", "1", "--out", out)),
        Step("losses", 25, [*losses, "--device", "cuda"], [*losses, "--quick"]),
        Step("table", 20, _module("gpu.table", out)),
    ]


def second(out: str) -> list[Step]:
    """Memory and races, a profile, and what the first run left out: 4 minutes."""
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9"]
    every_tile = _pytest("tests/cuda/test_kernels.py", "-k", "every_tile", workers=0)
    one_case = _pytest("tests/cuda/test_driver.py", "-k", "gpu_every_case and 3x3", workers=0)
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    infer = ["infer", "--network", "wrn-28-10", "--batch", "128", "--frozen-alone", "--out", out]
    here = _pytest("tests/cuda/test_index.py", workers=0)
    losses = _module("attention", "--pair", "resnet", "--json", f"{out}/losses_compiled.json")
    return [
        Step("memory", 80, [*sanitizer, "--tool", "memcheck", *every_tile], here, uncached, "compute-sanitizer"),
        Step("races", 30, [*sanitizer, "--tool", "racecheck", *one_case], here, uncached, "compute-sanitizer"),
        Step("profile", 30, _module("gpu.trips", "--profile", "--out", out)),
        Step("wrn frozen", 40, _module("gpu.network", *infer)),
        Step("reduce-overhead", 30, _pytest("tests/cuda/test_gpu.py", "-k", "reduce_overhead", workers=0), here),
        Step("losses compiled", 30, [*losses, "--device", "cuda"], [*losses, "--quick"]),
        Step("second table", 20, _module("gpu.table", out)),
    ]


RUNS = {"first": first, "second": second}


def execute(steps: list[Step], out: Path, rehearse: bool, seconds: float) -> bool:
    """Run what has not finished yet, for at most ``seconds`` in all; whether nothing is left."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "logs").mkdir(exist_ok=True)
    state, began, complete = _read_state(out), time.monotonic(), True
    for step in steps:
        if state.get(step.name, {}).get("status") in ("done", "left out"):
            print(f"== {step.name}: {state[step.name]['status']} earlier", flush=True)
            continue
        left = seconds - (time.monotonic() - began)
        if left < 5:
            print(f"== {step.name}: no time is left; the same command goes on here", flush=True)
            complete = False
            break
        found = run_step(step, out, rehearse, min(left, step.seconds * (10 if rehearse else 1)))
        state[step.name] = found
        _write_state(out, state)
        archive(out)
        complete &= found["status"] in ("done", "left out")
        print(f"== {step.name}: {found['status']} after {found['seconds']} s", flush=True)
    return complete


def run_step(step: Step, out: Path, rehearse: bool, limit: float) -> dict[str, Any]:
    """One step in a process group of its own, which ends with its time."""
    if step.needs and not rehearse and shutil.which(step.needs) is None:
        return {"status": "left out", "seconds": 0, "why": f"{step.needs} is not on PATH"}
    command = step.command
    if rehearse:
        command = step.rehearsal if step.rehearsal is not None else [*step.command, "--rehearse"]
        command = step.command if step.name.endswith("table") else command
    plan = {"SPARSEKD_PLAN": str(out / "plan.json"), "TRITON_CACHE_DIR": str(CACHE)}
    environment = {**os.environ, **plan, **({} if rehearse else step.environment)}
    began = time.monotonic()
    with (out / "logs" / f"{step.name.replace(' ', '-')}.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    status = "cut off" if code is None else "done" if code == 0 else f"failed ({code})"
    return {"status": status, "seconds": round(time.monotonic() - began, 1), "limit": step.seconds}


def archive(out: Path) -> None:
    """Everything in one file, whole or not at all."""
    target = out.with_suffix(".tar.gz")
    partial = target.with_suffix(".partial")
    with tarfile.open(partial, "w:gz", compresslevel=3) as tar:
        tar.add(out, arcname=out.name)
    os.replace(partial, target)


def _read_state(out: Path) -> dict[str, Any]:
    path = out / "state.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write_state(out: Path, state: dict[str, Any]) -> None:
    partial = out / "state.json.partial"
    partial.write_text(json.dumps(state, indent=1) + "\n")
    os.replace(partial, out / "state.json")


def prepare(python: str | None) -> None:
    """Compile what the first run will ask for into the cache that it reads, and the package for another Python.

    The wheel has the CUDA C++ kernels where nvcc is found.
    """
    if python is not None:
        wheel = [python, "-m", "pip", "wheel", "--no-deps", "-w", str(ROOT / "build" / "gpu-wheel"), "."]
        subprocess.run(wheel, cwd=ROOT, check=True)
    subprocess.run(_module("gpu.dry_run", "--compile", str(CACHE)), cwd=ROOT, check=True)
    size = sum(path.stat().st_size for path in CACHE.rglob("*") if path.is_file())
    print(f"{CACHE}: {size / 2**20:.1f} MiB, to lie at the same path on the machine with the GPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=["prepare", *RUNS])
    parser.add_argument("--out", default="benchmarks/results/gpu")
    parser.add_argument("--seconds", type=float, help="of the whole call; default 540, or no limit in a rehearsal")
    parser.add_argument("--step", nargs="*", help="these alone, though they have finished")
    parser.add_argument("--python", help="prepare: build the package for this interpreter, say python3.12")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if options.run == "prepare":
        return prepare(options.python)
    out = Path(options.out).resolve()
    steps = RUNS[options.run](str(out))
    if options.step:
        if unknown := set(options.step) - {step.name for step in steps}:
            parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in steps)}")
        steps = [step for step in steps if step.name in options.step]
        if out.is_dir():
            _write_state(out, {name: one for name, one in _read_state(out).items() if name not in options.step})
    seconds = options.seconds or (1e9 if options.rehearse else 540)
    if not execute(steps, out, options.rehearse, seconds):
        sys.exit(75)  # as `sparsekd run`: call it again


if __name__ == "__main__":
    main()
