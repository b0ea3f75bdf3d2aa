"""Block-sparse convolution layers against dense torch: `python -m benchmarks.conv2d [--quick]`.

Forward, gradient of the input and gradient of the kept values of single layers, called as a frozen model and autograd
call them (the compiled module directly). The peer is torch's dense convolution in channels_last, oneDNN's best format.
GFLOP/s count the kept weights only. Each result is compared with the dense answer before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.shapes import BATCHES, CONVS, Conv
from benchmarks.timing import compare, machine, write_json
from sparsekd import _C, BlockPattern, BlockSparse

QUICK = {"resnet50": [1], "cifar": [64], "mobilenetv2": [1], "recommender": [1, 512]}


class Case:
    """One layer with its tensors, and the six calls that are timed."""

    def __init__(self, layer: Conv, batch: int, density: float) -> None:
        torch.manual_seed(0)
        pad = layer.kernel // 2
        dense = torch.randn(layer.out_channels, layer.channels, layer.kernel, layer.kernel)
        grid = BlockPattern(16, 1).grid(tuple(dense.shape))
        self.blocks = BlockSparse.from_dense(dense, BlockPattern(16, 1), mask=torch.rand(grid) < density)
        self.weight = self.blocks.to_dense().contiguous(memory_format=torch.channels_last)
        self.shape = _C.Conv2dShape(
            n=batch, c=layer.channels, h=layer.size, w=layer.size, k=layer.out_channels, r=layer.kernel,
            s=layer.kernel, stride_h=layer.stride, stride_w=layer.stride, pad_h=pad, pad_w=pad,
        )  # fmt: skip
        self.stride, self.pad = (layer.stride, layer.stride), (pad, pad)
        self.x = channels_last(torch.randn(batch, layer.channels, layer.size, layer.size))
        self.dy = channels_last(torch.randn(batch, layer.out_channels, self.shape.p, self.shape.q))
        self.y, self.dx = torch.empty_like(self.dy), torch.empty_like(self.x)
        self.dvalues = torch.empty_like(self.blocks.values)
        self.threads = torch.get_num_threads()
        index = self.blocks.row_ptr.data_ptr(), self.blocks.col_idx.data_ptr(), self.blocks.values.shape[0]
        self.pointers = (self.blocks.values.data_ptr(), *index)
        self.index = index
        self.frozen = _C.PackedConv2d(self.shape, *self.pointers)
        self.flops = 2.0 * self.blocks.values.numel() * batch * self.shape.p * self.shape.q

    def forward(self) -> torch.Tensor:
        self.frozen.run(self.x.data_ptr(), True, 0, self.y.data_ptr(), True, self.threads)
        return self.y

    def forward_dense(self) -> torch.Tensor:
        return F.conv2d(self.x, self.weight, None, self.stride, self.pad)

    def grad_input(self) -> torch.Tensor:
        _C.conv2d_grad_input_f32(self.shape, self.dy.data_ptr(), True, *self.pointers, self.dx.data_ptr(), True,
                                 self.threads)  # fmt: skip
        return self.dx

    def grad_input_dense(self) -> torch.Tensor:
        return self._backward_dense((True, False, False))[0]

    def grad_values(self) -> torch.Tensor:
        _C.conv2d_grad_values_f32(self.shape, self.x.data_ptr(), True, self.dy.data_ptr(), True, *self.index,
                                  self.dvalues.data_ptr(), self.threads)  # fmt: skip
        return self.dvalues

    def grad_values_dense(self) -> torch.Tensor:
        return self._backward_dense((False, True, False))[1]

    def _backward_dense(self, wanted: tuple[bool, bool, bool]) -> tuple[torch.Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            self.dy, self.x, self.weight, None, self.stride, self.pad, (1, 1), False, (0, 0), 1, wanted
        )

    def check(self) -> None:
        gradient = self.grad_values_dense()
        kept = BlockSparse.from_dense(gradient, self.blocks.pattern, mask=self.blocks.mask()).values
        for name, ours, dense in [
            ("forward", self.forward(), self.forward_dense()),
            ("grad_input", self.grad_input(), self.grad_input_dense()),
            ("grad_values", self.grad_values(), kept),
        ]:
            error = (ours - dense).abs().max().item() / dense.abs().max().item()
            if error > 1e-4:
                raise RuntimeError(f"benchmarks.conv2d: {name} differs from dense torch by {error:.2g} of its maximum")


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def measure(layer: Conv, batch: int, density: float, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    case = Case(layer, batch, density)
    case.check()
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (case.forward, case.forward_dense),
        "grad_input": (case.grad_input, case.grad_input_dense),
        "grad_values": (case.grad_values, case.grad_values_dense),
    }
    row: dict[str, Any] = {**asdict(layer), "batch": batch, "density": density}
    for name, (ours, dense) in calls.items():
        result = compare(ours, dense, seconds=seconds, clock=clock)
        row[name] = {**result, "gflops": case.flops / result["us"] * 1e-3}
    return row


def print_row(layer: Conv, row: dict[str, Any]) -> None:
    cells = [f"{layer.group:12} {layer!s:26} {row['batch']:4} {row['density']:5.2f}"]
    for name in ("forward", "grad_input", "grad_values"):
        r = row[name]
        cells.append(f"{r['dense_us']:8.0f} {r['us']:8.0f} {r['speedup']:5.2f}x {r['gflops']:4.0f}")
    print(" | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer batches, density 0.3 only, short samples")
    parser.add_argument("--group", choices=sorted(QUICK), help="only these layers")
    parser.add_argument("--density", type=float, action="append", help="may be repeated; default 0.5 0.3 0.1")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU time: for a machine that is not idle")
    parser.add_argument("--json", metavar="PATH", help="also write the rows there, as benchmarks/results/*.json")
    args = parser.parse_args()
    if args.threads or args.cpu_time:
        torch.set_num_threads(1 if args.cpu_time else args.threads)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    densities = args.density or ([0.3] if args.quick else [0.5, 0.3, 0.1])
    info = machine()
    print(", ".join(f"{key} {value}" for key, value in info.items()) + (", CPU time" if args.cpu_time else ""))
    heading = f"{'dense us':>8} {'ours us':>8} {'ratio':>6} GF/s"
    print(f"{'':12} {'layer':26} {'n':>4} {'dens.':>5}" + "".join(f" | {heading}" for _ in range(3)))
    print(f"{'':50}" + "".join(f" | {name:30}" for name in ("forward", "gradient of input", "gradient of values")))
    rows = []
    for layer in CONVS:
        if args.group not in (None, layer.group):
            continue
        for batch in (QUICK if args.quick else BATCHES)[layer.group]:
            for density in densities:
                row = measure(layer, batch, density, 0.06 if args.quick else 0.3, clock)
                print_row(layer, row)
                rows.append(row)
    if args.json:
        write_json(args.json, f"python -m benchmarks.conv2d {' '.join(sys.argv[1:])}", rows)


if __name__ == "__main__":
    main()
