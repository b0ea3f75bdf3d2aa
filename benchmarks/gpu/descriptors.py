"""What the compiler makes of TMA, Hopper's bulk copies by tensor descriptors, in the loop of the gather: read, not run.

    python -m benchmarks.gpu.descriptors        # writes benchmarks/results/gpu_descriptors.{json,md}; needs no GPU

Three ways to feed the products of a shared mask, beside the kernel's own copies by pointers:

weights     weights stored as ``[steps * BN, BK]``, one box a trip; activations by pointers
both        activations too, as ``[pixels, channels]``: a 1x1 convolution
box         activations as boxes ``[images, height, width, channels]`` moved by the tap: a 3x3 of stride 1, whose
            borders the hardware fills with zeros

A way is a candidate for the kernel only if its loop is the pipeline that `pipeline.py` asks for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from benchmarks.gpu import aot, pipeline
from sparsekd.kernels.tiles import GATHER_HALF, Tile

RESULTS = Path(__file__).parents[1] / "results" / "gpu_descriptors"
BOX = {128: (32, 2, 2)}  # pixels of a tile as images, height, width: even sides of 14, 28 and 56 leave nothing over
WAYS = ("weights", "both", "box")
TILES = tuple(tile for tile in GATHER_HALF if tile.bm == 128 and tile.bn >= 128)


@triton.jit
def gather_by_descriptors(  # type: ignore[no-untyped-def]
    x,  # a pointer, or a descriptor
    weights,  # a descriptor of [steps * BN, BK]
    out_ptr,
    slots_ptr,
    tiles_ptr,
    pixels,
    grid_h,
    grid_w,
    in_h,
    in_w,
    in_eights,
    out_eights,
    num_tiles,
    WAY: tl.constexpr,
    IMAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    BM: tl.constexpr = IMAGES * HEIGHT * WIDTH
    tile_ptr = tiles_ptr + tl.program_id(0) % num_tiles * 8
    row, begin, end = tl.multiple_of(tl.load(tile_ptr), [8]), tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    place = tl.program_id(0) // num_tiles
    in_c, out_c = in_eights * 8, out_eights * 8
    if WAY == "box":
        across, down = grid_w // WIDTH, grid_h // HEIGHT
        first_j, first_i = place % across * WIDTH, place // across % down * HEIGHT
        first_image = place // (across * down) * IMAGES
        p = tl.arange(0, BM)
        j, i = first_j + p % WIDTH, first_i + p // WIDTH % HEIGHT
        image = (first_image + p // (WIDTH * HEIGHT)).to(tl.int64)
        m = (image * grid_h + i) * grid_w + j
    else:
        m = place * BM + tl.arange(0, BM)
        j, i, image = m % grid_w, m // grid_w % grid_h, (m // (grid_w * grid_h)).to(tl.int64)
    inside = m < pixels
    start = ((image * in_h + i) * in_w + j) * in_c
    acc = tl.full((BM, BN), 0.0, tl.float32)
    slot_ptr = slots_ptr + begin * 4
    dy, dx, channel = tl.load(slot_ptr), tl.load(slot_ptr + 1), tl.multiple_of(tl.load(slot_ptr + 2), [8])
    for step in range(begin, end):
        if WAY == "box":
            gathered = tl.reshape(x.load([first_image, first_i + dy, first_j + dx, channel]), (BM, BK))
        elif WAY == "both":
            gathered = x.load([place * BM, channel])
        else:
            shift = (dy.to(tl.int64) * in_w + dx) * in_c + channel
            seen = inside & (i + dy >= 0) & (i + dy < in_h) & (j + dx >= 0) & (j + dx < in_w)
            places = (start + shift)[:, None] + tl.arange(0, BK)[None, :]
            gathered = tl.load(x + places, mask=seen[:, None], other=0.0)
        kept = weights.load([step * BN, 0])
        slot_ptr += 4
        dy, dx, channel = tl.load(slot_ptr), tl.load(slot_ptr + 1), tl.multiple_of(tl.load(slot_ptr + 2), [8])
        acc = tl.dot(gathered, kept.T, acc)
    places = m.to(tl.int64)[:, None] * out_c + (row + tl.arange(0, BN))[None, :]
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def compiled(way: str, tile: Tile) -> Any:
    """The kernel of a way with bfloat16 operands, for sm_90."""
    names = gather_by_descriptors.arg_names
    images, height, width = BOX[tile.bm]
    constants = {"WAY": way, "IMAGES": images, "HEIGHT": height, "WIDTH": width, "BN": tile.bn, "BK": tile.bk}
    box = (tile.bm, tile.bk) if way == "both" else (images, height, width, tile.bk)
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= {"slots_ptr": "*i32", "tiles_ptr": "*i32", "out_ptr": "*bf16"}
    signature["x"] = "*bf16" if way == "weights" else f"tensordesc<bf16{list(box)}>"
    signature["weights"] = f"tensordesc<bf16{[tile.bn, tile.bk]}>"
    aligned = [name for name in names if signature[name].startswith("*")]
    source = aot.ASTSource(
        fn=gather_by_descriptors,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=aot.GPUTarget("cuda", 90, 32), options=options)


def read(way: str, tile: Tile) -> dict[str, Any]:
    """A row: what the code of a way takes, and what breaks its pipeline."""
    by_pointers = way == "pointers"
    config = aot.Config("forward", "half", "bf16", tile, (64, 64))
    found = aot.compiled(config, 90) if by_pointers else compiled(way, tile)
    registers, stack = aot.resources(found)
    return {
        "way": way,
        "tile": str(tile),
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": found.metadata.shared,
        "programs_per_processor": aot.occupancy(tile.warps, registers, found.metadata.shared, 90),
        "instructions_a_trip": pipeline.trip_instructions(pipeline.machine_code(found)),
        "operands_in_registers": bool(pipeline.through_registers(pipeline.main_loop(found.asm["ttgir"]))),
        "buffers": pipeline.buffers(found.asm["ttgir"]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", "|" + "---|" * len(names)]
    return "\n".join(lines + [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(RESULTS), help="path without ending; '' keeps nothing")
    options = parser.parse_args()
    rows = [read(way, tile) for tile in TILES for way in ("pointers", *WAYS)]
    print(table(rows))
    if options.out:
        stem, version = Path(options.out), triton.__version__
        stem.with_suffix(".json").write_text(json.dumps({"triton": version, "rows": rows}, indent=1) + "\n")
        stem.with_suffix(".md").write_text(
            f"# TMA in the loop of the gather\n\nCompiled for sm_90 by Triton {version} with `python -m "
            f"benchmarks.gpu.descriptors`, whose head says what the ways are; nothing here was run.\n\n{table(rows)}\n"
        )


if __name__ == "__main__":
    main()
