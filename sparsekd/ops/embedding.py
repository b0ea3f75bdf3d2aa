"""Embeddings whose rows keep some dimensions each: lookup, bags, the gradients of both, and the best rows for a query.

A table ``[rows, dim]`` is stored as

    values [n]                        the kept entries, row after row, a row's in ascending dimensions
    kept   [rows, ceil(dim / 64)]     int64: dimension i of a row is kept where bit i % 64 of its word i / 64 is set
    base   [ceil(rows / 64)]          int64: where the values of every 64th row begin
    counts [64 ceil(rows / 64)]       uint8: kept dimensions of a row (255: so many or more), 0 behind the last row

The last two follow from ``kept`` (``row_index``). A row begins at the base of its 64 plus the counts of those before
it: nine bytes for eight rows, which stay in cache where an offset a row would not. No dense table exists anywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._schema import call, define, differentiate

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROWS_OF_BASE = 64
IDS = (torch.int32, torch.int64)
NO_BAGS = "sparsekd.embedding_bag: ids must be [n] and offsets [bags + 1], got {} and {}"
_PIECE = 1 << 12  # rows whose bits are spread out at once


class Table(NamedTuple):
    """The four tensors of a table, in the order in which every op takes them."""

    values: Tensor
    kept: Tensor
    base: Tensor
    counts: Tensor


def embedding(ids: Tensor, table: Table, dim: int, padding_idx: int | None = None) -> Tensor:
    """Look rows up.

    Equivalent to ``F.embedding(ids, dense, padding_idx)`` of the table made dense.

    Args:
        ids: int32 or int64 of any shape, in [0, rows); IndexError for others.
        padding_idx: a row without gradient.

    Returns:
        ``[*ids.shape, dim]`` in the dtype of the values.
    """
    check_lookup("embedding", ids, table, dim, padding_idx)
    padding = -1 if padding_idx is None else padding_idx
    return call("embedding", *table, ids.long(), dim, padding)


def embedding_bag(
    ids: Tensor,
    offsets: Tensor,
    table: Table,
    dim: int,
    scale: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Sum the rows of each bag, every row times its ``scale [ids]`` if there is one.

    Equivalent to ``F.embedding_bag(ids, dense, offsets, mode="sum", per_sample_weights=scale, include_last_offset=True,
    padding_idx=padding_idx)`` of the table made dense. ``offsets [bags + 1]`` rise from 0 to the number of ids.
    """
    check_bags(ids, offsets, table, dim, scale, padding_idx)
    padding = -1 if padding_idx is None else padding_idx
    return call("embedding_bag", *table, ids.long(), offsets.long(), scale, dim, padding)


def check_bags(
    ids: Tensor, offsets: Tensor, table: Table, dim: int, scale: Tensor | None, padding_idx: int | None
) -> None:
    check_lookup("embedding_bag", ids, table, dim, padding_idx)
    if ids.dim() != 1 or offsets.dim() != 1 or not offsets.shape[0]:
        raise ValueError(NO_BAGS.format(tuple(ids.shape), tuple(offsets.shape)))
    if scale is not None and scale.shape != ids.shape:
        raise ValueError(
            f"sparsekd.embedding_bag: scale must have one number for each of the {ids.shape[0]} ids, "
            f"got shape {tuple(scale.shape)}"
        )


