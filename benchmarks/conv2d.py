"""Block-sparse convolution and linear layers against dense torch: `python -m benchmarks.conv2d [--dtype bf16]`.

Single layers: in float32 forward, gradient of the input and gradient of the kept values; in bf16 forward; in int8
forward of convolutions. Peers: dense torch in the same type; for int8 the fastest of its fp32, bf16 and quantised
convolution. GFLOP/s count the kept weights only, `peak` is their share of the measured multiply-add peak in this type,
`mem` the share of the time that moving weights, input and output once would take. Each result is compared with the
dense answer before it is timed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.lib.passes import DTYPES, Pass, passes
from benchmarks.lib.shapes import BATCHES, CONVS, LINEARS, Conv, Linear
from benchmarks.lib.timing import bandwidth, compare, machine, write_json
from sparsekd import _C

QUICK = {"resnet50": [1], "cifar": [64], "mobilenetv2": [1], "recommender": [1, 512], "mlp": [1, 64]}
PASSES = {"forward": "forward", "grad_input": "gradient of input", "grad_values": "gradient of values"}
# Speedups to reach over the layers with 64 outputs and more, by density.
TARGETS = {
    "conv2d forward": {0.5: 1.8, 0.3: 2.9, 0.1: 7.5},
    "conv2d backward": {0.5: 1.6, 0.3: 2.5, 0.1: 6.0},
    "linear forward": {0.5: 1.8, 0.3: 2.9, 0.1: 7.5},
}
TARGET_BATCHES = {Conv: [1, 16], Linear: [1, 64]}


def measure(
    dtype: str, layer: Conv | Linear, batch: int, density: float, seconds: float, clock: Callable[[], float]
) -> dict[str, Any]:
    blocks, found = passes(dtype, layer, batch, density)
    out = found["forward"].ours()
    moved = blocks.values.numel() + out.numel() + batch * math.prod(layer.input)
    flops = 2.0 * blocks.values.numel() * out.numel() / layer.weight[0]
    op = ("conv2d" if isinstance(layer, Conv) else "linear") + ("" if dtype == "float32" else f"_{dtype}")
    row = {"op": op, **asdict(layer), "batch": batch, "density": density, "traffic": DTYPES[dtype].bytes * moved}
    for name, one in found.items():
        check(name, one, DTYPES[dtype].tolerance)
        result = compare(one.ours, one.peers, seconds=seconds, clock=clock)
        row[name] = {**result, "gflops": flops / result["us"] * 1e-3}
    return row


def check(name: str, one: Pass, tolerance: float) -> None:
    ours = one.comparable(one.ours())
    for peer, call in one.peers.items():
        dense = one.comparable(call())
        error = ((ours - dense).abs().max() / dense.abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(
                f"benchmarks.conv2d: {name} differs from dense torch in {peer} by {error:.2g} of its maximum"
            )


def print_row(layer: Conv | Linear, row: dict[str, Any], peak: float, gigabytes: float) -> None:
    cells = [f"{layer.group:12} {layer!s:26} {row['batch']:4} {row['density']:5.2f}"]
    for r in (row[name] for name in PASSES if name in row):
        share, mem = r["gflops"] / peak, row["traffic"] / (r["us"] * gigabytes * 1e3)
        cells.append(f"{r['dense_us']:8.0f} {r['peer']} {r['us']:8.0f} {r['speedup']:5.2f}x "
                     f"{r['gflops']:4.0f} {share:4.0%} {mem:4.0%}")  # fmt: skip
    print(" | ".join(cells), flush=True)


def backward_speedup(row: dict[str, Any]) -> float:
    """Of both gradients together."""
    both = [row["grad_input"], row["grad_values"]]
    return sum(r["dense_us"] for r in both) / sum(r["us"] for r in both)


def geometric_means(rows: list[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Speedups of "conv2d forward", "conv2d backward", ... by density, over the layers with 64 outputs and more."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row.get("out_channels", row.get("outputs", 0)) < 64:
            continue
        speedups = {"forward": row["forward"]["speedup"]}
        if "grad_input" in row:
            speedups["backward"] = backward_speedup(row)
        for name, speedup in speedups.items():
            found.setdefault(f"{row['op']} {name}", {}).setdefault(row["density"], []).append(speedup)
    return {
        name: {density: statistics.geometric_mean(values) for density, values in by_density.items()}
        for name, by_density in found.items()
    }


def print_summary(means: dict[str, dict[float, float]]) -> None:
    print("\ngeometric means of the speedups over dense, layers with 64 outputs and more (target)")
    for name, by_density in means.items():
        targets = TARGETS.get(name, {})
        cells = [
            f"{density:g}: {mean:.2f}x" + (f" ({targets[density]}x)" if density in targets else "")
            for density, mean in sorted(by_density.items(), reverse=True)
        ]
        print(f"{name:16} " + "   ".join(cells))


def plot(means: dict[str, dict[float, float]], path: str) -> None:
    """Speedup over density, with the line that only the kept weights cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    densities = sorted({density for by_density in means.values() for density in by_density})
    axes.plot(densities, [1 / density for density in densities], "k--", label="1 / density")
    for name, by_density in means.items():
        axes.plot(*zip(*sorted(by_density.items()), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel="speedup over dense (geometric mean)")
    axes.set_xticks(densities, [f"{density:g}" for density in densities])
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def layers(args: argparse.Namespace) -> list[tuple[Conv | Linear, int]]:
    """The layers and batches that the options ask for."""
    chosen: list[tuple[Conv | Linear, int]] = []
    for layer in [*CONVS, *(LINEARS if args.dtype != "int8" else ())]:
        if args.group and layer.group not in args.group:
            continue
        batches = TARGET_BATCHES[type(layer)] if args.summary else (QUICK if args.quick else BATCHES)[layer.group]
        if not args.summary or layer.weight[0] >= 64:
            chosen += [(layer, batch) for batch in args.batch or batches]
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--quick", action="store_true", help="fewer batches, density 0.3 only, short samples")
    parser.add_argument("--summary", action="store_true", help="the layers and batches of the targets, short samples")
    parser.add_argument("--group", choices=sorted(QUICK), action="append", help="only these layers; may be repeated")
    parser.add_argument("--density", type=float, action="append", help="may be repeated; default 0.5 0.3 0.1")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated; default: those of the group")
    parser.add_argument("--seconds", type=float, help="of each pass; default 0.3, of short samples 0.06")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU time: for a machine that is not idle")
    parser.add_argument("--json", metavar="PATH", help="also write the rows there, as benchmarks/results/*.json")
    parser.add_argument("--plot", metavar="PNG", help="also draw speedup against density")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    chosen = layers(args)
    if not chosen:
        parser.error(f"{args.group} has no layer to measure in {args.dtype}")
    if args.threads or args.cpu_time:
        torch.set_num_threads(1 if args.cpu_time else args.threads)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    densities = args.density or ([0.3] if args.quick else [0.5, 0.3, 0.1])
    seconds = args.seconds or (0.06 if args.quick or args.summary else 0.3)
    peak = _C.peak_gflops(torch.get_num_threads(), 0.2, DTYPES[args.dtype].peak)
    info = {**machine(), "bandwidth_gb_s": round(bandwidth(), 1), f"{args.dtype}_peak_gflops": round(peak, 1)}
    print(", ".join(f"{key} {value}" for key, value in info.items()) + (", CPU time" if args.cpu_time else ""))
    timed = [PASSES["forward"]] if args.dtype != "float32" else PASSES.values()
    heading = f"{'dense us':>8} {'':4} {'ours us':>8} {'ratio':>6} GF/s peak  mem"
    print(f"{'':12} {'layer':26} {'n':>4} {'dens.':>5}" + "".join(f" | {heading}" for _ in timed))
    print(f"{'':50}" + "".join(f" | {name:{len(heading)}}" for name in timed))
    rows = []
    for layer, batch in chosen:
        for density in densities:
            row = measure(args.dtype, layer, batch, density, seconds, clock)
            print_row(layer, row, peak, info["bandwidth_gb_s"])
            rows.append(row)
    means = geometric_means(rows)
    print_summary(means)
    if args.json:
        write_json(args.json, f"python -m benchmarks.conv2d {' '.join(argv)}", rows, info)
    if args.plot:
        plot(means, args.plot)


if __name__ == "__main__":
    main()
