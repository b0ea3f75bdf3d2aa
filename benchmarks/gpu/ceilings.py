"""What the device can do at most, and one convolution against float64: the first twenty seconds.

python -m benchmarks.gpu.ceilings --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import common
from benchmarks.gpu.layers import sparse_call
from benchmarks.gpu.rows import Rows
from benchmarks.lib.shapes import GPU, REHEARSAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/gpu")
    options = parser.parse_args()
    device = common.start(options.rehearse)
    rows = Rows(Path(options.out) / "rows" / "ceilings.jsonl")
    rows.add("facts", common.facts(device))
    half = torch.float32 if options.rehearse else torch.bfloat16
    source = torch.empty(2**12 if options.rehearse else 2**29, dtype=half, device=device)
    target = torch.empty_like(source)
    side = 64 if options.rehearse else 8192
    a, b = (torch.randn(side, side, dtype=half, device=device) for _ in range(2))
    copy_us, product_us = common.medians([lambda: target.copy_(source), lambda: a @ b])
    moved = 2 * source.numel() * source.element_size()
    rows.add("copy", {"us": copy_us, "gigabytes_per_second": moved / copy_us * 1e-3})
    rows.add("product", {"us": product_us, "tflops": 2 * side**3 / product_us * 1e-6})
    layer = REHEARSAL["tiny-3x3"] if options.rehearse else GPU["resnet50-3x3-256"]
    x, _, blocks, grad = common.operands(layer, 2, 0.3, "wide", device, half)
    got: Any = sparse_call(layer, "forward", x, blocks, grad)()
    geometry = (None, layer.stride, layer.padding)
    want = torch.nn.functional.conv2d(x.double(), blocks.to_dense().double(), *geometry)
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    rows.add("convolution", {"layer": str(layer), "error": error})
    if not error < 2e-2:
        raise SystemExit(
            f"ceilings: a convolution is wrong by {error:.3g} of its largest value; nothing else is worth running"
        )


if __name__ == "__main__":
    main()
