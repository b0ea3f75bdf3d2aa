"""Whole networks against the run times users have: PyTorch, OpenVINO, ONNX Runtime, MNN, ncnn, DeepSparse if installed.

    python -m benchmarks.networks --out benchmarks/results/networks.json
    python -m benchmarks.networks --network resnet50-n1 --density 0.3 --dtype fp32

Random weights, batch norms that fit them, every layer but the stem (and depthwise ones) pruned to a share of 16x1
blocks (16x2 in bf16). Outputs are compared with PyTorch's before anything is timed. Thread pools of several run times
in one process stall each other, so each run time has a process of its own; they work in turns, one window each, while
the others sleep, and a ratio is taken inside each round. The first calls of a window are not counted. "mnn-sparse" is
MNN of the pruned network, whose converter was told to look for blocks of zeros.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsekd
from benchmarks.deploy import convert_for_mnn
from benchmarks.lib import serve
from benchmarks.lib.models import MobileNetV2, resnet50, settle, small_resnet18, wrn_16_2
from benchmarks.lib.timing import write_json
from sparsekd.pruning import Budget

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50-n1": (resnet50, (1, 3, 224, 224)),
    "resnet50-n64": (resnet50, (64, 3, 224, 224)),
    "resnet18-n1": (small_resnet18, (1, 3, 28, 28)),
    "resnet18-n64": (small_resnet18, (64, 3, 28, 28)),
    "wrn-16-2-n1": (wrn_16_2, (1, 3, 32, 32)),
    "wrn-16-2-n64": (wrn_16_2, (64, 3, 32, 32)),
    "mobilenetv2-n1": (MobileNetV2, (1, 3, 224, 224)),
}
DENSITIES = (1.0, 0.5, 0.3, 0.1)
LIMITS = {"fp32": 1e-3, "bf16": 0.05}  # largest difference from PyTorch's fp32 output, relative to the largest output
USUAL = ("resnet50-n1", "wrn-16-2-n1", "wrn-16-2-n64", "mobilenetv2-n1")
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to run one network. density 1 of a dense run time is the dense network, of `ours` all blocks kept.

    budget: as in "macs=0.3", what the whole network keeps by what is worth most for its cost, instead of a density.
    """

    network: str
    runtime: str
    dtype: str
    density: float
    budget: str = ""

    @property
    def name(self) -> str:
        kept = self.budget or f"{self.density:g}"
        return f"{self.runtime} {self.dtype}" + (f" {kept}" if self.runtime in SPARSE else "")

    def model(self) -> tuple[nn.Module, Tensor]:
        """The network and its input, the same in every process."""
        build, shape = NETWORKS[self.network]
        torch.manual_seed(0)
        model, x = build(), torch.randn(shape)
        pattern = sparsekd.BlockPattern.for_device("cpu", {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype])
        kept: dict[str, Any] = {"density": self.density}
        if self.budget:
            asked = Budget.parse("benchmarks.networks", self.budget)
            kept = {asked.unit: asked.number, "example_inputs": (x,)}
        sparse = sparsekd.sparsify(model, pattern, exclude=["stem*"], **kept)
        return settle(sparse, torch.randn(8, *shape[1:])), x

    def dense(self) -> tuple[nn.Module, Tensor]:
        model, x = self.model()
        model = sparsekd.densify(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, x.contiguous(memory_format=torch.channels_last)


def _cast(dtype: str, *things: Any) -> list[Any]:
    return [thing.bfloat16() if dtype == "bf16" else thing for thing in things]


def eager(one: Contestant, threads: int) -> Call:
    model, x = _cast(one.dtype, *one.dense())
    return partial(model, x)


def eager_fp32(one: Contestant, threads: int) -> Call:
    """What the others have to compute: the blocks of their dtype, in full precision."""
    model, x = one.dense()
    return partial(model, x)


def compiled(one: Contestant, threads: int) -> Call:
    model, x = _cast(one.dtype, *one.dense())
    return partial(torch.compile(model), x)


def frozen(one: Contestant, threads: int) -> Call:
    model, x = _cast(one.dtype, *(one.model() if one.runtime == "ours" else one.dense()))
    return partial(sparsekd.freeze(model, x, layer_ms=20.0), x)


def openvino(one: Contestant, threads: int) -> Call:
    import openvino as ov

    model, x = one.dense()
    network = ov.convert_model(model, example_input=x, input=[ov.PartialShape(x.shape)])
    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(one.dtype, one.dtype),
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(network, "CPU", options).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.contiguous().numpy()))

    def call() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return call


def _onnx(one: Contestant) -> tuple[bytes, Any]:
    model, x = one.dense()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the new exporter needs onnxscript
        to_file: Any = file  # a path by its annotation, and a file by its documentation
        torch.onnx.export(model, (x,), to_file, dynamo=False, input_names=["x"], output_names=["output"])
    return file.getvalue(), x.contiguous().numpy()


