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
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "gpu-cache"  # of Triton: one path on both machines, for it keeps paths
DATA = ROOT / "build" / "gpu-data"  # CIFAR-100, if it was brought along
STOPPED = 75  # of `sparsekd run`, and here: the same command goes on
TESTS = ["tests/cuda", "tests/freeze/test_cuda.py"]
FEW_TESTS = ["tests/cuda/test_index.py", "tests/cuda/test_plan.py"]
LOSSES = ["--pair", "resnet", "--device", "cuda", "--dtype", "bfloat16", "--batch", "256", "--seconds", "0.2"]
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
    folder: Path | None = None  # likewise a folder
    beside: tuple[list[str], ...] = ()  # commands that run meanwhile, and end with the step's time; not in a rehearsal


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def _losses(path: str, *arguments: str) -> list[str]:
    return _module("attention", "--json", path, *arguments)


def _pytest(*arguments: str, workers: int = 14) -> list[str]:
    spread = ["-n", str(workers)] if workers and importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *spread, *arguments]


def first(out: str) -> list[Step]:
    """Whether it is right, then what decides what to do next: 8 minutes."""
    preset = ["--batch", "256", "--density", "0.3", "--acceptance", "--preset", "--out", out]
    network = ["infer", "--network", "resnet50", "--batch", "256", "--compiled", "--frozen-alone", "--out", out]
    train = ["train", "--network", "wrn-28-10", "--batch", "128", "--density", "0.3", "--compiled", "--out", out]
    energy = ["energy", "--network", "resnet50", "--density", "0.3", "--window", "2", "--rounds", "3", "--compiled"]
    energy = [*energy, "--frozen-alone", "--cooldown", "0.5", "--out", out]
    compiling = tuple(_module("gpu.network", *one, "--compile-only") for one in (network, train))
    losses = _losses(f"{out}/losses_resnet.json", "--no-compile")
    return [
        Step("ceilings", 20, _module("gpu.ceilings", "--out", out)),
        Step("tests", 90, _pytest(*TESTS), _pytest(*FEW_TESTS, workers=0), beside=compiling),
        Step("trips", 50, _module("gpu.trips", "--out", out)),
        Step("layers", 60, _module("gpu.layers", *LAYERS, "--acceptance", "--out", out)),
        Step("preset", 25, _module("gpu.layers", *preset)),
        Step("network", 75, _module("gpu.network", *network)),
        Step("training", 50, _module("gpu.network", *train)),
        Step("energy", 75, _module("gpu.network", *energy)),
        Step("losses", 25, [*losses, *LOSSES], [*losses, "--quick"]),
        Step("table", 10, _module("gpu.table", out)),
    ]


def second(out: str) -> list[Step]:
    """Memory and races, a profile, and what the first run left out: 4 minutes."""
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9"]
    every_tile = _pytest("tests/cuda/test_kernels.py", "-k", "every_tile", workers=0)
    one_case = _pytest("tests/cuda/test_driver.py", "-k", "gpu_every_case and 3x3", workers=0)
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    infer = ["infer", "--network", "wrn-28-10", "--batch", "128", "--frozen-alone", "--out", out]
    here = _pytest("tests/cuda/test_index.py", workers=0)
    losses = _losses(f"{out}/losses_compiled.json")
    return [
        Step("memory", 80, [*sanitizer, "--tool", "memcheck", *every_tile], here, uncached, "compute-sanitizer"),
        Step("races", 30, [*sanitizer, "--tool", "racecheck", *one_case], here, uncached, "compute-sanitizer"),
        Step("profile", 30, _module("gpu.trips", "--profile", "--out", out)),
        Step("wrn frozen", 40, _module("gpu.network", *infer)),
        Step("reduce-overhead", 30, _pytest("tests/cuda/test_gpu.py", "-k", "reduce_overhead", workers=0), here),
        Step("losses compiled", 20, [*losses, *LOSSES], [*losses, "--quick"]),
        Step("second table", 10, _module("gpu.table", out)),
    ]


def images(out: str) -> list[Step]:
    """CIFAR-100 in two parts, for minutes that are left: the second goes on where the first was stopped."""
    command = ["sparsekd", "run", "cifar100", "--data", str(DATA), "--protocol", "reduced", "--device", "cuda"]
    command = [*command, "--no-measure", "--stop-after", "2", "--out", f"{out}/cifar100"]
    rehearsal = [sys.executable, "-m", "sparsekd", "run", "--help"]
    return [
        Step(f"cifar100 {part}", 150, [sys.executable, "-m", *command], rehearsal, folder=DATA)
        for part in ("first part", "second part")
    ]


