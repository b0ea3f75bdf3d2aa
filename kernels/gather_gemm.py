"""The kernel under every forward pass and every gradient of an input: ``out = gather(x) @ blocks``, fused epilogue.

One program owns ``BM`` pixels x ``BN`` output channels and walks its tile's steps (``index.py``): gather ``[BM, BK]``
activations of one tap, multiply by ``[BK, BN]`` weights taken from up to ``BN / LANE`` kept blocks, accumulate in
float32. The steps of the next trip are read one trip ahead, and the loop holds no division. The hardware hands out
programs in order, so a grid sorted longest-first is a dynamic schedule; a persistent one would fix the shares before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .index import SLOT_FIELDS, TILE_FIELDS, StepTable
from .launch import Launch
from .tiles import Tile

ACTIVATIONS = (None, "relu", "relu6", "silu")
_SLOT_FIELDS = tl.constexpr(SLOT_FIELDS)
_TILE_FIELDS = tl.constexpr(TILE_FIELDS)


class Walk(NamedTuple):
    """How output pixels meet gathered pixels: output ``(i * out_step + phase)`` starts at gathered ``i * in_step``."""

    images: int
    grid: tuple[int, int]  # pixels of a phase
    gathered: tuple[int, int]
    out: tuple[int, int]
    in_step: tuple[int, int] = (1, 1)
    out_step: tuple[int, int] = (1, 1)
    pointwise: bool = False  # an output pixel gathers itself alone: no borders to check


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    # Comparisons, not minima and maxima: a NaN must come through.
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    if ACTIVATION == "relu6":
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def _finish(acc, bias_ptr, residual_ptr, out_ptr, start, inside, row_begin, row_end, ACTIVATION: tl.constexpr):
    """Store act(acc + bias + residual) of [BM, columns] sums whose pixels begin at ``start [BM]``."""
    rows = row_begin + tl.arange(0, acc.shape[1])
    row_mask = rows < row_end
    mask = inside[:, None] & row_mask[None, :]
    places = start[:, None] + rows[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    acc = _activate(acc, ACTIVATION)
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_slot(slot_ptr):
    dy, dx, channel = tl.load(slot_ptr), tl.load(slot_ptr + 1), tl.load(slot_ptr + 2)
    # Hints on the loads themselves: on a value carried around the loop they are lost.
    return dy, dx, tl.multiple_of(channel, [8]), tl.multiple_of(tl.load(slot_ptr + 3), [8])


@triton.jit
def _load_weights(
    values_ptr,
    offset,
    BK: tl.constexpr,
    BN: tl.constexpr,
    LANE: tl.constexpr,
    BW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """[BK, BN] weights of one slot; offset [BN] is that of the lane's first weight in values, negative for zeros."""
    k = tl.arange(0, BK)[:, None]
    n = (tl.arange(0, BN) % LANE)[None, :]
    kept = offset[None, :] >= 0
    # The hints hold because LANE, BK and therefore every piece start at multiples of 16 weights.
    if TRANSPOSED:
        places = tl.max_contiguous(tl.multiple_of(offset[None, :] + k * BW + n, [1, 16]), [1, 16])
        kept = tl.max_constancy(kept, [1, 16])
    else:
        places = tl.max_contiguous(tl.multiple_of(offset[None, :] + n * BW + k, [16, 1]), [16, 1])
    return tl.load(values_ptr + places, mask=kept, other=0.0)