def onnxruntime(one: Contestant, threads: int) -> Call:
    import onnxruntime as ort

    network, x = _onnx(one)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"x": x})[0])


def deepsparse(one: Contestant, threads: int) -> Call:
    from deepsparse import compile_model

    network, x = _onnx(one)
    engine = compile_model(network, batch_size=len(x), num_cores=threads)
    return lambda: torch.from_numpy(engine.run([x])[0])


def mnn(one: Contestant, threads: int) -> Call:
    network, x = _onnx(one)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "network.onnx").write_bytes(network)
        file = "network-sparse.mnn" if one.runtime == "mnn-sparse" else "network.mnn"
        if failed := convert_for_mnn(Path(folder), file):
            raise RuntimeError(failed)
        call = serve.mnn(str(Path(folder, file)), ["x"], [x.shape], threads)
        call([x])  # reads the file
    return lambda: torch.from_numpy(call([x]))


def ncnn(one: Contestant, threads: int) -> Call:
    """Of one image, converted by pnnx; float32 throughout."""
    import ncnn as engine
    import pnnx

    network, x = _onnx(one)
    if len(x) > 1:
        raise RuntimeError("ncnn takes one image at a time")
    shape = ",".join(str(size) for size in x.shape)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "network.onnx").write_bytes(network)
        convert = [str(Path(pnnx.__file__).parent / "pnnx"), "network.onnx", f"inputshape=[{shape}]f32", "fp16=0"]
        done = subprocess.run(convert, cwd=folder, capture_output=True, text=True)
        if done.returncode or not Path(folder, "network.ncnn.bin").is_file():
            raise RuntimeError(f"pnnx ended with {done.returncode}: {done.stderr.strip()[-200:]}")
        net = engine.Net()
        net.opt.num_threads = threads
        for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage", "vulkan_compute"):
            setattr(net.opt, f"use_{option}", False)
        net.load_param(str(Path(folder, "network.ncnn.param")))
        net.load_model(str(Path(folder, "network.ncnn.bin")))
    image, (given,), (wanted,) = engine.Mat(np.ascontiguousarray(x[0])), net.input_names(), net.output_names()

    def call() -> Tensor:
        with net.create_extractor() as extractor:
            extractor.input(given, image)
            return torch.from_numpy(np.array(extractor.extract(wanted)[1])[None])

    return call


SPARSE = ("ours", "deepsparse", "mnn-sparse")
# Run time -> (how to build a call, its process, the dtypes it has).
RUNTIMES: dict[str, tuple[Callable[[Contestant, int], Call], str, tuple[str, ...]]] = {
    "eager": (eager, "torch", ("fp32", "bf16")),
    "eager-fp32": (eager_fp32, "torch", ()),
    "compiled": (compiled, "torch", ("fp32", "bf16")),
    "openvino": (openvino, "openvino", ("fp32", "bf16")),
    "onnxruntime": (onnxruntime, "onnxruntime", ("fp32",)),
    "deepsparse": (deepsparse, "deepsparse", ("fp32",)),
    "mnn": (mnn, "mnn", ("fp32",)),
    "mnn-sparse": (mnn, "mnn", ("fp32",)),
    "ncnn": (ncnn, "ncnn", ("fp32",)),
    "frozen": (frozen, "torch", ("fp32", "bf16")),
    "ours": (frozen, "torch", ("fp32", "bf16")),
}


# ---- Processes that take turns