def embeddings(out: str) -> list[Step]:
    """Packed embedding tables beside dense ones: a minute."""
    return [
        Step("embedding", 50, _module("gpu.embedding", "--out", out)),
        Step("embedding table", 10, _module("gpu.table", out)),
    ]


RUNS = {"first": first, "second": second, "embeddings": embeddings, "images": images}


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
    if step.folder is not None and not rehearse and not step.folder.is_dir():
        return {"status": "left out", "seconds": 0, "why": f"there is no {step.folder}"}
    command = step.command
    if rehearse:
        command = step.rehearsal if step.rehearsal is not None else [*step.command, "--rehearse"]
        command = step.command if step.name.endswith("table") else command
    plan = {"SPARSEKD_PLAN": str(out / "plan.json"), "TRITON_CACHE_DIR": str(CACHE)}
    environment = {**os.environ, **plan, **({} if rehearse else step.environment)}
    began = time.monotonic()
    with (out / "logs" / f"{step.name.replace(' ', '-')}.log").open("a") as log:
        start = partial(
            subprocess.Popen, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        processes = [start(one) for one in (command, *(() if rehearse else step.beside))]
        code, *_ = [_within(process, limit - (time.monotonic() - began)) for process in processes]
    ended = {0: "done", STOPPED: "done", None: "cut off"}  # a training that was told to stop has done its part
    status = ended.get(code, f"failed ({code})")
    return {"status": status, "seconds": round(time.monotonic() - began, 1), "limit": step.seconds}


def _within(process: subprocess.Popen, seconds: float) -> int | None:
    """How a process ended, or None of one that is stopped because its time is up."""
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


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


def prepare(python: str, version: str) -> list[str]:
    """The package for another Python, and what the first run will ask for in the cache that it reads. What is missing.

    python: that of the machine with the GPU, whose torch brings this version of Triton.
    """
    tag = tag_of(python)
    if tag is None:
        return [f"{python}: no interpreter that runs; give the path of that Python with --python"]
    missing = []
    wheels = ROOT / "build" / "gpu-wheel"
    if subprocess.run([python, "-m", "pip", "wheel", "--no-deps", "-w", str(wheels), "."], cwd=ROOT).returncode:
        missing.append(f"the package was not built for {python}: see above")
    elif not any("gather_gemm.fatbin" in zipfile.ZipFile(path).namelist() for path in wheels.glob(f"*{tag}*.whl")):
        missing.append("gather_gemm.fatbin is not in the package: nvcc is not on PATH (PyPI: nvidia-cuda-nvcc)")
    folders = {one: _triton_for(one, version) for one in (sys.executable, python)}
    if None in folders.values():
        return [*missing, f"triton=={version} could not be installed: see above; no compile cache was made"]
    asked = ROOT / "build" / "gpu-variants.json"
    here, there = ({**os.environ, "PYTHONPATH": str(folders[one])} for one in (sys.executable, python))
    subprocess.run(_module("gpu.dry_run", "--steps", "all", "--ask", str(asked)), cwd=ROOT, env=here, check=True)
    fill = [python, str(Path(__file__).with_name("cache.py")), str(asked), "--into", str(CACHE)]
    subprocess.run(fill, cwd=ROOT, env=there, check=True)
    size = sum(path.stat().st_size for path in CACHE.rglob("*") if path.is_file())
    print(f"{CACHE}: {size / 2**20:.1f} MiB, to lie at the same path on the machine with the GPU")
    return missing


def tag_of(python: str) -> str | None:
    """cp312, of an interpreter that runs."""
    command = [python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _triton_for(python: str, version: str) -> Path | None:
    """The folder of Triton for an interpreter, installed now unless it is there."""
    folder = ROOT / "build" / "gpu-triton" / f"{tag_of(python)}-{version}"
    if not (folder / "triton").is_dir():
        install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), f"triton=={version}"]
        if subprocess.run([python, *install], cwd=ROOT).returncode:
            return None
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=["prepare", *RUNS])
    parser.add_argument("--out", default="benchmarks/results/gpu")
    parser.add_argument("--seconds", type=float, help="of the whole call; default 540 (a call may take ten minutes)")
    parser.add_argument("--step", nargs="*", help="these alone, though they have finished")
    parser.add_argument("--python", default="python3.12", help="prepare: for this interpreter (python3.12)")
    parser.add_argument("--triton", default="3.6.0", help="prepare: for this version (3.6.0, that of torch 2.11)")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if options.run == "prepare":
        missing = prepare(options.python, options.triton)
        sys.exit("\n".join(f"prepare: {one}" for one in missing) or 0)
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
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
