"""Packed embedding tables: lookup, bags and what absent entries would have learnt.

`sparsekd/ops/embedding.py` says how a table is stored; its words of 64 bits are read here as two of 32.

What is read never depends on an id or an offset that is none: such a one writes 0 to ``ok`` instead, which the caller
looks at. Sums of a bag are taken in an order that depends on the bag alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import ADD, MAX

MANY_KEPT = tl.constexpr(255)  # a count that stands for so many and more
TILE = 2048  # numbers that a program has at once: 16 for each of its threads
IDS_OF_BAG = 16  # of one trip: most bags are short


class Packed(NamedTuple):
    """A table as the kernels take it, without gaps."""

    values: Tensor
    row_scale: Tensor | None  # float32 [rows] of int8 values
    kept: Tensor  # int32 [rows, 2 ceil(dim / 64)]
    base: Tensor
    counts: Tensor
    dim: int

    @classmethod
    def of(
        cls, values: Tensor, row_scale: Tensor | None, kept: Tensor, base: Tensor, counts: Tensor, dim: int
    ) -> Packed:
        row_scale = None if row_scale is None else row_scale.contiguous()
        words = kept.contiguous().view(torch.int32)
        return cls(values.contiguous(), row_scale, words, base.contiguous(), counts.contiguous(), dim)

    @property
    def rows(self) -> int:
        return self.kept.shape[0]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.values, self.row_scale, self.kept, self.base, self.counts

    @property
    def many(self) -> bool:
        """Whether a row may keep more dimensions than a count can say."""
        return self.dim >= MANY_KEPT.value


def width_of(dim: int) -> int:
    """Dimensions that a program takes, of all of them a power of two."""
    return min(max(triton.next_power_of_2(dim), 16), 128)


# ---- Where the values of a row lie


@triton.jit
def popcount(x):
    """How many bits of a uint32 are set. The compiler knows these lines, and makes one instruction of them."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def words_of(dim):
    return (dim + 63) // 64 * 2


