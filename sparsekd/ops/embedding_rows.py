"""The gradient of a packed table for the rows of a batch alone, as a sparse tensor over the packed values.

``F.embedding(..., sparse=True)`` does the same for dense tables. Here the gradient names the kept entries of the rows
that a batch touches, row after row, so that a step costs what the batch touches, not what the table holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._schema import call, define
from .embedding import Table, bag_of, check_bags, check_lookup, count_kept, places


def embedding_rows(
    ids: Tensor, table: Table, dim: int, padding_idx: int | None, learns: Tensor | None, sparse: bool
) -> Tensor:
    """``ops.embedding`` with another gradient, which graphs of ``torch.compile`` cannot hold: they break here.

    Args:
        learns: bool of the shape of the ids: those whose gradient is wanted; None: all.
        sparse: whether the gradient of the values is a sparse tensor ``[n]``.
    """
    if torch.compiler.is_dynamo_compiling():
        from ._uncompiled import run  # not before: it imports torch._dynamo

        return run(embedding_rows, (ids, table, dim, padding_idx, learns, sparse), {})
    check_lookup("embedding", ids, table, dim, padding_idx)
    _check_learns("embedding", ids, learns)
    padding = -1 if padding_idx is None else padding_idx
    return _Rows.apply(*table, ids.long(), dim, padding, learns, sparse)


def embedding_bag_rows(
    ids: Tensor, offsets: Tensor, table: Table, dim: int, scale: Tensor | None, padding_idx: int | None,
    learns: Tensor | None, sparse: bool,
) -> Tensor:  # fmt: skip
    """``ops.embedding_bag`` with another gradient: see :func:`embedding_rows`."""
    if torch.compiler.is_dynamo_compiling():
        from ._uncompiled import run

        return run(embedding_bag_rows, (ids, offsets, table, dim, scale, padding_idx, learns, sparse), {})
    check_bags(ids, offsets, table, dim, scale, padding_idx)
    _check_learns("embedding_bag", ids, learns)
    padding = -1 if padding_idx is None else padding_idx
    return _Bags.apply(*table, ids.long(), offsets.long(), scale, dim, padding, learns, sparse)


def rows_gradient(
    grad: Tensor, table: Table, ids: Tensor, source: Tensor | None, scale: Tensor | None, padding: int
) -> Tensor:
    """The gradient of the values as a coalesced sparse tensor ``[n]``: of every kept entry of the rows ``ids [m]`` the
    sum of ``scale[i] * grad[source[i]]``; ``padding`` has none."""
    chosen = None
    if padding >= 0:
        chosen = (ids != padding).nonzero().squeeze(1)
        ids = ids[chosen]
    in_order, order = ids.sort(stable=True)
    rows, sizes = torch.unique_consecutive(in_order, return_counts=True)
    if rows.numel() and not (rows[0] >= 0 and rows[-1] < table.kept.shape[0]):
        outside = int(rows[0]) if rows[0] < 0 else int(rows[-1])
        raise IndexError(f"sparsekd.embedding: ids must lie in [0, {table.kept.shape[0]}), got {outside}")
    kept = table.counts[rows].long()
    many = kept == 255
    if bool(many.any()):
        kept[many] = count_kept(table.kept[rows[many]])
    begin = _begins(kept)
    order = order if chosen is None else chosen[order]
    place, sums = call(
        "embedding_rows_grad", grad, *table[1:], rows, _begins(sizes), order, source, scale, begin, int(begin[-1])
    )
    return torch.sparse_coo_tensor(
        place[None], sums, (table.values.shape[0],), is_coalesced=True, check_invariants=False
    )


def embedding_rows_grad_reference(
    grad: Tensor, kept: Tensor, base: Tensor, counts: Tensor, rows: Tensor, first: Tensor, order: Tensor,
    source: Tensor | None, scale: Tensor | None, begin: Tensor, count: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dim = grad.shape[1]
    terms = grad[order if source is None else source[order]]
    if scale is not None:
        terms = terms * scale[order][:, None].to(terms.dtype)
    of_row = bag_of(first, order.shape[0])
    sums = grad.new_zeros(rows.shape[0], dim).index_add(0, of_row, terms)
    mask, place = places(kept, rows, dim)
    return place[mask], sums[mask]


def _begins(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def _check_learns(op: str, ids: Tensor, learns: Tensor | None) -> None:
    if learns is not None and (learns.dtype != torch.bool or learns.shape != ids.shape):
        raise ValueError(
            f"sparsekd.{op}: learns must be one bool for each id, of shape {tuple(ids.shape)}, "
            f"got {learns.dtype} of shape {tuple(learns.shape)}"
        )


def _gradient(
    grad: Tensor, table: Table, ids: Tensor, source: Tensor | None, scale: Tensor | None, padding: int,
    learns: Tensor | None, sparse: bool,
) -> Tensor:  # fmt: skip
    if learns is not None:
        chosen = learns.nonzero().squeeze(1)
        ids, source = ids[chosen], chosen if source is None else source[chosen]
        scale = None if scale is None else scale[chosen]
    if sparse:
        return rows_gradient(grad, table, ids, source, scale, padding)
    return call("embedding_grad", grad, *table[1:], ids, source, scale, table.values.shape[0], padding)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, dim: int, padding: int,
        learns: Tensor | None, sparse: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(values, kept, base, counts, ids, learns)
        ctx.padding, ctx.sparse = padding, sparse
        return call("embedding", values, kept, base, counts, ids, dim, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        *table, ids, learns = ctx.saved_tensors
        learns = None if learns is None else learns.reshape(-1)
        rows = grad.reshape(-1, grad.shape[-1])
        of_values = _gradient(rows, Table(*table), ids.reshape(-1), None, None, ctx.padding, learns, ctx.sparse)
        return of_values, *(None,) * 8


class _Bags(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, offsets: Tensor,
        scale: Tensor | None, dim: int, padding: int, learns: Tensor | None, sparse: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(values, kept, base, counts, ids, offsets, scale, learns)
        ctx.padding, ctx.sparse = padding, sparse
        return call("embedding_bag", values, kept, base, counts, ids, offsets, scale, dim, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        *table, ids, offsets, scale, learns = ctx.saved_tensors
        source = bag_of(offsets, ids.shape[0])
        of_values = of_scale = None
        if ctx.needs_input_grad[0]:
            of_values = _gradient(grad, Table(*table), ids, source, scale, ctx.padding, learns, ctx.sparse)
        if scale is not None and ctx.needs_input_grad[6]:
            rows = torch.ops.sparsekd.embedding(*table, ids, grad.shape[1], ctx.padding)
            of_scale = (rows * grad[source]).sum(1).masked_fill(ids == ctx.padding, 0).to(scale.dtype)
        return of_values, *(None,) * 5, of_scale, *(None,) * 4


define(
    "embedding_rows_grad",
    "(Tensor grad, Tensor kept, Tensor base, Tensor counts, Tensor rows, Tensor first, Tensor order, Tensor? source, "
    "Tensor? scale, Tensor begin, SymInt count) -> (Tensor, Tensor)",
    embedding_rows_grad_reference,
    lambda grad, kept, base, counts, rows, first, order, source, scale, begin, count: (
        rows.new_empty(count),
        grad.new_empty(count),
    ),
)
