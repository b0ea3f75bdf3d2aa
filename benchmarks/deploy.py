"""Exported networks beside other run times: start, memory, size, and the time of one sample.

    python -m benchmarks.deploy --threads 2 --out benchmarks/results/deploy.json

Every layer but the stem is pruned to a share of 16x1 blocks, by random weights; the network is frozen and exported.
ONNX Runtime, OpenVINO and MNN get the same network with zeros from `sparsekd.export_onnx`; "MNN, sparse" has been
through its converter's search for sparse layers. Every run time starts in a process of its own (`lib/serve.py`), one
after the other, round after round; medians over the rounds. Answers are compared with those of the frozen network
first. Needs the extra [bench].
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparsekd
from benchmarks.lib.models import NETWORKS, settle
from benchmarks.lib.serve import RUNTIMES
from benchmarks.lib.timing import write_json

LIMIT = 1e-3  # largest difference from the frozen network's answer, relative to its largest
FIGURES = ("us", "start_s", "numpy_s", "first_call_s", "resident_mb", "peak_mb", "numpy_mb")
# Its command line would install a package for telemetry and report the conversion; the function beneath does not.
CONVERT = "import sys, MNN, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
MNN_FILES: dict[str, list[str]] = {"network.mnn": [], "network-sparse.mnn": ["--detectSparseSpeedUp"]}
Row = dict[str, Any]


def prepare(name: str, density: float, folder: Path) -> None:
    """The files of one network."""
    build, inputs_of, exclude = NETWORKS[name]
    torch.manual_seed(0)
    inputs = inputs_of(1)
    model = settle(sparsekd.sparsify(build(), density=density, exclude=exclude), *inputs_of(8))
    folder.mkdir()
    write_files(sparsekd.freeze(model, inputs, layer_ms=20.0), inputs, folder)
    for file in MNN_FILES:
        convert_for_mnn(folder, file)  # where MNN is not installed there is no file, and no row


def write_files(frozen: Any, inputs: tuple[torch.Tensor, ...], folder: Path, onnx: bool = True) -> None:
    """A frozen network for every run time but MNN, what goes in, and what has to come out. onnx: not for ours alone."""
    frozen.save(folder / "network.frozen")
    frozen.export(folder / "network.skd")
    if onnx:
        sparsekd.export_onnx(frozen, folder / "network.onnx", inputs)
    names = sparsekd.runtime.Session(folder / "network.skd").inputs
    arrays: Any = {one.name: x.numpy() for one, x in zip(names, inputs, strict=True)}
    np.savez(folder / "inputs.npz", **arrays)
    np.save(folder / "expected.npy", frozen(*inputs).numpy())


def convert_for_mnn(folder: Path, file: str) -> str:
    """Makes the file of network.onnx, or says why not."""
    arguments = ["-f", "ONNX", "--modelFile", str(folder / "network.onnx"), "--MNNModel", str(folder / file)]
    command = [sys.executable, "-c", CONVERT, *arguments, "--bizCode", "sparsekd", *MNN_FILES[file]]
    done = subprocess.run(command, capture_output=True, text=True)
    if (folder / file).is_file():
        return ""
    return (done.stderr.strip() or done.stdout.strip() or f"mnnconvert ended with {done.returncode}").splitlines()[-1]


def turn(runtime: str, folder: Path, threads: int, seconds: float) -> Row:
    files = [str(folder / name) for name in (RUNTIMES[runtime][1], "inputs.npz", "output.npy")]
    command = [sys.executable, "-m", "benchmarks.lib.serve", runtime, *files, str(threads), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"absent": done.stderr.strip().splitlines()[-1]}
    expected, got = np.load(folder / "expected.npy"), np.load(folder / "output.npy")
    differs = float(np.abs(got.reshape(expected.shape) - expected).max() / np.abs(expected).max())
    if not differs <= LIMIT:
        return {"absent": f"answers differ by {differs:.2g} of the largest"}
    return {**json.loads(done.stdout.splitlines()[-1]), "differs": differs}


def measure(name: str, folder: Path, options: argparse.Namespace) -> list[Row]:
    turns: dict[str, list[Row]] = {runtime: [] for runtime in RUNTIMES}
    for _ in range(options.rounds):
        for runtime, taken in turns.items():
            if not taken or "absent" not in taken[0]:
                taken.append(turn(runtime, folder, options.threads, options.seconds))
    rows = []
    for runtime, taken in turns.items():
        row: Row = {"network": name, "runtime": runtime, "density": options.density, "threads": options.threads}
        if "absent" in taken[0]:
            rows.append({**row, **taken[0]})
            continue
        row |= {figure: statistics.median(one[figure] for one in taken) for figure in FIGURES}
        row |= {"differs": taken[0]["differs"], "file_mb": (folder / RUNTIMES[runtime][1]).stat().st_size / 1e6}
        ours = [one["us"] for one in turns["sparsekd.runtime"]]
        row["over_ours"] = statistics.median(one["us"] / us for one, us in zip(taken, ours, strict=True))
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """As Markdown. A start includes numpy and the first call, as a user waits for both."""
    lines = [
        "| network | run time | one sample, us | of ours | start, s | resident, MB | file, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "absent" in row:
            lines.append(f"| {row['network']} | {row['runtime']} | not run: {row['absent']} | | | | |")
            continue
        start = row["numpy_s"] + row["start_s"] + row["first_call_s"]
        numbers = f"{row['us']:.0f} | {row['over_ours']:.2f} | {start:.2f} | {row['resident_mb']:.0f}"
        lines.append(f"| {row['network']} | {row['runtime']} | {numbers} | {row['file_mb']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--density", type=float, default=0.3, help="share of the weights kept in each layer (0.3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7, help="of one turn of one run time (0.7)")
    parser.add_argument("--out", metavar="FILE", help="JSON to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.network:
            prepare(name, options.density, Path(folder) / name)
            rows += measure(name, Path(folder) / name, options)
            print(table(rows[-len(RUNTIMES) :]), flush=True)
    if options.out:
        write_json(options.out, shlex.join(["python", "-m", "benchmarks.deploy", *sys.argv[1:]]), rows)
    sys.exit(0)


if __name__ == "__main__":
    main()
