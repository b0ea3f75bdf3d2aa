"""Forward of block-sparse convolutions in bf16 and int8: `python -m benchmarks.conv2d_low --dtype bf16 [--json PATH]`.

The ResNet-50 and CIFAR layers with 64 outputs and more, batches 1 and 16, channels_last, called as a frozen model calls
them. Peers, dense and in channels_last: for bf16 torch's bf16 convolution (oneDNN), for int8 the fastest of torch's
fp32, bf16 and quantised convolution (u8 in and out, as ours). Outputs are compared before timing; `peak` is the
multiply-add peak of the same instruction, measured beside.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import CONVS, Conv
from benchmarks.timing import interleaved, machine, write_json
from sparsekd import _C, BlockPattern, BlockSparse, quantize

PATTERNS = {"bf16": "16x2", "int8": "16x4"}
PEAKS = {"bf16": "bfloat16", "int8": "int8"}
Call = Callable[[], Tensor]
Real = Callable[[Tensor], Tensor]  # an output as float32


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def bf16(blocks: BlockSparse, x: Tensor, stride: int, pad: int) -> tuple[Call, dict[str, Call], Real]:
    x, values, dense = x.bfloat16(), blocks.values.bfloat16(), channels_last(blocks.to_dense().bfloat16())
    k, block = len(dense), values.shape[1:]
    shape = _C.Conv2dShape(x.shape, k, dense.shape[2:], (stride, stride), (pad, pad), block=block)
    index = (blocks.row_ptr.data_ptr(), blocks.col_idx.data_ptr(), values.shape[0])
    layer = _C.PackedConv2dBf16(shape, values.data_ptr(), *index)
    y = channels_last(torch.empty(x.shape[0], k, shape.p, shape.q, dtype=torch.bfloat16))
    threads = torch.get_num_threads()

    def ours() -> Tensor:
        layer.run(x.data_ptr(), True, 0, y.data_ptr(), True, threads)
        return y

    return ours, {"bf16": lambda: F.conv2d(x, dense, None, stride, pad)}, Tensor.float


def int8(blocks: BlockSparse, x: Tensor, stride: int, pad: int) -> tuple[Call, dict[str, Call], Real]:
    dense = channels_last(blocks.to_dense())
    exact = F.conv2d(x, dense, None, stride, pad)
    scale_x, scale_y = (quantize.ByteScale.of_range(*(v.item() for v in t.aminmax())) for t in (x, exact))
    options: dict[str, Any] = {"image": tuple(x.shape[2:]), "stride": (stride, stride), "padding": (pad, pad)}
    layer, bytes_x = quantize.quantize_layer(blocks, None, scale_x, y=scale_y, **options), scale_x.quantize(x)
    _, weight_scale = quantize.quantize_weight(blocks)
    per_channel = weight_scale.double(), torch.zeros(len(weight_scale), dtype=torch.long)
    packed = torch.ops.quantized.conv2d_prepack(
        torch.quantize_per_channel(dense, *per_channel, 0, torch.qint8), None, [stride] * 2, [pad] * 2, [1, 1], 1
    )
    quantized_x = torch.quantize_per_tensor(x, scale_x.scale, scale_x.zero, torch.quint8)
    half_x, half_dense = x.bfloat16(), channels_last(dense.bfloat16())
    peers: dict[str, Call] = {
        "fp32": lambda: F.conv2d(x, dense, None, stride, pad),
        "bf16": lambda: F.conv2d(half_x, half_dense, None, stride, pad),
        "int8": lambda: torch.ops.quantized.conv2d(quantized_x, packed, scale_y.scale, scale_y.zero),
    }

    def real(y: Tensor) -> Tensor:
        return y.dequantize() if y.is_quantized else scale_y.dequantize(y) if y.dtype == torch.uint8 else y.float()

    return lambda: layer(bytes_x), peers, real


def check(ours: Tensor, peers: dict[str, Tensor], tolerance: float) -> None:
    for name, peer in peers.items():
        error = ((ours - peer).abs().max() / peer.abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(f"benchmarks.conv2d_low: we differ from {name} by {error:.2g} of its largest output")


def measure(dtype: str, layer: Conv, batch: int, density: float, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    dense = torch.randn(layer.out_channels, layer.channels, layer.kernel, layer.kernel)
    pattern = BlockPattern(*map(int, PATTERNS[dtype].split("x")))
    blocks = BlockSparse.from_dense(dense, pattern, mask=torch.rand(pattern.grid(tuple(dense.shape))) < density)
    x = channels_last(torch.randn(batch, layer.channels, layer.size, layer.size))
    ours, peers, real = (bf16 if dtype == "bf16" else int8)(blocks, x, layer.stride, layer.kernel // 2)
    y = ours()
    check(real(y), {name: real(peer()) for name, peer in peers.items()}, 0.01 if dtype == "bf16" else 0.05)
    samples = interleaved([ours, *peers.values()], repeats=7, seconds=seconds)
    us = {name: statistics.median(times) * 1e6 for name, times in zip(["ours", *peers], samples, strict=True)}
    flops = 2.0 * blocks.values.numel() * y.numel() / layer.out_channels
    best = min(peers, key=lambda name: us[name])
    speedup = us[best] / us["ours"]
    return {**asdict(layer), "batch": batch, "density": density, "us": us, "peer": best, "speedup": speedup,
            "gflops": flops / us["ours"] * 1e-3}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(PATTERNS), required=True)
    parser.add_argument("--density", type=float, action="append", help="may be repeated; default 0.5 0.3 0.1")
    parser.add_argument("--group", choices=["resnet50", "cifar"], help="only these layers")
    parser.add_argument("--seconds", type=float, default=0.2, help="for one layer")
    parser.add_argument("--json", metavar="PATH", help="also write the rows there, as benchmarks/results/*.json")
    args = parser.parse_args()
    peak = _C.peak_gflops(torch.get_num_threads(), 0.2, PEAKS[args.dtype])
    print(", ".join(f"{key} {value}" for key, value in machine().items()), f", {args.dtype} peak {peak:.0f}")
    layers = [one for one in CONVS if one.group in ("resnet50", "cifar") and one.out_channels >= 64]
    rows = []
    for density in args.density or [0.5, 0.3, 0.1]:
        for layer in layers:
            for batch in [1, 16] if args.group in (None, layer.group) else []:
                row = measure(args.dtype, layer, batch, density, args.seconds) | {"peak_gflops": peak}
                rows.append(row)
                times = " ".join(f"{name} {us:.0f}" for name, us in row["us"].items())
                print(f"{layer.group:9} {layer!s:26} {batch:3} {density:5.2f} | {times} us | {row['speedup']:5.2f}x "
                      f"over {row['peer']} | {row['gflops']:4.0f} GF/s, {row['gflops'] / peak:.0%} of peak",
                      flush=True)  # fmt: skip
        ratios = [math.log(row["speedup"]) for row in rows if row["density"] == density]
        print(f"density {density}: geometric mean {math.exp(sum(ratios) / len(ratios)):.2f}x")
    if args.json:
        write_json(args.json, f"python -m benchmarks.conv2d_low {' '.join(sys.argv[1:])}", rows)


if __name__ == "__main__":
    main()
