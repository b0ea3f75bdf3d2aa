"""How long one image takes while other processes keep the cores busy: percentiles of ours and of OpenVINO.

    python -m benchmarks.latency --out benchmarks/results/latency.json
    python -m benchmarks.latency --network mobilenetv2-n1 --busy 0 2

A network with random weights, every layer but the stem pruned to a share of 16x1 blocks, frozen; OpenVINO runs the
dense one. Each has a process of its own (`benchmarks.networks`), and they take turns in blocks of 12 calls while no,
one or two more processes do nothing but count. Medians hide what such neighbours cost: a thread that waits for another
one whose core was taken away waits for a whole time slice, so the 95th and 99th percentile are kept too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.lib.timing import machine, write_json
from benchmarks.networks import LIMITS, NETWORKS, RUNTIMES, Contestant, Workers, workers

PERCENTILES = (50, 95, 99)
CALLS = 12  # of a block
PEER = "openvino"
Row = dict[str, Any]


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that keep a core busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def build(team: Workers, field: list[Contestant]) -> None:
    """Builds all. Raises RuntimeError where one cannot be built or disagrees with the first."""
    outputs = [team.ask(RUNTIMES[one.runtime][1], "build", one) for one in field]
    for one, output in zip(field[1:], outputs[1:], strict=True):
        off = float(abs(output - outputs[0]).max() / abs(outputs[0]).max())
        if not off <= LIMITS[one.dtype]:
            raise RuntimeError(f"benchmarks.latency: {one.name} and {field[0].name} differ by {off:.2g} of the largest")


def percentiles(team: Workers, field: list[Contestant], busy: int, blocks: int) -> list[Row]:
    """A row for each: milliseconds at every percentile, and their ratio to those of the last, the peer."""
    taken: dict[Contestant, list[float]] = {one: [] for one in field}
    with neighbours(busy):
        for turn in range(blocks):
            for one in field if turn % 2 else reversed(field):
                taken[one] += team.ask(RUNTIMES[one.runtime][1], "block", one, CALLS)
    ms = {one: [float(x) for x in np.percentile(samples, PERCENTILES) * 1e3] for one, samples in taken.items()}
    rows = []
    for one in field:
        row: Row = {"network": one.network, "name": one.name, "density": one.density, "busy": busy}
        row |= {"calls": len(taken[one])}
        row |= {f"p{p}_ms": round(at, 3) for p, at in zip(PERCENTILES, ms[one], strict=True)}
        row |= {f"p{p}_of_peer": round(a / b, 3) for p, a, b in zip(PERCENTILES, ms[one], ms[field[-1]], strict=True)}
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    head = " | ".join(f"p{p}, ms | of {PEER}" for p in PERCENTILES)
    lines = [f"| busy processes | | {head} |", "|---" * (2 + 2 * len(PERCENTILES)) + "|"]
    for row in rows:
        cells = " | ".join(f"{row[f'p{p}_ms']:.1f} | {row[f'p{p}_of_peer']:.2f}" for p in PERCENTILES)
        lines.append(f"| {row['busy']} | {row['name']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet50-n1")
    parser.add_argument("--density", type=float, default=0.3, help="share of the weights kept in each layer (0.3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="busy processes (0 1 2)")
    parser.add_argument("--blocks", type=int, default=30, help=f"blocks of {CALLS} calls of each (30)")
    parser.add_argument("--out", metavar="FILE", help="JSON to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    field = [
        Contestant(options.network, "ours", "fp32", options.density),
        Contestant(options.network, PEER, "fp32", options.density),
    ]
    taken_on, rows = machine(), list[Row]()
    with workers(options.threads) as team:
        build(team, field)
        for busy in options.busy:
            rows += percentiles(team, field, busy, options.blocks)
    print(table(rows))
    if options.out:
        write_json(options.out, shlex.join(["python", "-m", "benchmarks.latency", *sys.argv[1:]]), rows, taken_on)


if __name__ == "__main__":
    main()