def embedding_top_k(
    queries: Tensor, table: Table, k: int, excluded: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of largest product with each query, the best first, the smaller id first among equals.

    Args:
        queries: ``[n, dim]``, of the dtype of the values.
        excluded: rows to leave out, as ``(begin [n + 1], ids)``: those of query i are ``ids[begin[i] : begin[i + 1]]``,
            ascending.

    Returns:
        ``(scores [n, k], ids [n, k])``; where no row is left the score is -infinity and the id -1.
    """
    if queries.dim() != 2 or -(-queries.shape[1] // 64) != table.kept.shape[1]:
        raise ValueError(
            f"sparsekd.embedding_top_k: queries must be [n, dim] for a table of {table.kept.shape[1]} words a row, "
            f"got shape {tuple(queries.shape)}"
        )
    if k < 1:
        raise ValueError(f"sparsekd.embedding_top_k: k must be positive, got {k}")
    if queries.dtype != table.values.dtype:
        raise TypeError(
            f"sparsekd.embedding_top_k: queries and values must have one dtype, got {queries.dtype} and "
            f"{table.values.dtype}"
        )
    _check_table("embedding_top_k", table, queries.shape[1])
    begin, ids = (None, None) if excluded is None else (excluded[0].long(), excluded[1].long())
    if begin is not None and ids is not None and (begin.shape != (queries.shape[0] + 1,) or ids.dim() != 1):
        raise ValueError(
            f"sparsekd.embedding_top_k: excluded must be (begin [{queries.shape[0] + 1}], ids [m]) for "
            f"{queries.shape[0]} queries, got shapes {tuple(begin.shape)} and {tuple(ids.shape)}"
        )
    return torch.ops.sparsekd.embedding_top_k(queries.detach(), table.values.detach(), *table[1:], k, begin, ids)


def embedding_absent_(total: Tensor, grad: Tensor, kept: Tensor, ids: Tensor, absolute: bool = False) -> Tensor:
    """Add to ``total [n, dim]``, in the dimensions that the rows ``ids [n]`` do not keep, their gradients ``grad``
    (or their magnitudes): what says which entries should come back."""
    if total.shape != grad.shape or grad.dim() != 2 or ids.shape != grad.shape[:1]:
        raise ValueError(
            f"sparsekd.embedding_absent_: total and grad must be [n, dim] and ids [n], got {tuple(total.shape)}, "
            f"{tuple(grad.shape)} and {tuple(ids.shape)}"
        )
    words = -(-grad.shape[1] // 64)
    if kept.dtype != torch.int64 or kept.dim() != 2 or kept.shape[1] != words:
        raise ValueError(
            f"sparsekd.embedding_absent_: kept must be torch.int64 of shape [rows, {words}] for {grad.shape[1]} "
            f"dimensions, got {kept.dtype} of shape {tuple(kept.shape)}"
        )
    torch.ops.sparsekd.embedding_absent_(total, grad, kept, ids.long(), absolute)
    return total


# ---- What a table is made of


def pack_mask(mask: Tensor) -> Tensor:
    """Bool ``[rows, dim]`` to ``kept``."""
    dim = mask.shape[1]
    words = -(-dim // 64)
    bit = torch.arange(64, device=mask.device)
    pieces = [mask.new_empty(0, words, dtype=torch.int64)]
    for piece in mask.split(_PIECE):
        padded = torch.nn.functional.pad(piece, (0, 64 * words - dim)).view(-1, words, 64)
        pieces.append((padded.long() << bit).sum(-1))
    return torch.cat(pieces)


def unpack_mask(kept: Tensor, dim: int) -> Tensor:
    """``kept`` of some rows to bool ``[rows, dim]``."""
    bit = torch.arange(64, device=kept.device)
    return (kept[:, :, None] >> bit & 1).bool().flatten(1)[:, :dim]


def count_kept(kept: Tensor) -> Tensor:
    """Int64 ``[rows]``: how many dimensions a row keeps. Bits are added in pairs, then in fours, then in bytes."""
    bits = kept - (kept >> 1 & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333)
    bits = bits + (bits >> 4) & 0x0F0F0F0F0F0F0F0F
    return (bits * 0x0101010101010101 >> 56).sum(1)


def row_index(kept: Tensor) -> tuple[Tensor, Tensor]:
    """``(base, counts)`` of a table."""
    counts = count_kept(kept)
    rows, groups = kept.shape[0], -(-kept.shape[0] // ROWS_OF_BASE)
    padded = counts.new_zeros(groups * ROWS_OF_BASE)
    padded[:rows] = counts
    base = padded.view(groups, ROWS_OF_BASE).sum(1).cumsum(0)
    return torch.cat([base.new_zeros(1), base])[:groups].contiguous(), padded.clamp(max=255).to(torch.uint8)


def places(kept: Tensor, ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of rows ``ids [n]``: which dimensions they keep, bool ``[n, dim]``, and where these lie among the values."""
    counts = count_kept(kept)
    begin = (counts.cumsum(0) - counts)[ids]
    mask = unpack_mask(kept[ids], dim)
    return mask, begin[:, None] + mask.cumsum(1) - 1


# ---- References


def embedding_reference(
    values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, dim: int, padding: int
) -> Tensor:
    _check_range(ids, kept.shape[0])
    flat = ids.reshape(-1)
    mask, place = places(kept, flat, dim)
    out = values.new_zeros(flat.shape[0], dim)
    out[mask] = values[place[mask]]
    return out.view(*ids.shape, dim)


def embedding_grad_reference(
    grad: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, source: Tensor | None, scale: Tensor | None,
    num_values: int, padding: int,
) -> Tensor:  # fmt: skip
    _check_range(ids, kept.shape[0])
    rows = grad if source is None else grad[source]
    if scale is not None:
        rows = rows * scale[:, None].to(rows.dtype)
    mask, place = places(kept, ids, grad.shape[1])
    mask = mask & (ids != padding)[:, None]
    return grad.new_zeros(num_values).index_add(0, place[mask], rows[mask])


def embedding_bag_reference(
    values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, offsets: Tensor, scale: Tensor | None,
    dim: int, padding: int,
) -> Tensor:  # fmt: skip
    check_offsets(offsets, ids.shape[0])
    rows = embedding_reference(values, kept, base, counts, ids, dim, padding)
    if scale is not None:
        rows = rows * scale[:, None].to(rows.dtype)
    real = ids != padding
    return values.new_zeros(offsets.shape[0] - 1, dim).index_add(0, bag_of(offsets, ids.shape[0])[real], rows[real])


def embedding_top_k_reference(
    queries: Tensor, values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, k: int, begin: Tensor | None,
    excluded: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_excluded(begin, excluded, kept.shape[0])
    count = queries.shape[0]
    scores = queries.new_full((count, k), float("-inf"))
    ids = torch.full((count, k), -1, dtype=torch.int64, device=queries.device)
    for rows in torch.arange(kept.shape[0], device=queries.device).split(4096):
        more = queries @ embedding_reference(values, kept, base, counts, rows, queries.shape[1], -1).T
        if begin is not None and excluded is not None:
            inside = (excluded >= rows[0]) & (excluded <= rows[-1])
            query = bag_of(begin, excluded.shape[0])
            more[query[inside], excluded[inside] - rows[0]] = float("-inf")
        named = torch.where(more == float("-inf"), -1, rows.expand(count, -1))
        # The best so far have the smaller ids, and a stable sort leaves them in front of their equals.
        scores, order = torch.cat([scores, more], 1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([ids, named], 1).gather(1, order)[:, :k]
        scores = scores[:, :k]
    return scores.contiguous(), ids.contiguous()


def embedding_absent_reference(total: Tensor, grad: Tensor, kept: Tensor, ids: Tensor, absolute: bool) -> None:
    _check_range(ids, kept.shape[0])
    mask = unpack_mask(kept[ids], grad.shape[1])
    total += (grad.abs() if absolute else grad).masked_fill(mask, 0)


def bag_of(offsets: Tensor, count: int) -> Tensor:
    """The bag of each of ``count`` ids."""
    place = torch.arange(count, device=offsets.device)
    return torch.searchsorted(offsets.contiguous(), place, right=True) - 1


def check_offsets(offsets: Tensor, count: int, what: str = "embedding_bag: offsets") -> None:
    """Kernels follow offsets blindly."""
    if int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((offsets[1:] < offsets[:-1]).any()):
        some = offsets[:8].tolist()
        raise ValueError(
            f"sparsekd.{what} must rise from 0 to the number of ids, {count}, got {some}"
            f"{'' if offsets.shape[0] <= 8 else ' and more'}"
        )


def check_excluded(begin: Tensor | None, excluded: Tensor | None, rows: int) -> None:
    """Kernels pass through the ids of a query once, from the first to the last."""
    if begin is None or excluded is None:
        return
    check_offsets(begin, excluded.shape[0], "embedding_top_k: the begin of excluded")
    first = excluded.new_zeros(excluded.shape[0] + 1, dtype=torch.bool).index_fill_(0, begin, True)
    falls = (excluded[1:] < excluded[:-1]) & ~first[1:-1]  # from one query to the next they may
    if bool(falls.any() | ((excluded < 0) | (excluded >= rows)).any()):  # asked once: a GPU has to be waited for
        _check_range(excluded, rows, "embedding_top_k: excluded ids")
        at = int(falls.nonzero()[0, 0])
        raise ValueError(
            f"sparsekd.embedding_top_k: the excluded ids of a query must ascend, got {int(excluded[at])} before "
            f"{int(excluded[at + 1])}; sort them"
        )


def _check_range(ids: Tensor, rows: int, what: str = "embedding: ids") -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        outside = ids[(ids < 0) | (ids >= rows)].reshape(-1)[0]
        raise IndexError(f"sparsekd.{what} must lie in [0, {rows}), got {int(outside)}")


def check_lookup(op: str, ids: Tensor, table: Table, dim: int, padding_idx: int | None) -> None:
    check_ids(op, ids)
    _check_table(op, table, dim)
    if ids.device != table.values.device:
        raise ValueError(_elsewhere(op, "ids", ids, table.values))
    rows = table.kept.shape[0]
    if padding_idx is not None and not 0 <= padding_idx < rows:
        raise ValueError(f"sparsekd.{op}: padding_idx must lie in [0, {rows}), got {padding_idx}")


def check_ids(op: str, ids: Tensor) -> None:
    if ids.dtype not in IDS:
        raise TypeError(f"sparsekd.{op}: ids must be int32 or int64, got {ids.dtype}; use .long()")


def _check_table(op: str, table: Table, dim: int) -> None:
    values, kept, base, counts = table
    if values.dim() != 1 or values.dtype not in FLOATS:
        raise TypeError(
            f"sparsekd.{op}: values must be floats of shape [n], got {values.dtype} of shape {tuple(values.shape)}"
        )
    rows, words = kept.shape[0], -(-dim // 64)
    groups = -(-rows // ROWS_OF_BASE)
    if (
        kept.dtype == base.dtype == torch.int64
        and counts.dtype == torch.uint8
        and kept.shape == (rows, words)
        and base.shape == (groups,)
        and counts.shape == (groups * ROWS_OF_BASE,)
        and kept.device == base.device == counts.device == values.device
    ):
        return  # the loops below, which say what is wrong, take as long as a lookup
    wanted = (("kept", kept, torch.int64, (rows, words)), ("base", base, torch.int64, (groups,)))
    for name, tensor, dtype, shape in (*wanted, ("counts", counts, torch.uint8, (groups * ROWS_OF_BASE,))):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"sparsekd.{op}: {name} must be {dtype} of shape {shape} for {rows} rows of {dim} dimensions, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    for name, tensor in (("kept", kept), ("base", base), ("counts", counts)):
        if tensor.device != values.device:
            raise ValueError(_elsewhere(op, name, tensor, values))


def _elsewhere(op: str, name: str, tensor: Tensor, values: Tensor) -> str:
    return (
        f"sparsekd.{op}: {name} must be on {values.device} like values, got {tensor.device}; move the whole module "
        "with .to(device)"
    )


# ---- Fakes and derivatives


def _fake(values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, dim: int, padding: int) -> Tensor:
    return values.new_empty(*ids.shape, dim)


def _fake_grad(grad: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, source: Tensor | None,
               scale: Tensor | None, num_values: int, padding: int) -> Tensor:  # fmt: skip
    return grad.new_empty(num_values)


def _fake_bag(values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, offsets: Tensor,
              scale: Tensor | None, dim: int, padding: int) -> Tensor:  # fmt: skip
    return values.new_empty(offsets.shape[0] - 1, dim)


def _fake_top_k(queries: Tensor, values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, k: int,
                begin: Tensor | None, excluded: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    values, kept, base, counts, ids, _, ctx.padding = inputs
    ctx.num_values = values.shape[0]
    ctx.save_for_backward(kept, base, counts, ids)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    kept, base, counts, ids = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    flat = ids.reshape(-1)
    args = (kept, base, counts, flat, None, None, ctx.num_values, ctx.padding)
    return call("embedding_grad", rows, *args), *(None,) * 6


def _save_bag(ctx: Any, inputs: tuple, output: Tensor) -> None:
    values, kept, base, counts, ids, offsets, scale, ctx.dim, ctx.padding = inputs
    ctx.save_for_backward(values, kept, base, counts, ids, offsets, scale)


def _backward_bag(ctx: Any, grad: Tensor) -> tuple:
    values, kept, base, counts, ids, offsets, scale = ctx.saved_tensors
    source = bag_of(offsets, ids.shape[0])
    grad_values = grad_scale = None
    if ctx.needs_input_grad[0]:
        args = (kept, base, counts, ids, source, scale, values.shape[0], ctx.padding)
        grad_values = call("embedding_grad", grad, *args)
    if scale is not None and ctx.needs_input_grad[6]:
        rows = call("embedding", values, kept, base, counts, ids, ctx.dim, ctx.padding)
        grad_scale = (rows * grad[source]).sum(1).masked_fill(ids == ctx.padding, 0).to(scale.dtype)
    return grad_values, *(None,) * 5, grad_scale, None, None


def _save_grad(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """The gradient is linear in the gradient of the rows and in the scale."""
    grad, kept, base, counts, ids, source, scale, _, ctx.padding = inputs
    ctx.save_for_backward(grad, kept, base, counts, ids, source, scale)


def _backward_grad(ctx: Any, grad_values: Tensor) -> tuple:
    grad, kept, base, counts, ids, source, scale = ctx.saved_tensors
    rows = call("embedding", grad_values, kept, base, counts, ids, grad.shape[1], ctx.padding)
    rows = rows.masked_fill((ids == ctx.padding)[:, None], 0)
    grad_scale = None
    if scale is not None and ctx.needs_input_grad[6]:
        grad_scale = (rows * (grad if source is None else grad[source])).sum(1).to(scale.dtype)
    if scale is not None:
        rows = rows * scale[:, None].to(rows.dtype)
    grad_grad = rows if source is None else grad.new_zeros(grad.shape).index_add(0, source, rows)
    return grad_grad, *(None,) * 5, grad_scale, None, None


_TABLE = "Tensor kept, Tensor base, Tensor counts"
define(
    "embedding",
    f"(Tensor values, {_TABLE}, Tensor ids, SymInt dim, SymInt padding) -> Tensor",
    embedding_reference,
    _fake,
)
define(
    "embedding_grad",
    f"(Tensor grad, {_TABLE}, Tensor ids, Tensor? source, Tensor? scale, SymInt num_values, SymInt padding) -> Tensor",
    embedding_grad_reference,
    _fake_grad,
)
define(
    "embedding_bag",
    f"(Tensor values, {_TABLE}, Tensor ids, Tensor offsets, Tensor? scale, SymInt dim, SymInt padding) -> Tensor",
    embedding_bag_reference,
    _fake_bag,
)
define(
    "embedding_top_k",
    f"(Tensor queries, Tensor values, {_TABLE}, SymInt k, Tensor? begin, Tensor? excluded) -> (Tensor, Tensor)",
    embedding_top_k_reference,
    _fake_top_k,
)
define(
    "embedding_absent_",
    "(Tensor(a!) total, Tensor grad, Tensor kept, Tensor ids, bool absolute) -> ()",
    embedding_absent_reference,
    lambda *_: None,
)
differentiate("embedding", _backward, _save)
differentiate("embedding_grad", _backward_grad, _save_grad)
differentiate("embedding_bag", _backward_bag, _save_bag)