def _serve(pipe: Any, threads: int) -> None:
    """A worker's life: build contestants, run one for a while when it is its turn. Errors travel as text."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    calls: dict[Contestant, Call] = {}

    def build(one: Contestant) -> np.ndarray:
        if one not in calls:
            calls[one] = RUNTIMES[one.runtime][0](one, threads)
        return calls[one]().float().numpy().copy()

    def window(one: Contestant, seconds: float) -> list[float]:
        call = calls[one]
        samples: list[float] = []
        start = time.perf_counter()
        while time.perf_counter() - start < 0.2 * seconds or not samples:
            call()
            samples = [0.0]
        samples.clear()
        while time.perf_counter() - start < seconds or len(samples) < 3:
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
        return samples

    def block(one: Contestant, count: int) -> list[float]:
        """Seconds of `count` calls; one call before them is not counted."""
        calls[one]()
        samples = []
        for _ in range(count):
            begin = time.perf_counter()
            calls[one]()
            samples.append(time.perf_counter() - begin)
        return samples

    def forget() -> None:
        calls.clear()
        gc.collect()

    known: dict[str, Callable[..., Any]] = {"build": build, "window": window, "block": block, "forget": forget}
    for what, *arguments in iter(pipe.recv, None):
        try:
            pipe.send(("ok", known[what](*arguments)))
        except Exception as error:  # the parent decides what it means
            pipe.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0]))


class Workers:
    """One process for each run time, started when first asked."""

    def __init__(self, threads: int) -> None:
        self.threads, self.context = threads, multiprocessing.get_context("spawn")
        self.pipes: dict[str, tuple[Any, Any]] = {}

    def ask(self, process: str, *message: Any) -> Any:
        if process not in self.pipes:
            mine, theirs = self.context.Pipe()
            worker = self.context.Process(target=_serve, args=(theirs, self.threads), daemon=True)
            worker.start()
            self.pipes[process] = mine, worker
        pipe = self.pipes[process][0]
        pipe.send(message)
        state, answer = pipe.recv()
        if state != "ok":
            raise RuntimeError(answer)
        return answer

    def forget(self) -> None:
        for process in self.pipes:
            self.ask(process, "forget")

    def stop(self) -> None:
        for pipe, worker in self.pipes.values():
            pipe.send(None)
            worker.join()


@contextlib.contextmanager
def workers(threads: int) -> Iterator[Workers]:
    team = Workers(threads)
    try:
        yield team
    finally:
        team.stop()


# ---- The table


def contestants(
    network: str,
    dtypes: Sequence[str],
    densities: Sequence[float],
    skip: Sequence[str],
    budgets: Sequence[str] = (),
) -> list[Contestant]:
    found = []
    for dtype in dtypes:
        for runtime, (_, _, known) in RUNTIMES.items():
            if dtype in known and runtime not in skip:
                found += [Contestant(network, runtime, dtype, d) for d in (densities if runtime in SPARSE else (1.0,))]
        if "ours" not in skip:
            found += [Contestant(network, "ours", dtype, 1.0, budget) for budget in budgets]
    return found


def contest(team: Workers, field: Sequence[Contestant], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Build, compare, then time in turns: a row for each, with milliseconds or the reason why there are none."""
    want: dict[tuple[str, float, str], np.ndarray] = {}
    rows: dict[Contestant, dict[str, Any]] = {}
    for one in field:
        process, row = RUNTIMES[one.runtime][1], {**asdict(one), "name": one.name}
        rows[one] = row
        mask = one.dtype, one.density, one.budget
        if mask not in want:
            want[mask] = team.ask("torch", "build", replace(one, runtime="eager-fp32"))
        try:
            got = team.ask(process, "build", one)
        except RuntimeError as error:
            row["absent"] = str(error)
            continue
        row["deviation"] = float(abs(got - want[mask]).max() / abs(want[mask]).max())
        if not row["deviation"] <= LIMITS[one.dtype]:  # NaN is unequal
            row["absent"] = f"its output differs from PyTorch's by {row['deviation']:.2g} of the largest"
    timed = [one for one in field if "absent" not in rows[one]]
    windows: dict[Contestant, list[float]] = {one: [] for one in timed}
    for turn in range(rounds):
        for one in timed if turn % 2 else reversed(timed):
            samples = team.ask(RUNTIMES[one.runtime][1], "window", one, seconds)
            windows[one].append(statistics.median(samples) * 1e3)
    for one in timed:
        rows[one] |= {"ms": statistics.median(windows[one]), "windows_ms": [round(ms, 4) for ms in windows[one]]}
        rows[one]["speedup"] = {
            other.name: statistics.median(b / a for a, b in zip(windows[one], windows[other], strict=True))
            for other in timed
            if other.dtype == one.dtype and other.runtime not in SPARSE and other is not one
        }
    return list(rows.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds, and how many times as fast as each dense run time of the same dtype."""
    peers = list(dict.fromkeys(peer.split()[0] for row in rows for peer in row.get("speedup", {})))
    lines = ["| | ms | " + " | ".join(f"x {peer}" for peer in peers) + " |", "|---" * (2 + len(peers)) + "|"]
    for row in rows:
        if "absent" in row:
            lines.append(f"| {row['name']} | {row['absent'][:80]} |" + " |" * len(peers))
            continue
        ratios = (row["speedup"].get(f"{peer} {row['dtype']}") for peer in peers)
        cells = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {row['name']} | {row['ms']:.3f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(USUAL))
    parser.add_argument("--density", nargs="+", type=float, default=list(DENSITIES), metavar="D")
    parser.add_argument("--budget", nargs="+", default=[], metavar="UNIT=N", help="of ours too, as in macs=0.3")
    parser.add_argument("--dtype", nargs="+", choices=LIMITS, default=["fp32"])
    parser.add_argument("--skip", nargs="+", choices=RUNTIMES, default=[], help="run times to leave out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a window")
    parser.add_argument("--rounds", type=int, default=7, help="windows of each contestant")
    parser.add_argument("--out", metavar="FILE", help="JSON to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with workers(options.threads) as team:
        for network in options.network:
            field = contestants(network, options.dtype, options.density, options.skip, options.budget)
            found = contest(team, field, options.seconds, options.rounds)
            print(f"\n{network}, {options.threads} threads\n\n{table(found)}", flush=True)
            rows += found
            team.forget()
    if options.out:
        write_json(options.out, shlex.join(["python", "-m", "benchmarks.networks", *sys.argv[1:]]), rows)


if __name__ == "__main__":
    main()
