"""What the cost model expects of an H200, kept to be held against measurements.

    python -m benchmarks.gpu.model              # writes benchmarks/results/gpu_model.json; needs no GPU

Bytes, multiplications, tile efficiency and waves as in backends/cuda/cost.py; the masks are those of gpu.layers. Every
figure here is a prediction.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.gpu import common, targets
from benchmarks.lib.shapes import GPU, Conv
from sparsekd.backends.cuda import choose, cost, masks, plan
from sparsekd.kernels.index import Weight


def predict(layer: Conv, batch: int, density: float, kind: str, direction: str) -> dict[str, Any]:
    """Predicted microseconds of dense and of the best tile."""
    pattern = common.pattern_for(layer, torch.device("cuda"))
    mask = common.mask_of(layer, pattern, density, kind)
    grid = pattern.grid(layer.weight)
    flat = mask.permute(0, 2, 3, 1).reshape(grid[0], -1)
    row_ptr = torch.zeros(grid[0] + 1, dtype=torch.int32)
    row_ptr[1:] = flat.sum(1).cumsum(0)
    pairs = tuple((n, n) for n in (layer.kernel, layer.stride, layer.padding, 1))
    weight = Weight(layer.out_channels, layer.channels, pattern.bh, pattern.bw, *pairs, 1)
    known = masks.Mask(row_ptr, flat.nonzero()[:, 1].int(), weight)
    image = layer.size if direction == "grad_input" else layer.out_size
    problem = plan.Problem(direction, "bfloat16", "half", batch, (image, image), weight, density)
    values = torch.empty(0, pattern.bh, pattern.bw, dtype=torch.bfloat16)
    tile, ours = min(choose.tiles(problem, known, values), key=lambda pair: pair[1])
    device, table = cost.DEVICES["NVIDIA H200"], known.table(direction, tile)
    depth = tile.bm if direction == "grad_values" else table.slot
    dense = cost.dense_seconds(cost.dense_flops(problem), cost.moved_bytes(problem), "half", device)
    return {
        "batch": batch,
        "density": density,
        "mask": kind,
        "direction": direction,
        "predicted_dense_us": round(dense * 1e6, 1),
        "predicted_us": round(ours * 1e6, 1),
        "predicted_speedup": round(dense / ours, 2),
        "tile": str(tile),
        "parts": tile.splits,
        "fill": round(table.fill, 3),
        "tile_cap": round(cost.cap(direction, tile, device, depth), 3),
    }


def against_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what the model expects there."""
    found = []
    for target in targets.TARGETS:
        mean, layers = targets.of(target, rows, "predicted_speedup")
        found.append(target._asdict() | {"predicted": round(mean, 2), "layers": layers})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/gpu_model.json")
    options = parser.parse_args()
    rows = [
        {"layer": name} | predict(layer, batch, density, kind, direction)
        for name, layer in GPU.items()
        for batch in common.BATCHES
        for density in common.DENSITIES
        for kind in (common.MASKS if density < 1 else common.MASKS[:1])
        for direction in common.DIRECTIONS
    ]
    assumed = {
        name: getattr(cost, name)
        for name in ("DENSE_SHARE", "KERNEL_SHARE", "PROGRAM_SECONDS", "BYTES_SHARE", "LAUNCH", "TRIP_INSTRUCTIONS")
    }
    device = cost.DEVICES["NVIDIA H200"]._asdict()
    with open(options.out, "w") as file:
        record = {"kind": "prediction", "device": device, "assumed": assumed, "targets": against_targets(rows)}
        json.dump(record | {"rows": rows}, file, indent=1)
        file.write("\n")
    for row in record["targets"]:
        print(row)


if __name__ == "__main__":
    main()
