"""Block-sparse convolution and linear layers against dense torch: `python -m benchmarks.conv2d [--quick | --summary]`.

Forward, gradient of the input and gradient of the kept values of single layers, called as a frozen model and autograd
call them (the compiled module directly). The peer is torch's dense convolution in channels_last, oneDNN's best format.
GFLOP/s count the kept weights only, `fma` is their share of the measured multiply-add peak, `mem` the share of the time
that moving weights, input and output once would take. Each result is compared with the dense answer before anything is
timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.shapes import BATCHES, CONVS, LINEARS, Conv, Linear
from benchmarks.timing import bandwidth, compare, machine, write_json
from sparsekd import _C, BlockPattern, BlockSparse

QUICK = {"resnet50": [1], "cifar": [64], "mobilenetv2": [1], "recommender": [1, 512], "mlp": [1, 64]}
PASSES = {"forward": "forward", "grad_input": "gradient of input", "grad_values": "gradient of values"}
# Speedups to reach over the layers with 64 outputs and more, by density.
TARGETS = {
    "conv2d forward": {0.5: 1.8, 0.3: 2.9, 0.1: 7.5},
    "conv2d backward": {0.5: 1.6, 0.3: 2.5, 0.1: 6.0},
    "linear forward": {0.5: 1.8, 0.3: 2.9, 0.1: 7.5},
    "linear backward": {},
}
TARGET_BATCHES = {Conv: [1, 16], Linear: [1, 64]}


class Case:
    """One layer with its tensors, and the six calls that are timed."""

    def __init__(self, layer: Conv, batch: int, density: float) -> None:
        torch.manual_seed(0)
        pad = layer.kernel // 2
        dense = torch.randn(layer.out_channels, layer.channels, layer.kernel, layer.kernel)
        grid = BlockPattern(16, 1).grid(tuple(dense.shape))
        self.blocks = BlockSparse.from_dense(dense, BlockPattern(16, 1), mask=torch.rand(grid) < density)
        self.weight = self.blocks.to_dense().contiguous(memory_format=torch.channels_last)
        self.stride, self.pad = (layer.stride, layer.stride), (pad, pad)
        self.x = channels_last(torch.randn(batch, layer.channels, layer.size, layer.size))
        self.shape = _C.Conv2dShape(self.x.shape, len(dense), dense.shape[2:], self.stride, self.pad)
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

    @property
    def traffic(self) -> int:
        """Bytes of weights, input and output: what any pass has to move at least."""
        return 4 * (self.blocks.values.numel() + self.x.numel() + self.dy.numel())

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


class LinearCase(Case):
    """The same for a linear layer; the dense peer is F.linear and the two products of its backward pass."""

    def __init__(self, layer: Linear, batch: int, density: float) -> None:
        torch.manual_seed(0)
        dense = torch.randn(layer.outputs, layer.inputs)
        grid = BlockPattern(16, 1).grid(tuple(dense.shape))
        self.blocks = BlockSparse.from_dense(dense, BlockPattern(16, 1), mask=torch.rand(grid) < density)
        self.weight = self.blocks.to_dense()
        self.x, self.dy = torch.randn(batch, layer.inputs), torch.randn(batch, layer.outputs)
        self.y, self.dx = torch.empty_like(self.dy), torch.empty_like(self.x)
        self.dvalues = torch.empty_like(self.blocks.values)
        self.batch, self.layer, self.threads = batch, layer, torch.get_num_threads()
        self.index = self.blocks.row_ptr.data_ptr(), self.blocks.col_idx.data_ptr(), self.blocks.values.shape[0]
        self.pointers = (self.blocks.values.data_ptr(), *self.index)
        self.linear = _C.PackedLinear(layer.inputs, layer.outputs, 16, 1, *self.pointers)
        self.flops = 2.0 * self.blocks.values.numel() * batch

    def forward(self) -> torch.Tensor:
        self.linear.run(self.x.data_ptr(), self.batch, 0, self.y.data_ptr(), self.threads)
        return self.y

    def forward_dense(self) -> torch.Tensor:
        return F.linear(self.x, self.weight)

    def grad_input(self) -> torch.Tensor:
        _C.linear_grad_input_f32(self.dy.data_ptr(), self.batch, self.layer.outputs, *self.pointers, 16, 1,
                                 self.dx.data_ptr(), self.layer.inputs, self.threads)  # fmt: skip
        return self.dx

    def grad_input_dense(self) -> torch.Tensor:
        return self.dy @ self.weight

    def grad_values(self) -> torch.Tensor:
        _C.linear_grad_values_f32(self.x.data_ptr(), self.batch, self.layer.inputs, self.dy.data_ptr(),
                                  self.layer.outputs, *self.index, 16, 1, self.dvalues.data_ptr(),
                                  self.threads)  # fmt: skip
        return self.dvalues

    def grad_values_dense(self) -> torch.Tensor:
        return self.dy.T @ self.x


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def measure(
    layer: Conv | Linear, batch: int, density: float, seconds: float, clock: Callable[[], float]
) -> dict[str, Any]:
    case = Case(layer, batch, density) if isinstance(layer, Conv) else LinearCase(layer, batch, density)
    case.check()
    row: dict[str, Any] = {"op": "conv2d" if isinstance(layer, Conv) else "linear", **asdict(layer)}
    row.update(batch=batch, density=density, traffic=case.traffic)
    for name in PASSES:
        ours, dense = getattr(case, name), getattr(case, f"{name}_dense")
        result = compare(ours, dense, seconds=seconds, clock=clock)
        row[name] = {**result, "gflops": case.flops / result["us"] * 1e-3}
    return row


def print_row(layer: Conv | Linear, row: dict[str, Any], peak: float, gigabytes: float) -> None:
    cells = [f"{layer.group:12} {layer!s:26} {row['batch']:4} {row['density']:5.2f}"]
    for name in PASSES:
        r = row[name]
        fma, mem = r["gflops"] / peak, row["traffic"] / (r["us"] * gigabytes * 1e3)
        cells.append(
            f"{r['dense_us']:8.0f} {r['us']:8.0f} {r['speedup']:5.2f}x {r['gflops']:4.0f} {fma:4.0%} {mem:4.0%}"
        )
    print(" | ".join(cells), flush=True)


def backward_speedup(row: dict[str, Any]) -> float:
    """Of both gradients together."""
    both = [row["grad_input"], row["grad_values"]]
    return sum(r["dense_us"] for r in both) / sum(r["us"] for r in both)


def geometric_means(rows: list[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Speedups of "conv2d forward", "conv2d backward", ... by density, over the layers with 64 outputs and more."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row.get("out_channels", row.get("outputs")) < 64:
            continue
        for name, speedup in (("forward", row["forward"]["speedup"]), ("backward", backward_speedup(row))):
            found.setdefault(f"{row['op']} {name}", {}).setdefault(row["density"], []).append(speedup)
    return {
        name: {density: statistics.geometric_mean(values) for density, values in by_density.items()}
        for name, by_density in found.items()
    }


def print_summary(means: dict[str, dict[float, float]]) -> None:
    print("\ngeometric means of the speedups over dense, layers with 64 outputs and more (target)")
    for name, by_density in means.items():
        cells = [
            f"{density:g}: {mean:.2f}x" + (f" ({TARGETS[name][density]}x)" if density in TARGETS[name] else "")
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
    for layer in [*CONVS, *LINEARS]:
        if args.group not in (None, layer.group):
            continue
        batches = TARGET_BATCHES[type(layer)] if args.summary else (QUICK if args.quick else BATCHES)[layer.group]
        if not args.summary or (layer.out_channels if isinstance(layer, Conv) else layer.outputs) >= 64:
            chosen += [(layer, batch) for batch in args.batch or batches]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer batches, density 0.3 only, short samples")
    parser.add_argument("--summary", action="store_true", help="the layers and batches of the targets, short samples")
    parser.add_argument("--group", choices=sorted(QUICK), help="only these layers")
    parser.add_argument("--density", type=float, action="append", help="may be repeated; default 0.5 0.3 0.1")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated; default: those of the group")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU time: for a machine that is not idle")
    parser.add_argument("--json", metavar="PATH", help="also write the rows there, as benchmarks/results/*.json")
    parser.add_argument("--plot", metavar="PNG", help="also draw speedup against density")
    args = parser.parse_args()
    if args.threads or args.cpu_time:
        torch.set_num_threads(1 if args.cpu_time else args.threads)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    densities = args.density or ([0.3] if args.quick else [0.5, 0.3, 0.1])
    info = {**machine(), "bandwidth_gb_s": round(bandwidth(), 1)}
    print(", ".join(f"{key} {value}" for key, value in info.items()) + (", CPU time" if args.cpu_time else ""))
    heading = f"{'dense us':>8} {'ours us':>8} {'ratio':>6} GF/s  fma  mem"
    print(f"{'':12} {'layer':26} {'n':>4} {'dens.':>5}" + "".join(f" | {heading}" for _ in PASSES))
    print(f"{'':50}" + "".join(f" | {name:{len(heading)}}" for name in PASSES.values()))
    rows = []
    for layer, batch in layers(args):
        for density in densities:
            row = measure(layer, batch, density, 0.06 if args.quick or args.summary else 0.3, clock)
            print_row(layer, row, info["fma_peak_gflops"], info["bandwidth_gb_s"])
            rows.append(row)
    means = geometric_means(rows)
    print_summary(means)
    if args.json:
        write_json(args.json, f"python -m benchmarks.conv2d {' '.join(sys.argv[1:])}", rows)
    if args.plot:
        plot(means, args.plot)


if __name__ == "__main__":
    main()
