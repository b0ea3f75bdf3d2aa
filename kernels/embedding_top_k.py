"""The best rows of a packed table for each query. A tile of rows is expanded in registers, multiplied with a tile of
queries, and of its scores the best go into what a program keeps; no score and no row is written to memory.

A score and its row are one number of 64 bits: the score in the upper half, as an integer of the same order, and below
it the row counted from the end. All of them differ, and the larger one is the better: of equals the smaller id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import MAX, ceil_div
from .embedding import Packed, in_word, load_bits, popcount, row_begin, words_of

MIN = tl.standard._elementwise_min
MOST_ROWS = 2**32 - 1  # that the lower half tells apart
PROGRAMS = 4  # for each processor: one chooses while another multiplies
WARPS = 8  # with four the products of float32 spill
ROWS = tl.constexpr(64)
NOTHING = tl.constexpr(-(2**63))  # and up to K above it: below the number of every score that is one
EVERYTHING = tl.constexpr(2**63 - 1)
LOWER = tl.constexpr(2**32 - 1)
MAGNITUDE = tl.constexpr(2**31 - 1)


@triton.jit
def any_of(x):
    return tl.reduce(x.to(tl.int32), 0, MAX) > 0


@triton.jit
def number_of(score, row):
    """Scores [Q, R] of rows [R] as numbers. Of what is no score (-infinity, NaN) the least one."""
    score = tl.where(score == 0.0, 0.0, score)  # -0 is no less than 0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ MAGNITUDE, bits).to(tl.int64)
    number = (ordered << 32) | (-row + LOWER)[None, :]
    return tl.where(score > -float("inf"), number, NOTHING)


@triton.jit
def first_from(excluded_ptr, low, high, row):
    """Of each query the first excluded place, between low and high, whose row is not before `row`."""
    while any_of(low < high):
        middle = (low + high) >> 1
        smaller = (low < high) & (tl.load(excluded_ptr + middle, mask=low < high, other=0) < row)
        high = tl.where((low < high) & (smaller == 0), middle, high)
        low = tl.where(smaller, middle + 1, low)
    return low


@triton.jit(do_not_specialize=["count", "rows", "rows_of_part", "parts", "k"])
def top_k_kernel(
    queries_ptr,  # [count, dim]
    values_ptr,
    scale_ptr,  # float32 [rows] of int8 values, else None
    kept_ptr,
    base_ptr,
    counts_ptr,
    begin_ptr,  # int64 [count + 1], or None
    excluded_ptr,  # int64, ascending for each query, or None
    best_ptr,  # int64 [count, parts, k]
    count,
    rows,
    rows_of_part,
    parts,
    k,
    dim,
    K: tl.constexpr,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    MANY: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
    asked = query < count
    first = tl.program_id(1).to(tl.int64) * rows_of_part
    last = tl.minimum(first + rows_of_part, rows)
    words = words_of(dim)
    slot = tl.arange(0, K).to(tl.int64)[None, :]
    best = tl.full((Q, K), 0, tl.int64) + tl.where(slot < k, slot + NOTHING, EVERYTHING)
    worst = tl.reduce(best, 1, MIN)
    if begin_ptr is not None:
        at = tl.load(begin_ptr + query, mask=asked, other=0)
        stop = tl.load(begin_ptr + query + 1, mask=asked, other=0)
        at = first_from(excluded_ptr, at, stop, first)
    for tile in range(first, last, ROWS):
        row = tile + tl.arange(0, ROWS).to(tl.int64)
        inside = row < last
        begin = row_begin(kept_ptr, base_ptr, counts_ptr, row, inside, dim, MANY)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
        scores = tl.full((Q, ROWS), 0.0, tl.float32)
        for word in range(ceil_div(dim, 32)):
            bits = load_bits(kept_ptr, row * words + word, inside)
            for part in tl.static_range(32 // GROUP):
                column = word * 32 + part * GROUP + tl.arange(0, GROUP)
                mask = asked[:, None] & (column < dim)[None, :]
                x = tl.load(queries_ptr + query[:, None] * dim + column[None, :], mask=mask, other=0.0)  # [Q, GROUP]
                kept, rank = in_word(bits[:, None], column[None, :])
                y = tl.load(values_ptr + begin[:, None] + rank, mask=kept, other=0).to(x.dtype)  # [ROWS, GROUP]
                if scale_ptr is not None:
                    y = y * scale[:, None]
                scores = tl.dot(x, tl.trans(y), scores, input_precision="ieee")
            begin += popcount(bits)
        numbers = tl.where(asked[:, None] & inside[None, :], number_of(scores, row), NOTHING)
        if begin_ptr is not None:
            out = tl.load(excluded_ptr + at, mask=at < stop, other=EVERYTHING)
            while any_of(out < tile + ROWS):
                numbers = tl.where(row[None, :] == out[:, None], NOTHING, numbers)
                at += (out < tile + ROWS).to(tl.int64)
                out = tl.load(excluded_ptr + at, mask=at < stop, other=EVERYTHING)
        # The best of the tile takes the place of the worst that is kept, until none is better.
        top = tl.reduce(numbers, 1, MAX)
        while any_of(top > worst):
            best = tl.where((top > worst)[:, None] & (best == worst[:, None]), top[:, None], best)
            numbers = tl.where(numbers == top[:, None], NOTHING, numbers)
            worst = tl.reduce(best, 1, MIN)
            top = tl.reduce(numbers, 1, MAX)
    to = (query[:, None] * parts + tl.program_id(1)) * k + slot
    tl.store(best_ptr + to, best, mask=asked[:, None] & (slot < k))


def slots(k: int) -> int:
    """Places for the ``k`` best of a query."""
    return max(triton.next_power_of_2(k), 16)


def queries_of_tile(count: int, k: int, scaled: bool, hip: bool) -> int:
    """32 share an expanded tile of rows, where the registers hold their scores and what they keep."""
    return 16 if count <= 16 or k > 32 or scaled or hip else 32


def group_of(half: bool) -> int:
    """Dimensions of one product: without tensor cores the registers of a thread hold all of its operands."""
    return 32 if half else 16


def top_k(
    table: Packed, queries: Tensor, k: int, begin: Tensor | None, excluded: Tensor | None, processors: int
) -> tuple[Tensor, Tensor]:
    """``(scores float32 [queries, k], ids [queries, k])``: -infinity and -1 where no row is left.

    processors: of the device; each gets several parts of the rows. The result does not depend on how many there are.
    """
    count, dim = queries.shape
    high = queries_of_tile(count, k, table.row_scale is not None, torch.version.hip is not None)
    tiles, most = triton.cdiv(count, high), triton.cdiv(table.rows, ROWS.value)
    parts = max(1, min(triton.cdiv(PROGRAMS * processors, tiles), most))
    rows_of_part = triton.cdiv(most, parts) * ROWS.value
    parts = triton.cdiv(table.rows, rows_of_part)
    best = torch.empty((count, parts, k), dtype=torch.int64, device=queries.device)
    top_k_kernel[(tiles, parts)](
        queries, *table.tensors, begin, excluded, best, count, table.rows, rows_of_part, parts, k, dim,
        K=slots(k), Q=high, GROUP=group_of(queries.dtype != torch.float32), MANY=table.many, num_warps=WARPS,
    )  # fmt: skip
    return _read(best.flatten(1).topk(k).values)


def _read(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The scores and rows of numbers (see `number_of`)."""
    ordered = (numbers >> 32).to(torch.int32)
    nothing = ordered == -MAGNITUDE.value - 1
    scores = torch.where(ordered < 0, ordered ^ MAGNITUDE.value, ordered).view(torch.float32)
    rows = LOWER.value - (numbers & LOWER.value)
    return scores.masked_fill(nothing, -float("inf")), rows.masked_fill(nothing, -1)
