"""What a call costs beside the kernel: `python -m benchmarks.calls`.

Layers so small that their arithmetic takes a microsecond, as modules: without gradients, and what forward and backward
of a training step spend, beside torch's dense layer of the same size. Medians in microseconds, in turns, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparsekd
from benchmarks.lib.timing import machine, write_json
from sparsekd import timing


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    return {
        "linear 32->32": (nn.Linear(32, 32), torch.randn(1, 32)),
        "conv2d 16->32 1x1 at 4x4": (nn.Conv2d(16, 32, 1), torch.randn(1, 16, 4, 4)),
        "conv2d 16->32 3x3 at 4x4": (nn.Conv2d(16, 32, 3, padding=1), torch.randn(1, 16, 4, 4)),
    }


def training(module: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.clone().requires_grad_()
    dy = torch.ones_like(module(x))

    def step() -> None:
        module(x).backward(dy)

    return step


def measure(name: str, dense: nn.Module, x: Tensor, seconds: float) -> dict[str, Any]:
    sparse = sparsekd.sparsify(nn.Sequential(dense), density=0.5).get_submodule("0")
    calls = {"dense": lambda: dense(x), "ours": lambda: sparse(x)}
    with torch.inference_mode():
        taken = timing.samples(calls, seconds, rounds=15)
    steps = timing.samples({"dense": training(dense, x), "ours": training(sparse, x)}, seconds, rounds=15)
    row: dict[str, Any] = {"layer": name}
    for kind, samples in (("inference", taken), ("training", steps)):
        for one, times in samples.items():
            row[f"{kind}_{one}_us"] = statistics.median(times) * 1e6
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each layer, twice")
    parser.add_argument("--json", metavar="PATH", help="also write the rows there, as benchmarks/results/*.json")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        info = machine()
        print(", ".join(f"{key} {value}" for key, value in info.items()))
        print("| layer | without gradients: dense | ours | forward and backward: dense | ours |\n|---|---|---|---|---|")
        rows = []
        for name, (dense, x) in layers().items():
            rows.append(measure(name, dense, x, args.seconds))
            print("| " + " | ".join(one if isinstance(one, str) else f"{one:.1f}" for one in rows[-1].values()) + " |")
    finally:
        torch.set_num_threads(before)
    if args.json:
        write_json(args.json, f"python -m benchmarks.calls {' '.join(argv)}".strip(), rows, info)


if __name__ == "__main__":
    main()
