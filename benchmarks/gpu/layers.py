"""Each layer, direction, density and batch: cuDNN (dense weight, channels_last, autotuned) against every candidate.

    python -m benchmarks.gpu.layers --batch 32 --out results/gpu

`speedup` is dense / fastest kernel of ours, `auto` dense / the path the planner takes, both against a dense layer that
pays nothing to make its weight dense; `native_us` is the CUDA C++ kernel's. Stops politely when `--seconds` are over
and says what is left.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import common
from benchmarks.gpu.rows import Rows
from benchmarks.lib.shapes import GPU, REHEARSAL, Conv
from sparsekd import BlockPattern, BlockSparse
from sparsekd.ops.conv2d import Geometry

Call = Callable[[], object]
ACCEPTANCE = (
    *("resnet50-3x3-128", "resnet50-3x3-256", "resnet50-3x3-512", "resnet50-1x1-1024-256"),
    *("wrn-28-10-320", "wrn-28-10-640", "vgg16-512"),
)


def dense_call(layer: Conv, direction: str, x: Tensor, weight: Tensor, grad: Tensor) -> Call:
    """What a dense layer runs in a direction."""
    if direction == "forward":
        return lambda: torch.nn.functional.conv2d(x, weight, None, layer.stride, layer.padding)
    geometry = ([layer.stride] * 2, [layer.padding] * 2, [1, 1], False, [0, 0], 1)
    wanted = [direction == "grad_input", direction == "grad_values", False]
    return lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)


def sparse_call(
    layer: Conv, direction: str, x: Tensor, blocks: BlockSparse, grad: Tensor, ops: Any = torch.ops.sparsekd
) -> Call:
    """The op of a direction, by the dispatcher or by a backend."""
    geometry = geometry_of(layer)
    index = (blocks.row_ptr, blocks.col_idx)
    if direction == "forward":
        return lambda: ops.conv2d(x, blocks.values, *index, None, layer.out_channels, *geometry)
    if direction == "grad_input":
        return lambda: ops.conv2d_grad_input(grad, blocks.values, *index, x.shape, *geometry)
    return lambda: ops.conv2d_grad_values(grad, x, *index, *blocks.values.shape[1:], *geometry)


def geometry_of(layer: Conv) -> Geometry:
    kernel, stride, padding = ((size, size) for size in (layer.kernel, layer.stride, layer.padding))
    return Geometry(kernel, stride, padding)


def native_call(layer: Conv, x: Tensor, blocks: BlockSparse, grad: Tensor) -> Call | None:
    """The forward pass in CUDA C++, or None where it was not built."""
    from sparsekd.backends.cuda import driver, masks, ops

    if driver.why_not(x.dtype, x.device) is not None:
        return None
    sizes = (layer.out_channels, layer.channels, blocks.values, geometry_of(layer))
    mask, out = masks.masks.of(blocks.row_ptr, blocks.col_idx, *sizes), torch.empty_like(grad)
    return lambda: ops.native_forward(x, blocks.values, mask, out, None, None, None)


def measure(
    layer: Conv,
    batch: int,
    density: float,
    kind: str,
    direction: str,
    device: torch.device,
    dtype: torch.dtype,
    pattern: BlockPattern | None = None,
) -> dict[str, Any]:
    """One row: microseconds of dense, of the path chosen, of every candidate, and how far ours is from dense."""
    from sparsekd.backends.cuda import choose
    from sparsekd.backends.cuda.plan import measuring

    x, weight, blocks, grad = common.operands(layer, batch, density, kind, device, dtype, pattern)
    call = sparse_call(layer, direction, x, blocks, grad)
    choose.plan_of(x.device).measured.clear()  # each row is measured anew
    with measuring() as measured:
        call()
    (found,) = measured
    native = native_call(layer, x, blocks, grad) if direction == "forward" else None
    calls = [dense_call(layer, direction, x, weight, grad), call, *([native] if native else [])]
    dense, auto, *native_us = common.medians(calls)
    ours = {name: time for name, time in found.candidates.items() if name.startswith("triton")}
    fastest = min(ours, key=ours.__getitem__, default="none")  # all may have been dropped
    fastest_us = ours.get(fastest, math.nan)
    flops = 2 * batch * layer.out_size**2 * math.prod(layer.weight)
    return {
        "batch": batch,
        "density": density,
        "mask": kind,
        "block": str(blocks.pattern),
        "direction": direction,
        "dense_us": round(dense, 2),
        "dense_tflops": round(flops / dense / 1e6, 1),
        "auto_us": round(auto, 2),
        "chosen": str(found.choice),
        "fastest": fastest,
        "fastest_us": fastest_us,
        "speedup": digits(dense / fastest_us),
        "auto": digits(dense / auto),
        "share_of_ideal": digits(dense / fastest_us * density),
        "native_us": round(native_us[0], 2) if native_us else None,
        "candidates": found.candidates,
        "dropped": found.dropped,
        "error": error_of(layer, direction, call, blocks, x, grad),
    }


def error_of(layer: Conv, direction: str, call: Call, blocks: BlockSparse, x: Tensor, grad: Tensor) -> float:
    """The largest difference from the dense library on the same weights, relative to its largest value."""
    got: Any = call()
    masked = blocks.to_dense().contiguous(memory_format=torch.channels_last)
    want: Any = dense_call(layer, direction, x, masked, grad)()
    if direction != "forward":
        want = want[0 if direction == "grad_input" else 1]
    if direction == "grad_values":
        want = BlockSparse.from_dense(want.cpu(), blocks.pattern, mask=blocks.mask().cpu()).values.to(want.device)
    return digits(((got.float() - want.float()).abs().max() / want.float().abs().max()).item())


def digits(ratio: float) -> float:
    return float(f"{ratio:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="*", default=list(common.BATCHES))
    parser.add_argument("--density", type=float, nargs="*", default=list(common.DENSITIES))
    parser.add_argument("--mask", nargs="*", default=["wide", "free"], choices=common.MASKS)
    parser.add_argument("--direction", nargs="*", default=list(common.DIRECTIONS), choices=common.DIRECTIONS)
    parser.add_argument("--layer", nargs="*", default=list(GPU), choices=GPU)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--acceptance", action="store_true", help="the seven layers of the first run on a GPU")
    parser.add_argument("--preset", action="store_true", help="the blocks that users get, not 64x64")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/gpu")
    options = parser.parse_args()
    device = common.start(options.rehearse)
    layers = REHEARSAL if options.rehearse else {id: GPU[id] for id in options.layer}
    dtype = torch.float16 if options.rehearse else getattr(torch, options.dtype)
    if options.acceptance and not options.rehearse:
        layers = {id: GPU[id] for id in ACCEPTANCE}
    if options.rehearse:
        options.batch, options.density = [1], [0.5]
    pattern = BlockPattern.for_device("cuda") if options.preset and not options.rehearse else None
    name = f"layers-{'-'.join(map(str, options.batch))}-{str(dtype).removeprefix('torch.')}"
    goes_on, before = common.until(options.seconds), common.facts(device)
    name += "-preset" if options.preset else ""
    kept = Rows(Path(options.out) / "rows" / f"{name}.jsonl")
    left: list[str] = []
    cases = [
        (id, batch, density, kind, direction)
        for batch in options.batch
        for id in layers
        for density in options.density
        for kind in (options.mask if density < 1 else options.mask[:1])
        for direction in options.direction
    ]
    for id, batch, density, kind, direction in cases:
        key = (id, batch, density, kind, direction)
        if key in kept:
            continue
        if not goes_on():
            left.append(f"{id} {batch} {density} {kind} {direction}")
            continue
        row = {"layer": id} | measure(layers[id], batch, density, kind, direction, device, dtype, pattern)
        kept.add(key, row)
        print(
            f"{id:26} n{batch:<4} d{density:<4} {row['mask']:6} {row['direction']:11} "
            f"dense {row['dense_us']:9.1f}  ours {row['fastest_us']:9.1f} us  x{row['speedup']:<6} "
            f"auto x{row['auto']:<6} {row['fastest']}",
            flush=True,
        )
    rows = kept.rows
    common.write(options.out, name, before, device, rows, left=left)
    for density in options.density:
        for way in options.direction:
            ratios = [row["speedup"] for row in rows if row["density"] == density and row["direction"] == way]
            if ratios:
                middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
                print(f"density {density:<4} {way:11} geometric mean x{middle:.2f} of {len(ratios)} rows")
    if left:
        print(f"{len(left)} rows left for another run, first: {left[0]}")


if __name__ == "__main__":
    main()
