"""The kernel under every gradient of the kept values: ``grad^T @ gather(x)``, sampled where a block is kept.

One program owns one step of a forward table: ``BN`` output channels x ``BK`` gathered channels of up to ``BK / SLOT``
slots. It runs over its share of the pixels, accumulates in float32, and stores the pieces that are kept. Pixel shares
are summed in a fixed order afterwards. What no block keeps is multiplied only inside a shared tile, and never stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gather_gemm import SumParts, Walk
from .index import SLOT_FIELDS, TILE_FIELDS, StepTable
from .launch import Launch
from .tiles import Tile

_SLOT_FIELDS = tl.constexpr(SLOT_FIELDS)
_TILE_FIELDS = tl.constexpr(TILE_FIELDS)


@triton.jit(
    do_not_specialize=[
        *("pixels", "share", "grid_h", "grid_w", "in_h", "in_w", "in_eights", "out_eights"),
        *("in_step_h", "in_step_w", "part_eights"),
    ]
)
def block_products_kernel(
    x_ptr,  # [images, in_h, in_w, in_c]
    grad_ptr,  # [images, grid_h, grid_w, out_c]
    out_ptr,  # [nnzb, bh, bw], or float32 [parts, nnzb, bh, bw]
    tiles_ptr,
    slots_ptr,
    offsets_ptr,
    step_tile_ptr,
    pixels,
    share,  # pixels of one program, a multiple of BM
    grid_h,
    grid_w,
    in_h,
    in_w,
    in_eights,  # channels / 8
    out_eights,
    in_step_h,
    in_step_w,
    part_eights,  # elements of one part of out / 8
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LANE: tl.constexpr,
    SLOT: tl.constexpr,
    BW: tl.constexpr,
    POINTWISE: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    step, part = tl.program_id(0), tl.program_id(1)
    tile_ptr = tiles_ptr + tl.load(step_tile_ptr + step) * _TILE_FIELDS
    # Channels come in eights, and the compiler must know it to copy 16 bytes under one mask.
    in_c, out_c = in_eights * 8, out_eights * 8
    row_begin, row_end = tl.multiple_of(tl.load(tile_ptr), [8]), tl.multiple_of(tl.load(tile_ptr + 1), [8])
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    slot = step * (BK // SLOT) + k // SLOT  # [BK]
    slot_ptr = slots_ptr + slot * _SLOT_FIELDS
    dy, dx = tl.load(slot_ptr), tl.load(slot_ptr + 1)
    channel, width = tl.load(slot_ptr + 2), tl.load(slot_ptr + 3)
    shift = (dy.to(tl.int64) * in_w + dx) * in_c + channel + k % SLOT
    rows = row_begin + n
    rows_mask = (rows < row_end)[None, :]

    first = part * share
    last = tl.minimum(first + share, pixels)
    m = first + tl.arange(0, BM)
    # Position of each pixel, moved on by BM pixels a trip with carries instead of divisions.
    j = m % grid_w
    i = m // grid_w % grid_h
    image = m // (grid_w * grid_h)
    move_j = BM % grid_w
    move_i = BM // grid_w % grid_h
    move_image = BM // (grid_w * grid_h)
    acc = tl.full((BN, BK), 0.0, tl.float32)
    for begin in range(first, last, BM):
        inside = begin + tl.arange(0, BM) < last  # [BM]
        top, left = i * in_step_h, j * in_step_w
        if POINTWISE:
            start = (begin + tl.arange(0, BM)).to(tl.int64) * in_c
            mask = inside[:, None] & (dy >= 0)[None, :]
        else:
            start = ((image.to(tl.int64) * in_h + top) * in_w + left) * in_c
            y, x = top[:, None] + dy[None, :], left[:, None] + dx[None, :]
            mask = inside[:, None] & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
        places = start[:, None] + shift[None, :]
        if not WHOLE:
            mask = mask & (k % SLOT < width)[None, :]
        # Slots and their widths are multiples of 8 channels: 8 neighbours share address and mask.
        places = tl.max_contiguous(tl.multiple_of(places, [1, 8]), [1, 8])
        mask = tl.max_constancy(mask, [1, 8])
        gathered = tl.load(x_ptr + places, mask=mask, other=0.0)  # [BM, BK]
        grad_places = (begin + tl.arange(0, BM)).to(tl.int64)[:, None] * out_c + rows[None, :]
        grad = tl.load(grad_ptr + grad_places, mask=inside[:, None] & rows_mask, other=0.0)  # [BM, BN]
        acc = tl.dot(tl.trans(grad), gathered, acc, input_precision=PRECISION)
        j += move_j
        carry = (j >= grid_w).to(tl.int32)
        j -= carry * grid_w
        i += move_i + carry
        carry = (i >= grid_h).to(tl.int32)
        i -= carry * grid_h
        image += move_image + carry

    # One offset for each lane and slot, spread over its [LANE, SLOT] products; 16 neighbours share address and mask.
    each = step * (BK // SLOT) + tl.arange(0, BK // SLOT)
    offset = tl.load(offsets_ptr + each[None, :] * (BN // LANE) + n[:, None] // LANE)  # [BN, BK / SLOT]
    offset = tl.reshape(tl.broadcast_to(offset[:, :, None], (BN, BK // SLOT, SLOT)), (BN, BK))
    out_ptr += part.to(tl.int64) * part_eights * 8
    places = offset + (n % LANE)[:, None] * BW + (k % SLOT)[None, :]
    places = tl.max_contiguous(tl.multiple_of(places, [1, 16]), [1, 16])
    kept = tl.max_constancy(offset >= 0, [1, 16])
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=kept)


class BlockProducts:
    """``out [nnzb, bh, bw]``, the products of ``grad`` and gathered ``x``, for tensors like those it was made for."""

    def __init__(
        self, grad: Tensor, x: Tensor, table: StepTable, walk: Walk, tile: Tile, out: Tensor, *, precision: str = "ieee"
    ) -> None:
        self._tables = (table.tiles, table.slots, table.offsets, table.step_tile)
        pixels = walk.images * walk.grid[0] * walk.grid[1]
        self._nothing = pixels == 0
        share = triton.cdiv(triton.cdiv(max(pixels, 1), tile.splits), tile.bm) * tile.bm
        parts = triton.cdiv(max(pixels, 1), share)
        self._parts = (parts, *out.shape) if parts > 1 else None
        self._add = SumParts(parts, out, 1) if parts > 1 else None
        sizes = (
            pixels, share, *walk.grid, *walk.gathered, x.shape[1] // 8, grad.shape[1] // 8, *walk.in_step,
            out.numel() // 8,
        )  # fmt: skip
        constants = {
            "BM": tile.bm, "BN": tile.bn, "BK": table.slot * table.slots_per_step, "LANE": table.lane,
            "SLOT": table.slot, "BW": out.shape[2], "POINTWISE": walk.pointwise, "WHOLE": table.whole,
            "PRECISION": precision,
        }  # fmt: skip
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        grid = (table.num_steps, parts)
        self._launch = None if out.numel() == 0 else Launch(block_products_kernel, grid, sizes, constants, **options)

    def __call__(self, grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
        if self._launch is None:
            return out
        if self._nothing:
            return out.zero_()
        if self._add is None:
            self._launch(x, grad, out, *self._tables)
            return out
        parts = torch.empty(self._parts, dtype=torch.float32, device=out.device)
        self._launch(x, grad, parts, *self._tables)
        return self._add(parts, out)