# Sizes that are 1, or multiples of 16, get no code of their own: it would be no faster, and compiling takes seconds.
@triton.jit(
    do_not_specialize=[
        *("pixels", "grid_h", "grid_w", "in_h", "in_w", "in_eights", "out_h", "out_w", "out_eights"),
        *("in_step_h", "in_step_w", "out_step_h", "out_step_w", "num_tiles", "pixel_tiles", "group", "part_eights"),
    ]
)
def gather_gemm_kernel(
    x_ptr,  # [images, in_h, in_w, in_c]
    values_ptr,  # [nnzb, bh, bw]
    bias_ptr,  # [out_c] or None
    residual_ptr,  # as out, or None
    out_ptr,  # [images, out_h, out_w, out_c], or float32 [parts, images, out_h, out_w, out_c]
    tiles_ptr,
    slots_ptr,
    offsets_ptr,
    pixels,
    grid_h,
    grid_w,
    in_h,
    in_w,
    in_eights,  # channels / 8
    out_h,
    out_w,
    out_eights,
    in_step_h,
    in_step_w,
    out_step_h,
    out_step_w,
    num_tiles,
    pixel_tiles,
    group,  # at most pixel_tiles
    part_eights,  # elements of one part of out / 8
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LANE: tl.constexpr,
    BW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    POINTWISE: tl.constexpr,
    WHOLE: tl.constexpr,
    SWAPPED: tl.constexpr,
    PARTED: tl.constexpr,
    HALVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A group of pixel tiles goes through all channel tiles, longest walk first, before the next: they share x in L2.
    program = tl.program_id(0)
    chunk = program // (group * num_tiles)
    height = tl.minimum(pixel_tiles - chunk * group, group)
    within = program - chunk * group * num_tiles
    tile_ptr = tiles_ptr + within // height * _TILE_FIELDS
    m = (chunk * group + within % height) * BM + tl.arange(0, BM)

    # Channels come in eights, and the compiler must know it to copy and to store 16 bytes under one mask.
    in_c, out_c = in_eights * 8, out_eights * 8
    row_begin, row_end = tl.multiple_of(tl.load(tile_ptr), [8]), tl.multiple_of(tl.load(tile_ptr + 1), [8])
    begin, end = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    phase_y, phase_x = tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    if PARTED:
        part, parts, walk = tl.program_id(1), tl.num_programs(1), end - begin
        end = begin + walk * (part + 1) // parts
        begin += walk * part // parts
        out_ptr += part.to(tl.int64) * part_eights * 8

    j = m % grid_w
    i = m // grid_w % grid_h
    image = (m // (grid_w * grid_h)).to(tl.int64)
    inside = m < pixels
    top, left = i * in_step_h, j * in_step_w
    start = ((image * in_h + top) * in_w + left) * in_c  # [BM]
    if POINTWISE:
        start = m.to(tl.int64) * in_c

    k = tl.arange(0, BK)
    lane = tl.arange(0, BN) // LANE
    acc = tl.full((BN, BM) if SWAPPED else (BM, BN), 0.0, tl.float32)
    slot_ptr = slots_ptr + begin * _SLOT_FIELDS
    dy, dx, channel, width = _load_slot(slot_ptr)
    offset = tl.load(offsets_ptr + begin * (BN // LANE) + lane)  # [BN]
    for step in range(begin, end):
        if POINTWISE:
            shift = channel
            seen = inside
        else:
            shift = (dy.to(tl.int64) * in_w + dx) * in_c + channel
            y, x = top + dy, left + dx
            seen = inside & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
        mask = seen[:, None]
        if not WHOLE:
            mask = mask & tl.max_constancy(k < width, [8])[None, :]
        gathered = tl.load(x_ptr + (start + shift)[:, None] + k[None, :], mask=mask, other=0.0)  # [BM, BK]
        weights = _load_weights(values_ptr, offset, BK, BN, LANE, BW, TRANSPOSED)  # [BK, BN]
        slot_ptr += _SLOT_FIELDS
        dy, dx, channel, width = _load_slot(slot_ptr)
        offset = tl.load(offsets_ptr + (step + 1) * (BN // LANE) + lane)
        if SWAPPED:
            acc = tl.dot(tl.trans(weights), tl.trans(gathered), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(gathered, weights, acc, input_precision=PRECISION)
    if SWAPPED:
        acc = tl.trans(acc)

    y, x = i * out_step_h + phase_y, j * out_step_w + phase_x
    start = ((image * out_h + y) * out_w + x) * out_c
    inside = inside & (y < out_h) & (x < out_w)
    if HALVED:  # the residual of all columns beside their sums does not fit the registers
        near, far = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        _finish(near, bias_ptr, residual_ptr, out_ptr, start, inside, row_begin, row_end, ACTIVATION)
        _finish(far, bias_ptr, residual_ptr, out_ptr, start, inside, row_begin + BN // 2, row_end, ACTIVATION)
    else:
        _finish(acc, bias_ptr, residual_ptr, out_ptr, start, inside, row_begin, row_end, ACTIVATION)


@triton.jit(do_not_specialize=["total", "out_c", "parts"])
def sum_parts_kernel(
    parts_ptr,  # [parts, total], of any type
    bias_ptr,
    residual_ptr,
    out_ptr,  # [total], rows of out_c
    total,
    out_c,
    parts,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < total
    acc = tl.load(parts_ptr + places, mask=mask, other=0.0).to(tl.float32)
    for _ in range(1, parts):  # always in this order: two runs give the same bits
        parts_ptr += total
        acc += tl.load(parts_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + places % out_c, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    acc = _activate(acc, ACTIVATION)
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=mask)


class GatherGemm:
    """``out = act(gather(x) @ blocks + bias + residual)`` for tensors like those it was made for, channels last."""

    def __init__(
        self,
        x: Tensor,
        values: Tensor,
        table: StepTable,
        walk: Walk,
        tile: Tile,
        out: Tensor,
        *,
        transposed: bool,
        activation: str | None = None,
        precision: str = "ieee",
    ) -> None:
        self._tables = (table.tiles, table.slots, table.offsets)
        pixels = walk.images * walk.grid[0] * walk.grid[1]
        pixel_tiles = triton.cdiv(pixels, tile.bm)
        parted = tile.splits > 1
        self._parts = (tile.splits, out.numel()) if parted else None
        self._add = SumParts(tile.splits, out, out.shape[1], activation) if parted else None
        sizes = (
            pixels, *walk.grid, *walk.gathered, x.shape[1] // 8, *walk.out, out.shape[1] // 8,
            *walk.in_step, *walk.out_step, table.num_tiles, pixel_tiles, min(tile.group, pixel_tiles), out.numel() // 8,
        )  # fmt: skip
        constants = {
            "BM": tile.bm, "BN": tile.bn, "BK": table.slot, "LANE": table.lane, "BW": values.shape[2],
            "TRANSPOSED": transposed, "POINTWISE": walk.pointwise, "WHOLE": table.whole, "SWAPPED": tile.swapped,
            "PARTED": parted, "HALVED": tile.halved, "ACTIVATION": None if parted else activation,
            "PRECISION": precision,
        }  # fmt: skip
        grid = (pixel_tiles * table.num_tiles, tile.splits)
        options = {"num_warps": tile.warps, "num_stages": tile.stages_at(table.slot)}
        self._launch = None if out.numel() == 0 else Launch(gather_gemm_kernel, grid, sizes, constants, **options)

    def __call__(
        self, x: Tensor, values: Tensor, out: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if self._launch is None:
            return out
        if self._add is None:
            self._launch(x, values, bias, residual, out, *self._tables)
            return out
        parts = torch.empty(self._parts, dtype=torch.float32, device=out.device)
        self._launch(x, values, None, None, parts, *self._tables)
        return self._add(parts, out, bias, residual)


class SumParts:
    """``out = act(parts.sum(0) + bias + residual)``, added in a fixed order; ``out`` may be the only part itself."""

    def __init__(self, parts: int, out: Tensor, channels: int, activation: str | None = None) -> None:
        block = 1024
        grid = (triton.cdiv(out.numel(), block), 1)
        constants = {"ACTIVATION": activation, "BLOCK": block}
        self._launch = Launch(sum_parts_kernel, grid, (out.numel(), channels, parts), constants, num_warps=4)

    def __call__(
        self, parts: Tensor, out: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        self._launch(parts, bias, residual, out)
        return out
