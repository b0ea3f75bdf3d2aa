"""Exported networks beside other run times: size, start, memory, and the time of one sample.

    python -m benchmarks.deploy --out benchmarks/results/deploy.json --threads 2

Networks are pruned to a third of their weights and exported; ONNX Runtime and OpenVINO get the same network from
`sparsekd.export_onnx`, with zeros. Every run time starts in a process of its own, which imports what it needs and
nothing else; times of one sample are taken in turns, process after process, and the median of all turns is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import sparsekd

from .lib.models import resnet50, settle, wrn_16_2
from .lib.timing import write_json

DENSITY = 0.3


def rating_cnn() -> nn.Module:
    return sparsekd.models.RatingCNN({"user_features": 64, "item_features": 64}, sparsekd.models.STUDENT)


NETWORKS: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "rating CNN": (rating_cnn, [(64,), (64,), ()]),
    "WRN-16-2": (wrn_16_2, [(3, 32, 32)]),
    "ResNet-50": (resnet50, [(3, 224, 224)]),
}

# Each says {"import_s", "load_s", "mb", "us"}; arguments: file, inputs (.npz), threads, seconds.
COMMON = """
import sys, time, statistics
begin = time.perf_counter()
path, inputs, threads, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
{imports}
imported = time.perf_counter()
{load}
loaded = time.perf_counter()
import json, numpy as np
x = list(np.load(inputs).values())
{call}
first = call()
taken = []
end = time.perf_counter() + seconds
while time.perf_counter() < end or len(taken) < 5:
    start = time.perf_counter()
    call()
    taken.append(time.perf_counter() - start)
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
row = dict(import_s=imported - begin, load_s=loaded - imported, peak_mb=peak, us=1e6 * statistics.median(taken))
print(json.dumps({{**row, "answer": np.asarray(first, np.float64).ravel()[:8].tolist()}}))
"""
RUNTIMES = {
    "sparsekd.runtime": COMMON.format(
        imports="import sparsekd.runtime",
        load="session = sparsekd.runtime.Session(path, threads=threads)",
        call="call = lambda: session(*x)",
    ),
    "FrozenModel": COMMON.format(
        imports="import torch; torch.set_num_threads(threads)\nfrom benchmarks.deploy import frozen",
        load="session = frozen(path)",
        call="tensors = [torch.from_numpy(one) for one in x]; call = lambda: session(*tensors).numpy()",
    ),
    "ONNX Runtime": COMMON.format(
        imports="import onnxruntime",
        load="options = onnxruntime.SessionOptions(); options.intra_op_num_threads = threads\n"
        "session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])",
        call="feed = {one.name: value for one, value in zip(session.get_inputs(), x)}\n"
        "call = lambda: session.run(None, feed)[0]",
    ),
    "OpenVINO": COMMON.format(
        imports="import openvino",
        load="how = {'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY'}\n"
        "how['INFERENCE_PRECISION_HINT'] = 'f32'\n"
        "import numpy\nshapes = [value.shape for value in numpy.load(inputs).values()]\n"
        "core = openvino.Core(); model = core.read_model(path)\n"
        "model.reshape({port: openvino.PartialShape(shape) for port, shape in zip(model.inputs, shapes)})\n"
        "session = core.compile_model(model, 'CPU', how)\nrequest = session.create_infer_request()",
        call="call = lambda: request.infer(x)[0]",
    ),
}
ENDS = {"sparsekd.runtime": "skd", "FrozenModel": "frozen", "ONNX Runtime": "onnx", "OpenVINO": "onnx"}


def frozen(path: str) -> Any:
    """The frozen network of a file that `prepare` wrote; its name says which."""
    build, _ = NETWORKS[Path(path).parent.name]
    return sparsekd.load_frozen(path, build())


def prepare(name: str, folder: Path) -> None:
    """The files of one network."""
    build, shapes = NETWORKS[name]
    torch.manual_seed(0)
    model, x = build(), [torch.randn(1, *shape) for shape in shapes]
    sparsekd.sparsify(model, density=DENSITY, exclude=["stem*"])
    settle(model, *(torch.randn(8, *shape) for shape in shapes))
    network = sparsekd.freeze(model, x, layer_ms=15.0)
    folder.mkdir()
    network.save(folder / "network.frozen")
    network.export(folder / "network.skd")
    sparsekd.export_onnx(network, folder / "network.onnx", x)
    np.savez(folder / "x.npz", **{f"x{i}": one.numpy() for i, one in enumerate(x)})


def turn(runtime: str, folder: Path, threads: int, seconds: float) -> dict[str, Any]:
    arguments = [str(folder / f"network.{ENDS[runtime]}"), str(folder / "x.npz"), str(threads), str(seconds)]
    done = subprocess.run([sys.executable, "-c", RUNTIMES[runtime], *arguments], capture_output=True, text=True)
    if done.returncode:
        return {"absent": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout)


def measure(name: str, folder: Path, threads: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    taken: dict[str, list[dict[str, Any]]] = {runtime: [] for runtime in RUNTIMES}
    for _ in range(rounds):
        for runtime, rows in taken.items():
            rows.append(turn(runtime, folder, threads, seconds))
    rows = []
    for runtime, some in taken.items():
        row: dict[str, Any] = {"network": name, "runtime": runtime, "density": DENSITY, "threads": threads}
        if "absent" in some[0]:
            rows.append({**row, **some[0]})
            continue
        row |= {key: statistics.median(one[key] for one in some) for key in ("import_s", "load_s", "peak_mb", "us")}
        want = taken["FrozenModel"][0].get("answer")
        row["differs"] = None if want is None else float(np.abs(np.subtract(some[0]["answer"], want)).max())
        row["file_mb"] = (folder / f"network.{ENDS[runtime]}").stat().st_size / 1e6
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | run time | one sample, us | import, s | load, s | peak memory, MB | file, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "absent" in row:
            lines.append(f"| {row['network']} | {row['runtime']} | {row['absent']} | | | | |")
            continue
        numbers = f"{row['us']:.0f} | {row['import_s']:.2f} | {row['load_s']:.2f}"
        numbers += f" | {row['peak_mb']:.0f} | {row['file_mb']:.2f}"
        lines.append(f"| {row['network']} | {row['runtime']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one turn")
    parser.add_argument("--out", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.network:
            prepare(name, Path(folder) / name)
            rows += measure(name, Path(folder) / name, options.threads, options.rounds, options.seconds)
    print(table(rows))
    if options.out:
        write_json(options.out, "python -m benchmarks.deploy " + " ".join(sys.argv[1:]), rows)


if __name__ == "__main__":
    main()