@triton.jit
def load_bits(kept_ptr, place, mask):
    return tl.load(kept_ptr + place, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def row_begin(kept_ptr, base_ptr, counts_ptr, row, mask, dim, MANY: tl.constexpr):
    """Where the values of rows [R] begin: behind the base of their 64, and the counts of those before them in it."""
    first = (row >> 6) * 64
    place = tl.arange(0, 64)[None, :]
    before = place < (row - first)[:, None]
    # All 64 counts are read, 16 at once, and those from the row on are dropped.
    counts = tl.load(counts_ptr + first[:, None] + place, mask=mask[:, None], other=0).to(tl.int32)
    counts = tl.where(before, counts, 0)
    if MANY:
        words = words_of(dim)
        many = counts == MANY_KEPT
        counts = tl.where(many, 0, counts)
        for word in range(words):
            counts += popcount(load_bits(kept_ptr, (first[:, None] + place) * words + word, many))
    return tl.load(base_ptr + (row >> 6), mask=mask, other=0) + tl.reduce(counts, 1, ADD)


@triton.jit
def in_word(bits, column):
    """Whether dimensions are kept, and how many kept ones are before them in their word of 32."""
    place = (column % 32).to(tl.uint32)
    return ((bits >> place) & 1) != 0, popcount(bits & ((1 << place) - 1))


@triton.jit
def row_places(kept_ptr, row, mask, begin, dim, first, D: tl.constexpr):
    """Which of the D dimensions from `first` on the rows [R] keep, and where their values lie: [R, D] each."""
    words = words_of(dim)
    column = first + tl.arange(0, D)
    word = column // 32
    inside = mask[:, None] & (column < dim)[None, :]
    bits = load_bits(kept_ptr, row[:, None] * words + word[None, :], inside)
    kept, rank = in_word(bits, column[None, :])
    place = begin[:, None] + rank
    for earlier in range((tl.minimum(first + D, dim) - 1) // 32):
        count = popcount(load_bits(kept_ptr, row * words + earlier, mask))
        place += tl.where((word > earlier)[None, :], count[:, None], 0)
    return kept, place


@triton.jit
def refuse(ok_ptr, wrong):
    """Leave a note if any of `wrong` [n] is true; all programs that write one write the same."""
    tl.store(ok_ptr, 0, mask=tl.reduce(wrong.to(tl.int32), 0, MAX) > 0)


# ---- Lookup


@triton.jit(do_not_specialize=["count", "rows"])
def lookup_kernel(
    ids_ptr,  # int64 [count]
    values_ptr,
    scale_ptr,  # float32 [rows] of int8 values, else None
    kept_ptr,
    base_ptr,
    counts_ptr,
    out_ptr,  # [count, dim]
    ok_ptr,
    count,
    rows,
    dim,
    R: tl.constexpr,
    D: tl.constexpr,
    MANY: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = i < count
    row = tl.load(ids_ptr + i, mask=inside, other=0)
    known = inside & (row >= 0) & (row < rows)
    refuse(ok_ptr, inside & (known == 0))
    row = tl.where(known, row, 0)
    begin = row_begin(kept_ptr, base_ptr, counts_ptr, row, known, dim, MANY)
    first = tl.program_id(1) * D
    kept, place = row_places(kept_ptr, row, known, begin, dim, first, D)
    x = tl.load(values_ptr + place, mask=kept, other=0)
    if scale_ptr is not None:
        x = x.to(tl.float32) * tl.load(scale_ptr + row, mask=known, other=0.0)[:, None]
    column = first + tl.arange(0, D)
    tl.store(out_ptr + i[:, None] * dim + column[None, :], x, mask=inside[:, None] & (column < dim)[None, :])


def lookup(table: Packed, ids: Tensor, out: Tensor, ok: Tensor) -> None:
    """Fill ``out [ids, dim]``, in float32 for int8 values."""
    count, width = ids.numel(), width_of(table.dim)
    high = TILE // width
    lookup_kernel[(triton.cdiv(count, high), triton.cdiv(table.dim, width))](
        ids, *table.tensors, out, ok, count, table.rows, table.dim, R=high, D=width, MANY=table.many, num_warps=4,
    )  # fmt: skip


# ---- Bags


@triton.jit
def bag_range(offsets_ptr, ok_ptr, bag, bags, count):
    """The ids of a bag; none where the offsets do not rise from 0 to the number of ids."""
    begin, end = tl.load(offsets_ptr + bag), tl.load(offsets_ptr + bag + 1)
    right = (begin >= 0) & (begin <= end) & (end <= count)
    right = right & ((bag > 0) | (begin == 0)) & ((bag < bags - 1) | (end == count))
    tl.store(ok_ptr, 0, mask=right == 0)
    return tl.where(right, begin, 0), tl.where(right, end, 0)


@triton.jit(do_not_specialize=["count", "bags", "rows", "padding"])
def bag_kernel(
    ids_ptr,  # int64 [count]
    offsets_ptr,  # int64 [bags + 1]
    weight_ptr,  # float32 [count], or None
    values_ptr,
    scale_ptr,
    kept_ptr,
    base_ptr,
    counts_ptr,
    out_ptr,  # [bags, dim]
    ok_ptr,
    count,
    bags,
    rows,
    padding,
    dim,
    R: tl.constexpr,
    D: tl.constexpr,
    MANY: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    begin, end = bag_range(offsets_ptr, ok_ptr, bag, bags, count)
    first = tl.program_id(1) * D
    total = tl.full((R, D), 0.0, tl.float32)
    for at in range(begin, end, R):
        i = at + tl.arange(0, R)
        inside = i < end
        row = tl.load(ids_ptr + i, mask=inside, other=0)
        known = inside & (row >= 0) & (row < rows)
        refuse(ok_ptr, inside & (known == 0))
        used = known & (row != padding)
        row = tl.where(used, row, 0)
        weight = tl.full((R,), 1.0, tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + i, mask=used, other=0.0)
        if scale_ptr is not None:
            weight = weight * tl.load(scale_ptr + row, mask=used, other=0.0)
        kept, place = row_places(
            kept_ptr, row, used, row_begin(kept_ptr, base_ptr, counts_ptr, row, used, dim, MANY), dim, first, D
        )
        total += tl.load(values_ptr + place, mask=kept, other=0).to(tl.float32) * weight[:, None]
    column = first + tl.arange(0, D)
    total = tl.reduce(total, 0, ADD).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + bag * dim + column, total, mask=column < dim)


def bag(
    table: Packed, ids: Tensor, offsets: Tensor, weight: Tensor | None, padding: int, out: Tensor, ok: Tensor
) -> None:
    """Fill ``out [bags, dim]``, in float32 for int8 values."""
    bags, width = out.shape[0], width_of(table.dim)
    bag_kernel[(bags, triton.cdiv(table.dim, width))](
        ids, offsets, weight, *table.tensors, out, ok, ids.shape[0], bags, table.rows, padding, table.dim,
        R=IDS_OF_BAG, D=width, MANY=table.many, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "bags", "padding"])
def bag_scale_kernel(ids_ptr, offsets_ptr, scale_ptr, ok_ptr, count, bags, padding, R: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    begin, end = bag_range(offsets_ptr, ok_ptr, bag, bags, count)
    counted = tl.full((R,), 0, tl.int32)
    for at in range(begin, end, R):
        i = at + tl.arange(0, R)
        inside = i < end
        counted += (inside & (tl.load(ids_ptr + i, mask=inside, other=0) != padding)).to(tl.int32)
    share = tl.div_rn(1.0, tl.maximum(tl.reduce(counted, 0, ADD), 1).to(tl.float32))
    for at in range(begin, end, R):
        i = at + tl.arange(0, R)
        tl.store(scale_ptr + i, share, mask=i < end)


def bag_scale(ids: Tensor, offsets: Tensor, padding: int, scale: Tensor, ok: Tensor) -> None:
    """Fill ``scale [ids]``: of every id one over the ids of its bag that are not ``padding``."""
    bags = offsets.shape[0] - 1
    bag_scale_kernel[(bags,)](ids, offsets, scale, ok, ids.shape[0], bags, padding, R=32, num_warps=1)


# ---- Growth


@triton.jit(do_not_specialize=["count", "rows"])
def absent_kernel(
    total_ptr,  # [count, dim]
    grad_ptr,  # [count, dim]
    kept_ptr,
    ids_ptr,  # int64 [count]
    ok_ptr,
    count,
    rows,
    dim,
    ABSOLUTE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * D + tl.arange(0, D)
    inside = i < count
    row = tl.load(ids_ptr + i, mask=inside, other=0)
    known = inside & (row >= 0) & (row < rows)
    refuse(ok_ptr, inside & (known == 0))
    row = tl.where(known, row, 0)
    mask = known[:, None] & (column < dim)[None, :]
    bits = load_bits(kept_ptr, row[:, None] * words_of(dim) + (column // 32)[None, :], mask)
    kept = ((bits >> (column % 32).to(tl.uint32)[None, :]) & 1) != 0
    place = i[:, None] * dim + column[None, :]
    added = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if ABSOLUTE:
        added = tl.abs(added)
    total = tl.load(total_ptr + place, mask=mask, other=0.0).to(tl.float32) + tl.where(kept, 0.0, added)
    tl.store(total_ptr + place, total.to(total_ptr.dtype.element_ty), mask=mask)


def absent(total: Tensor, grad: Tensor, kept: Tensor, ids: Tensor, absolute: bool, ok: Tensor) -> None:
    """Add to ``total [ids, dim]`` what ``grad`` holds where the rows ``ids`` keep nothing; ``kept`` as in `Packed`."""
    count, dim = grad.shape
    width = width_of(dim)
    high = TILE // width
    absent_kernel[(triton.cdiv(count, high), triton.cdiv(dim, width))](
        total, grad, kept, ids, ok, count, kept.shape[0], dim, ABSOLUTE=absolute, R=high, D=width, num_warps=4,
    )  # fmt: skip
