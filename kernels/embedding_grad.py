"""The gradient of packed embedding tables: terms are sorted by their row, and one program sums those of a row in order.

Terms of a row that many ids name are summed in pieces of ``CHUNK`` sorted terms, by many programs, and the program of
the row adds these. Pieces begin at multiples of ``CHUNK``, so two runs give the same bits, and no atomic is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import ADD, ceil_div
from .embedding import Packed, row_begin, row_places, width_of

CHUNK = 256
TERMS = 16  # of one trip


@triton.jit
def sum_terms(
    grad_ptr, order_ptr, source_ptr, weight_ptr, begin, end, dim, column, R: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """The sum [D] of the sorted terms from begin to end."""
    total = tl.full((R, D), 0.0, tl.float32)
    for at in range(begin, end, R):
        j = at + tl.arange(0, R)
        inside = j < end
        i = tl.load(order_ptr + j, mask=inside, other=0)
        source = i
        if source_ptr is not None:
            source = tl.load(source_ptr + i, mask=inside, other=0)
        mask = inside[:, None] & (column < dim)[None, :]
        term = tl.load(grad_ptr + source[:, None] * dim + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            term = term * tl.load(weight_ptr + i, mask=inside, other=0.0)[:, None]
        total += term
    return tl.reduce(total, 0, ADD)


@triton.jit(do_not_specialize=["count"])
def pieces_kernel(
    grad_ptr,  # [any, dim]
    order_ptr,  # int64 [count]: which id a sorted term is of
    source_ptr,  # int64 [ids]: which row of grad belongs to an id, or None: as many as the id
    weight_ptr,  # float32 [ids], or None
    group_ptr,  # int64 [count], ascending: equal for terms of one row
    pieces_ptr,  # float32 [ceil(count / CHUNK), dim]
    count,
    dim,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    """Of each CHUNK of terms the sum of those at its beginning that go on with a row of the one before."""
    begin = tl.program_id(0).to(tl.int64) * CHUNK
    group = tl.load(group_ptr + begin)
    earlier = tl.load(group_ptr + begin - 1, mask=begin > 0, other=-1)
    j = begin + tl.arange(0, CHUNK)
    same = (tl.load(group_ptr + j, mask=j < count, other=-1) == group).to(tl.int32)
    length = tl.where(group == earlier, tl.reduce(same, 0, ADD), 0)
    column = tl.program_id(1) * D + tl.arange(0, D)
    total = sum_terms(grad_ptr, order_ptr, source_ptr, weight_ptr, begin, begin + length, dim, column, R, D)
    tl.store(pieces_ptr + tl.program_id(0).to(tl.int64) * dim + column, total, mask=column < dim)


@triton.jit(do_not_specialize=["rows", "padding"])
def grad_kernel(
    grad_ptr,
    order_ptr,
    source_ptr,
    weight_ptr,
    pieces_ptr,
    row_ptr,  # int64: of each program its row; where SORTED of each term, and the first one of a row does the work
    bounds_ptr,  # int64: where its terms begin, and those of the next one; where SORTED where they end
    begin_ptr,  # int64 [programs + 1]: where its sums go, or None: where its values lie
    kept_ptr,
    base_ptr,
    counts_ptr,
    out_ptr,
    places_ptr,  # int64: where its values lie, or None
    ok_ptr,
    rows,
    padding,
    dim,
    SORTED: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    MANY: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + program)
    known = (row >= 0) & (row < rows)
    tl.store(ok_ptr, 0, mask=known == 0)
    used = known & (row != padding)
    if SORTED:
        earlier = tl.load(row_ptr + program - 1, mask=program > 0, other=-1)
        used = used & (row != earlier)
        begin, end = program, tl.load(bounds_ptr + program)
    else:
        begin, end = tl.load(bounds_ptr + program), tl.load(bounds_ptr + program + 1)
    end = tl.where(used, end, begin)
    chunk_end = (begin // CHUNK + 1) * CHUNK
    first = tl.program_id(1) * D
    column = first + tl.arange(0, D)
    total = sum_terms(
        grad_ptr, order_ptr, source_ptr, weight_ptr, begin, tl.minimum(end, chunk_end), dim, column, R, D
    )  # fmt: skip
    pieces = tl.full((R, D), 0.0, tl.float32)
    last = ceil_div(end, CHUNK)
    for at in range(chunk_end // CHUNK, last, R):
        piece = at + tl.arange(0, R)
        mask = (piece < last)[:, None] & (column < dim)[None, :]
        pieces += tl.load(pieces_ptr + piece.to(tl.int64)[:, None] * dim + column[None, :], mask=mask, other=0.0)
    total += tl.reduce(pieces, 0, ADD)
    one = tl.arange(0, 1)
    row, used = tl.where(used, row, 0) + one, used & (one == 0)
    value = row_begin(kept_ptr, base_ptr, counts_ptr, row, used, dim, MANY)
    kept, place = row_places(kept_ptr, row, used, value, dim, first, D)
    to = place
    if begin_ptr is not None:
        to = place - value[:, None] + tl.load(begin_ptr + program)
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty)[None, :], mask=kept)
    if places_ptr is not None:
        tl.store(places_ptr + to, place, mask=kept)


def grad_values(
    table: Packed, grad: Tensor, ids: Tensor, source: Tensor | None, weight: Tensor | None, padding: int, ok: Tensor
) -> None:
    """Write to ``table.values`` the gradient of every kept entry of the rows ``ids``, which are not sorted; what no id
    names stays as it is."""
    in_order, order = ids.sort(stable=True)
    ends = torch.searchsorted(in_order, in_order, right=True)
    terms = (grad, order, source, weight)
    _sum(table, terms, in_order, in_order, ends, None, None, padding, ok)


def rows_grad(
    table: Packed, grad: Tensor, rows: Tensor, first: Tensor, order: Tensor, source: Tensor | None,
    weight: Tensor | None, begin: Tensor, places: Tensor, ok: Tensor,
) -> None:  # fmt: skip
    """Write to ``table.values``, which holds the entries of these rows alone, their gradients, and to ``places`` which
    entries they are: of ``rows[r]`` from ``begin[r]`` on."""
    every = torch.arange(order.shape[0], device=order.device)
    group = torch.searchsorted(first, every, right=True)
    _sum(table, (grad, order, source, weight), group, rows, first, begin, places, -1, ok)


def _sum(
    table: Packed, terms: tuple[Tensor | None, ...], group: Tensor, rows: Tensor, bounds: Tensor, begin: Tensor | None,
    places: Tensor | None, padding: int, ok: Tensor,
) -> None:  # fmt: skip
    count, width = group.shape[0], width_of(table.dim)
    chunks, parts = triton.cdiv(count, CHUNK), triton.cdiv(table.dim, width)
    pieces = torch.empty((chunks, table.dim), dtype=torch.float32, device=group.device)
    tile = {"CHUNK": CHUNK, "R": TERMS, "D": width}
    if chunks > 1:
        pieces_kernel[(chunks, parts)](*terms, group, pieces, count, table.dim, **tile, num_warps=4)
    values, _, *index = table.tensors
    grad_kernel[(rows.shape[0], parts)](
        *terms, pieces, rows, bounds, begin, *index, values, places, ok, table.rows, padding, table.dim,
        SORTED=begin is None, **tile, MANY=table.many, num_warps=4,
    )  # fmt: skip
