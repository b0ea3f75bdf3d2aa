"""How long a trip of the loop takes, and how long a program takes besides: what decides between tiles.

    python -m benchmarks.gpu.trips --out DIR             # cuDNN beside every tile at 0, 1, 2, 4, 9, 18 and 36 trips
    python -m benchmarks.gpu.trips --profile --out DIR   # a trace of three kernels

The slope of microseconds over trips is a trip, the intercept is prologue and epilogue. The cost model's own figures
stand beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import common
from benchmarks.gpu.layers import dense_call, geometry_of
from benchmarks.gpu.rows import Rows
from benchmarks.lib.shapes import GPU, REHEARSAL, Conv
from sparsekd import BlockSparse
from sparsekd.backends.cuda import cost, masks, plan
from sparsekd.kernels import tiles
from sparsekd.kernels.index import Weight

TRIPS = (0, 1, 2, 4, 9, 18, 36)


def with_trips(layer: Conv, trips: int, device: torch.device, dtype: torch.dtype) -> BlockSparse:
    """A weight whose every row of blocks keeps the same ``trips`` blocks."""
    pattern = common.pattern_for(layer, device)
    grid = pattern.grid(layer.weight)
    kept = torch.zeros(grid[0], grid[1] * grid[2] * grid[3], dtype=torch.bool)
    kept[:, :trips] = True
    blocks = BlockSparse.from_dense(torch.randn(layer.weight) * 0.02, pattern, mask=kept.view(grid))
    return common.on_device(blocks, device, dtype)


def measure(layer: Conv, tile: tiles.Tile, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Microseconds at each number of trips, and the line through them."""
    from sparsekd.kernels import conv2d as kernel  # after `common.start`, which may have them interpreted

    calls, most = [], layer.kernel**2 * layer.channels // common.pattern_for(layer, device).bw
    counts = [trips for trips in TRIPS if trips <= most]
    predicted = []
    for trips in counts:
        blocks = with_trips(layer, trips, device, dtype)
        weight = Weight(layer.out_channels, layer.channels, *blocks.values.shape[1:], *geometry_of(layer))
        x = torch.randn(batch, *layer.input, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        shape = (batch, layer.out_channels, layer.out_size, layer.out_size)
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        table = masks.Mask(blocks.row_ptr, blocks.col_idx, weight).table("forward", tile)
        launch = kernel.forward(x, blocks.values, table, weight, tile, out)
        calls.append(lambda launch=launch, x=x, values=blocks.values, out=out: launch(x, values, out))
        problem = plan.Problem("forward", "bfloat16", "half", batch, shape[2:], weight, trips / most)  # type: ignore[arg-type]
        arranged, work = cost.arrange(problem, tile, table, cost.of_device(device))
        predicted.append(1e6 * cost.seconds(problem, work, arranged, cost.of_device(device)))
    taken = common.medians(calls)
    slope, intercept = line(counts, taken)
    return {
        "tile": str(tile), "trips": counts, "us": taken, "predicted_us": predicted,
        "us_per_trip": slope, "us_besides": intercept,
    }  # fmt: skip


def line(x: list[int], y: list[float]) -> tuple[float, float]:
    """(slope, intercept) of the least squares."""
    middle, height = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
    return slope, height - slope * middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="a trace of one forward, and both gradients")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/gpu")
    options = parser.parse_args()
    device = common.start(options.rehearse)
    dtype = torch.float16 if options.rehearse else torch.bfloat16
    layer = REHEARSAL["tiny-3x3"] if options.rehearse else GPU["resnet50-3x3-256"]
    batch = 1 if options.rehearse else 256
    out = Path(options.out)
    if options.profile:
        return profile(layer, batch, device, dtype, out)
    rows = Rows(out / "rows" / "trips.jsonl")
    for name, each in (REHEARSAL if options.rehearse else GPU).items():
        for direction in common.DIRECTIONS:
            if ("cudnn", name, direction) not in rows:
                x, weight, _, grad = common.operands(each, batch, 1.0, "wide", device, dtype)
                (us,) = common.medians([dense_call(each, direction, x, weight, grad)])
                flops = 2 * batch * each.out_size**2 * each.out_channels * each.channels * each.kernel**2
                rows.add(("cudnn", name, direction), {"us": us, "tflops": flops / us * 1e-6})
    for tile in tiles.GATHER_HALF[-2:] if options.rehearse else tiles.GATHER_HALF:
        if ("trips", str(tile)) not in rows:
            rows.add(("trips", str(tile)), measure(layer, tile, batch, device, dtype))


def profile(layer: Conv, batch: int, device: torch.device, dtype: torch.dtype, out: Path) -> None:
    from benchmarks.gpu.layers import sparse_call

    x, _, blocks, grad = common.operands(layer, batch, 0.3, "wide", device, dtype)
    calls = [sparse_call(layer, direction, x, blocks, grad) for direction in common.DIRECTIONS]
    for call in calls:
        call()
    with torch.profiler.profile() as trace:
        for call in calls:
            call()
    out.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(out / "trace.json"))


if __name__ == "__main__":
    main()
