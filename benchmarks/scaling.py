"""How much faster a layer gets with more threads: `python -m benchmarks.scaling`.

The forward pass of every layer that `benchmarks.conv2d` knows with 64 outputs and more is timed with one thread and
with all, in turns, as a frozen model calls it. Layers that take less than `--least` microseconds on one thread are left
out: waking a thread takes some of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.lib.passes import DTYPES, passes
from benchmarks.lib.shapes import CONVS, LINEARS, Conv, Linear
from benchmarks.lib.timing import compare, machine, write_json

TARGET = 0.925  # times as fast, for each thread


def measure(
    dtype: str, layer: Conv | Linear, batch: int, density: float, threads: int, seconds: float
) -> dict[str, Any]:
    before = torch.get_num_threads()
    calls = {}
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            calls[count] = passes(dtype, layer, batch, density)[1]["forward"].ours
        result = compare(calls[threads], {"one": calls[1]}, seconds=seconds)
    finally:
        torch.set_num_threads(before)
    row = {**asdict(layer), "batch": batch, "density": density, "dtype": dtype, "threads": threads}
    return {**row, "one_us": result["dense_us"], "us": result["us"], "scaling": result["speedup"]}


def main(argv: Sequence[str] | None = None) -> None:
    layers: list[Conv | Linear] = [*CONVS, *LINEARS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "int8"], default="float32")
    parser.add_argument("--group", action="append", choices=sorted({one.group for one in layers}))
    parser.add_argument("--density", type=float, action="append", help="may be repeated; default 0.5 0.3 0.1")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated; default 1 16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--least", type=float, default=50.0, help="microseconds on one thread; default 50")
    parser.add_argument("--seconds", type=float, default=0.1, help="of each layer")
    parser.add_argument("--json", metavar="PATH", help="also write the rows there, as benchmarks/results/*.json")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.threads < 2:
        parser.error(f"there is nothing to compare with {args.threads} thread")
    info, rows = machine(), []
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    for layer in layers:
        if (args.group and layer.group not in args.group) or layer.weight[0] < 64:
            continue
        for batch in args.batch or [1, 16]:
            for density in args.density or [0.5, 0.3, 0.1]:
                row = measure(args.dtype, layer, batch, density, args.threads, args.seconds)
                if row["one_us"] < args.least:
                    continue
                print(f"{layer.group:12} {layer!s:26} {batch:4} {density:5.2f} | {row['one_us']:8.0f} "
                      f"{row['us']:8.0f} {row['scaling']:5.2f}x", flush=True)  # fmt: skip
                rows.append(row)
    if not rows:
        parser.error(f"no layer takes {args.least:g} us")
    scaling = [row["scaling"] for row in rows]
    reached = sum(one >= TARGET * args.threads for one in scaling)
    print(f"\n{len(rows)} layers: median {statistics.median(scaling):.2f}x, least {min(scaling):.2f}x; "
          f"{reached} are {TARGET * args.threads:.2f} times as fast or more")  # fmt: skip
    if args.json:
        write_json(args.json, f"python -m benchmarks.scaling {' '.join(argv)}", rows, info)


if __name__ == "__main__":
    main()
