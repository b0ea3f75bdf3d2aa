"""CPU kernels of embeddings: hands pointers and sizes to ``sparsekd._C``. Operands were checked in ``sparsekd/ops``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.embedding import (
    check_excluded,
    embedding_absent_reference,
    embedding_bag_reference,
    embedding_grad_reference,
    embedding_reference,
    embedding_top_k_reference,
)
from ..ops.embedding_rows import embedding_rows_grad_reference
from ..ops.embedding_update import (
    embedding_adagrad_reference,
    embedding_adagrad_rows_reference,
    embedding_adam_reference,
    embedding_sgd_reference,
)
from .native import native


def embedding(
    values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, dim: int, padding: int
) -> Tensor:
    kernel = _rows_kernel("embedding", values)
    if kernel is None:
        return embedding_reference(values, kept, base, counts, ids, dim, padding)
    values, kept, base, counts = values.contiguous(), kept.contiguous(), base.contiguous(), counts.contiguous()
    ids = ids.contiguous()
    out = values.new_empty((*ids.shape, dim))
    table = _table(kept, base, counts, dim)
    kernel(table, values.data_ptr(), 0, ids.data_ptr(), ids.numel(), out.data_ptr(), torch.get_num_threads())
    return out


def embedding_bag(
    values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, offsets: Tensor, scale: Tensor | None,
    dim: int, padding: int,
) -> Tensor:  # fmt: skip
    kernel = _rows_kernel("embedding_bag", values)
    if kernel is None:
        return embedding_bag_reference(values, kept, base, counts, ids, offsets, scale, dim, padding)
    bags = offsets.shape[0] - 1
    values, kept, base, counts = values.contiguous(), kept.contiguous(), base.contiguous(), counts.contiguous()
    ids, offsets = ids.contiguous(), offsets.contiguous()
    scale = None if scale is None else scale.float().contiguous()
    out = values.new_empty(bags, dim)
    kernel(
        _table(kept, base, counts, dim), values.data_ptr(), 0, ids.data_ptr(), ids.shape[0], offsets.data_ptr(),
        _at(scale), bags, padding, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def embedding_bag_scale(ids: Tensor, offsets: Tensor, padding: int) -> Tensor:
    ids, offsets = ids.contiguous(), offsets.contiguous()
    scale = ids.new_empty(ids.shape[0], dtype=torch.float32)
    native.embedding_bag_scale(
        ids.data_ptr(), offsets.data_ptr(), ids.shape[0], offsets.shape[0] - 1, padding, scale.data_ptr()
    )
    return scale


def embedding_grad(
    grad: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, source: Tensor | None, scale: Tensor | None,
    num_values: int, padding: int,
) -> Tensor:  # fmt: skip
    if grad.dtype == torch.float64:
        return embedding_grad_reference(grad, kept, base, counts, ids, source, scale, num_values, padding)
    rows, scale = grad.float().contiguous(), None if scale is None else scale.float().contiguous()
    kept, base, counts, ids = (t.contiguous() for t in (kept, base, counts, ids))
    source = _packed(source)
    out = rows.new_empty(num_values)
    native.embedding_grad(
        _table(kept, base, counts, grad.shape[1]), rows.data_ptr(), ids.data_ptr(),
        _at(source), _at(scale),
        ids.shape[0], padding, num_values, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(grad.dtype)


def embedding_absent_(total: Tensor, grad: Tensor, kept: Tensor, ids: Tensor, absolute: bool) -> None:
    if not _floats(total, grad.contiguous()):
        return embedding_absent_reference(total, grad, kept, ids, absolute)
    grad, kept, ids = grad.contiguous(), kept.contiguous(), ids.contiguous()
    table = native.EmbeddingTable(kept.shape[0], grad.shape[1], kept.data_ptr(), 0, 0)
    native.embedding_absent(
        table, grad.data_ptr(), ids.data_ptr(), ids.shape[0], absolute, total.data_ptr(), torch.get_num_threads()
    )


def embedding_top_k(
    queries: Tensor, values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, k: int, begin: Tensor | None,
    excluded: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernel = _rows_kernel("embedding_top_k", values)
    if kernel is None or queries.dtype != values.dtype:
        return embedding_top_k_reference(queries, values, kept, base, counts, k, begin, excluded)
    scores, ids = _top_k(kernel, queries, values, None, kept, base, counts, k, begin, excluded)
    return scores.to(queries.dtype), ids


def embedding_top_k_int8(
    queries: Tensor, values: Tensor, row_scale: Tensor, kept: Tensor, base: Tensor, counts: Tensor, k: int,
    begin: Tensor | None, excluded: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _top_k(native.embedding_top_k_i8, queries, values, row_scale.float(), kept, base, counts, k, begin, excluded)


def _top_k(
    kernel: Any, queries: Tensor, values: Tensor, row_scale: Tensor | None, kept: Tensor, base: Tensor, counts: Tensor,
    k: int, begin: Tensor | None, excluded: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_excluded(begin, excluded, kept.shape[0])
    queries, values, kept, base, counts = (t.contiguous() for t in (queries.float(), values, kept, base, counts))
    row_scale, begin, excluded = (_packed(t) for t in (row_scale, begin, excluded))
    scores = queries.new_empty(queries.shape[0], k)
    ids = torch.empty(queries.shape[0], k, dtype=torch.int64)
    kernel(
        _table(kept, base, counts, queries.shape[1]), values.data_ptr(), _at(row_scale), queries.data_ptr(),
        queries.shape[0], k, _at(begin), _at(excluded), scores.data_ptr(), ids.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return scores, ids


def embedding_int8(
    values: Tensor, row_scale: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, dim: int
) -> Tensor:
    values, row_scale, kept, base, counts, ids = (
        t.contiguous() for t in (values, row_scale.float(), kept, base, counts, ids)
    )
    out = row_scale.new_empty(*ids.shape, dim)
    native.embedding_i8(
        _table(kept, base, counts, dim), values.data_ptr(), row_scale.data_ptr(), ids.data_ptr(), ids.numel(),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def embedding_bag_int8(
    values: Tensor, row_scale: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, offsets: Tensor,
    scale: Tensor | None, dim: int, padding: int,
) -> Tensor:  # fmt: skip
    values, row_scale, kept, base, counts, ids, offsets = (
        t.contiguous() for t in (values, row_scale.float(), kept, base, counts, ids, offsets)
    )
    scale = None if scale is None else scale.float().contiguous()
    out = row_scale.new_empty(offsets.shape[0] - 1, dim)
    native.embedding_bag_i8(
        _table(kept, base, counts, dim), values.data_ptr(), row_scale.data_ptr(), ids.data_ptr(), ids.shape[0],
        offsets.data_ptr(), _at(scale), out.shape[0], padding, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def embedding_rows_grad(
    grad: Tensor, kept: Tensor, base: Tensor, counts: Tensor, rows: Tensor, first: Tensor, order: Tensor,
    source: Tensor | None, scale: Tensor | None, begin: Tensor, count: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if grad.dtype == torch.float64:
        return embedding_rows_grad_reference(grad, kept, base, counts, rows, first, order, source, scale, begin, count)
    floats, scale = grad.float().contiguous(), None if scale is None else scale.float()
    kept, base, counts, rows, first, order, begin = (
        t.contiguous() for t in (kept, base, counts, rows, first, order, begin)
    )
    source, scale = _packed(source), _packed(scale)
    place, sums = rows.new_empty(count), floats.new_empty(count)
    native.embedding_rows_grad(
        _table(kept, base, counts, grad.shape[1]), floats.data_ptr(), rows.data_ptr(), first.data_ptr(),
        order.data_ptr(), _at(source), _at(scale), begin.data_ptr(), rows.shape[0], place.data_ptr(), sums.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return place, sums.to(grad.dtype)


# ---- Training: see ops/embedding_update.py


def embedding_sgd_(values: Tensor, places: Tensor, grad: Tensor, lr: float, decay: float) -> None:
    if not _floats(values, grad):
        return embedding_sgd_reference(values, places, grad, lr, decay)
    _update("sgd", _NO_INDEX, places, grad, values, None, None, None, lr, 0.0, 0.0, 0.0, decay)


def embedding_adagrad_(
    values: Tensor, square: Tensor, places: Tensor, grad: Tensor, lr: float, eps: float, decay: float
) -> None:
    if not _floats(values, square, grad):
        return embedding_adagrad_reference(values, square, places, grad, lr, eps, decay)
    _update("adagrad", _NO_INDEX, places, grad, values, None, square, None, lr, 0.0, 0.0, eps, decay)


def embedding_adagrad_rows_(
    values: Tensor, square: Tensor, kept: Tensor, base: Tensor, counts: Tensor, places: Tensor, grad: Tensor, lr: float,
    eps: float, decay: float,
) -> None:  # fmt: skip
    if not _floats(values, square, grad):
        return embedding_adagrad_rows_reference(values, square, kept, base, counts, places, grad, lr, eps, decay)
    _update("adagrad_rows", (kept, base, counts), places, grad, values, None, square, None, lr, 0.0, 0.0, eps, decay)


def embedding_adam_(
    values: Tensor, mean: Tensor, square: Tensor, occurred: Tensor, kept: Tensor, base: Tensor, counts: Tensor,
    places: Tensor, grad: Tensor, lr: float, beta1: float, beta2: float, eps: float, decay: float,
) -> None:  # fmt: skip
    if not _floats(values, mean, square, grad) or not occurred.is_contiguous():
        return embedding_adam_reference(
            values, mean, square, occurred, kept, base, counts, places, grad, lr, beta1, beta2, eps, decay
        )
    index = (kept, base, counts)
    _update("adam", index, places, grad, values, mean, square, occurred, lr, beta1, beta2, eps, decay)


def embedding_magnitudes(values: Tensor, kept: Tensor, base: Tensor, counts: Tensor) -> Tensor:
    values, kept, base, counts = (t.contiguous() for t in (values.float(), kept, base, counts))
    out = torch.empty_like(values)
    table = _table(kept, base, counts, 64 * kept.shape[1])
    native.embedding_magnitudes(table, values.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def embedding_thin(kept: Tensor, base: Tensor, counts: Tensor, stays: Tensor) -> Tensor:
    kept, base, counts, stays = (t.contiguous() for t in (kept, base, counts, stays))
    out = torch.empty_like(kept)
    table = _table(kept, base, counts, 64 * kept.shape[1])
    native.embedding_thin(table, stays.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def embedding_repack(
    values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, new_kept: Tensor, new_base: Tensor, new_counts: Tensor,
    count: int, fresh: float,
) -> Tensor:  # fmt: skip
    values, kept, base, counts = (t.contiguous() for t in (values, kept, base, counts))
    new_kept, new_base, new_counts = (t.contiguous() for t in (new_kept, new_base, new_counts))
    out, dim = values.new_full((count,), fresh), 64 * kept.shape[1]
    native.embedding_repack(
        _table(kept, base, counts, dim), _table(new_kept, new_base, new_counts, dim), values.data_ptr(),
        out.data_ptr(), values.element_size(), torch.get_num_threads(),
    )  # fmt: skip
    return out


_NO_INDEX = None


def _update(
    name: str, index: tuple[Tensor, Tensor, Tensor] | None, places: Tensor, grad: Tensor, values: Tensor,
    mean: Tensor | None, square: Tensor | None, occurred: Tensor | None, *numbers: float,
) -> None:  # fmt: skip
    kept, base, counts = (_packed(t) for t in index or (None, None, None))
    rows, words = (0, 0) if kept is None else kept.shape
    table = native.EmbeddingTable(rows, 64 * words, _at(kept), _at(base), _at(counts))
    places, grad = places.contiguous(), grad.contiguous()
    getattr(native, f"embedding_{name}")(
        table, places.data_ptr(), grad.data_ptr(), places.shape[0], values.shape[0], values.data_ptr(), _at(mean),
        _at(square), _at(occurred), *numbers, torch.get_num_threads(),
    )  # fmt: skip


def _floats(*operands: Tensor) -> bool:
    return all(x.dtype == torch.float32 and x.is_contiguous() for x in operands)


_SUFFIXES = {torch.float32: "_f32", torch.bfloat16: "_bf16", torch.float16: "_f16"}


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _packed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _table(kept: Tensor, base: Tensor, counts: Tensor, dim: int) -> Any:
    return native.EmbeddingTable(kept.shape[0], dim, kept.data_ptr(), base.data_ptr(), counts.data_ptr())


def _rows_kernel(op: str, values: Tensor) -> Any:
    """The compiled ``op`` for the dtype of the values, or None."""
    suffix = _SUFFIXES.get(values.dtype)
    return None if suffix is None else getattr(native, op + suffix)


# What layers call in every step.
LOOKUPS: list[Callable[..., Any]] = [
    embedding,
    embedding_bag,
    embedding_bag_scale,
    embedding_grad,
    embedding_rows_grad,
]
OPS: list[Callable[..., Any]] = [
    *LOOKUPS,
    embedding_absent_,
    embedding_top_k,
    embedding_sgd_,
    embedding_adagrad_,
    embedding_adagrad_rows_,
    embedding_adam_,
    embedding_magnitudes,
    embedding_thin,
    embedding_repack,
    embedding_int8,
    embedding_bag_int8,
    embedding_top_k_int8,
]
