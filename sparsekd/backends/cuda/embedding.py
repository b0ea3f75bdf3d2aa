"""The ops of packed embedding tables on CUDA: ``sparsekd.kernels.embedding*`` (Triton). Operands were checked in
``sparsekd/ops``, but for what ids and offsets hold.

A wrong id or offset is found by the kernel that meets it, and stops the device as torch's own lookups do: the host is
not made to wait for an answer. The best rows for a query are not for every step, so there the host looks first.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...ops.embedding import (
    check_excluded,
    check_offsets,
    embedding_absent_reference,
    embedding_bag_reference,
    embedding_grad_reference,
    embedding_reference,
    embedding_top_k_reference,
)
from ...ops.embedding_bags import embedding_bag_scale_reference
from ...ops.embedding_int8 import embedding_top_k_int8_reference
from ...ops.embedding_rows import embedding_rows_grad_reference
from . import cost
from .device import on

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_K = 128  # rows of a query that the registers of a program keep
_NO_IDS = "sparsekd.{}: ids must lie in [0, {})"
_NO_BAGS = _NO_IDS + ", and offsets must rise from 0 to the number of ids, {}"


def describe(op: str) -> str:
    """What runs an op of packed embedding tables on CUDA devices, and why."""
    if op not in _NAMES:
        return "pure-torch reference: there is no kernel for GPUs yet"
    if find_spec("triton") is None:
        return "pure-torch reference: triton is not importable; pip install sparsekd[gpu]"
    if op == "embedding_bag_scale":
        return "sparsekd.kernels (Triton)"
    kinds = "int8 values" if op.endswith("int8") else "float32, bfloat16 and float16"
    fewer = f" and up to {LARGEST_K} rows a query" if "top_k" in op else ""
    return f"sparsekd.kernels (Triton) for {kinds}{fewer}; pure-torch reference otherwise"


def register() -> None:
    if find_spec("triton") is None:
        return
    for op in OPS:
        torch.library.impl(f"sparsekd::{op.__name__}", "cuda", op)


# ---- Lookup and bags


def embedding(
    values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, dim: int, padding: int
) -> Tensor:
    if values.dtype not in FLOATS:
        return embedding_reference(values, kept, base, counts, ids, dim, padding)
    return _lookup("embedding", (values, None, kept, base, counts), ids, dim, values.dtype)


def embedding_int8(
    values: Tensor, row_scale: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, dim: int
) -> Tensor:
    return _lookup("embedding_int8", (values, row_scale, kept, base, counts), ids, dim, torch.float32)


def _lookup(op: str, table: tuple, ids: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    from sparsekd.kernels import embedding as kernel

    out = ids.new_empty((*ids.shape, dim), dtype=dtype)
    if out.numel():
        with on(ids.device):
            packed, ok = kernel.Packed.of(*table, dim), _note(ids)
            kernel.lookup(packed, ids.contiguous(), out, ok)
            torch._assert_async(ok, _NO_IDS.format(op, packed.rows))
    return out


def embedding_bag(
    values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, offsets: Tensor, scale: Tensor | None,
    dim: int, padding: int,
) -> Tensor:  # fmt: skip
    if values.dtype not in FLOATS:
        return embedding_bag_reference(values, kept, base, counts, ids, offsets, scale, dim, padding)
    return _bag("embedding_bag", (values, None, kept, base, counts), ids, offsets, scale, dim, padding, values.dtype)


def embedding_bag_int8(
    values: Tensor, row_scale: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, offsets: Tensor,
    scale: Tensor | None, dim: int, padding: int,
) -> Tensor:  # fmt: skip
    table = (values, row_scale, kept, base, counts)
    return _bag("embedding_bag_int8", table, ids, offsets, scale, dim, padding, torch.float32)


def _bag(
    op: str, table: tuple, ids: Tensor, offsets: Tensor, scale: Tensor | None, dim: int, padding: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from sparsekd.kernels import embedding as kernel

    out = ids.new_empty((offsets.shape[0] - 1, dim), dtype=dtype)
    if not out.numel():
        check_offsets(offsets, ids.shape[0])
        return out
    weight = None if scale is None else scale.float().contiguous()
    with on(ids.device):
        packed, ok = kernel.Packed.of(*table, dim), _note(ids)
        kernel.bag(packed, ids.contiguous(), offsets.contiguous(), weight, padding, out, ok)
        torch._assert_async(ok, _NO_BAGS.format(op, packed.rows, ids.shape[0]))
    return out


def embedding_bag_scale(ids: Tensor, offsets: Tensor, padding: int) -> Tensor:
    from sparsekd.kernels import embedding as kernel

    if offsets.shape[0] < 2:
        return embedding_bag_scale_reference(ids, offsets, padding)
    scale = ids.new_empty(ids.shape, dtype=torch.float32)
    with on(ids.device):
        ok = _note(ids)
        kernel.bag_scale(ids.contiguous(), offsets.contiguous(), padding, scale, ok)
        torch._assert_async(
            ok, f"sparsekd.embedding_bag: offsets must rise from 0 to the number of ids, {ids.shape[0]}"
        )
    return scale


# ---- Gradients


def embedding_grad(
    grad: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, source: Tensor | None, scale: Tensor | None,
    num_values: int, padding: int,
) -> Tensor:  # fmt: skip
    if grad.dtype not in FLOATS:
        return embedding_grad_reference(
            grad, kept, base, counts, ids, source, scale, num_values, padding
        )  # fmt: skip
    from sparsekd.kernels import embedding
    from sparsekd.kernels import embedding_grad as kernel

    out = grad.new_zeros(num_values)
    if ids.numel():
        with on(grad.device):
            packed, ok = embedding.Packed.of(out, None, kept, base, counts, grad.shape[1]), _note(grad)
            weight = None if scale is None else scale.float().contiguous()
            kernel.grad_values(packed, grad.contiguous(), ids, _packed(source), weight, padding, ok)
            torch._assert_async(ok, _NO_IDS.format("embedding", packed.rows))
    return out


def embedding_rows_grad(
    grad: Tensor, kept: Tensor, base: Tensor, counts: Tensor, rows: Tensor, first: Tensor, order: Tensor,
    source: Tensor | None, scale: Tensor | None, begin: Tensor, count: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if grad.dtype not in FLOATS:
        return embedding_rows_grad_reference(grad, kept, base, counts, rows, first, order, source, scale, begin, count)
    from sparsekd.kernels import embedding
    from sparsekd.kernels import embedding_grad as kernel

    places, sums = rows.new_empty(count), grad.new_empty(count)
    if rows.numel():
        with on(grad.device):
            packed, ok = embedding.Packed.of(sums, None, kept, base, counts, grad.shape[1]), _note(grad)
            weight = None if scale is None else scale.float().contiguous()
            rows, first, order, begin = (t.contiguous() for t in (rows, first, order, begin))
            kernel.rows_grad(
                packed, grad.contiguous(), rows, first, order, _packed(source), weight, begin, places, ok
            )  # fmt: skip
            torch._assert_async(ok, _NO_IDS.format("embedding", packed.rows))
    return places, sums


def embedding_absent_(total: Tensor, grad: Tensor, kept: Tensor, ids: Tensor, absolute: bool) -> None:
    if total.dtype not in FLOATS or grad.dtype not in FLOATS or not total.is_contiguous():
        return embedding_absent_reference(total, grad, kept, ids, absolute)
    from sparsekd.kernels import embedding as kernel

    if total.numel():
        with on(total.device):
            words, ok = kept.contiguous().view(torch.int32), _note(total)
            kernel.absent(total, grad.contiguous(), words, ids.contiguous(), absolute, ok)
            torch._assert_async(ok, _NO_IDS.format("embedding_absent_", kept.shape[0]))


# ---- The best rows


def embedding_top_k(
    queries: Tensor, values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, k: int, begin: Tensor | None,
    excluded: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if values.dtype not in FLOATS or queries.dtype != values.dtype or not _ranks(kept, k):
        return embedding_top_k_reference(queries, values, kept, base, counts, k, begin, excluded)
    scores, ids = _top_k(queries, (values, None, kept, base, counts), k, begin, excluded)
    return scores.to(queries.dtype), ids


def embedding_top_k_int8(
    queries: Tensor, values: Tensor, row_scale: Tensor, kept: Tensor, base: Tensor, counts: Tensor, k: int,
    begin: Tensor | None, excluded: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if queries.dtype != torch.float32 or not _ranks(kept, k):
        return embedding_top_k_int8_reference(queries, values, row_scale, kept, base, counts, k, begin, excluded)
    return _top_k(queries, (values, row_scale, kept, base, counts), k, begin, excluded)


def _ranks(kept: Tensor, k: int) -> bool:
    from sparsekd.kernels import embedding_top_k as kernel

    return k <= LARGEST_K and 0 < kept.shape[0] < kernel.MOST_ROWS


def _top_k(
    queries: Tensor, table: tuple, k: int, begin: Tensor | None, excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    from sparsekd.kernels import embedding
    from sparsekd.kernels import embedding_top_k as kernel

    check_excluded(begin, excluded, table[2].shape[0])
    count, dim = queries.shape
    _check_dimensions(table[2], dim)
    if not count:
        return queries.new_empty((0, k), dtype=torch.float32), queries.new_empty((0, k), dtype=torch.int64)
    with on(queries.device):
        packed = embedding.Packed.of(*table, dim)
        processors = cost.of_device(queries.device).processors
        return kernel.top_k(packed, queries.contiguous(), k, _packed(begin), _packed(excluded), processors)


def _check_dimensions(kept: Tensor, dim: int) -> None:
    beyond = (kept[:, -1] >> dim % 64) != 0 if dim % 64 else None
    if beyond is not None and bool(beyond.any()):
        raise ValueError(
            f"sparsekd.embedding_top_k: kept names dimensions beyond the {dim} of the queries in row "
            f"{int(beyond.nonzero()[0])}"
        )


def _note(like: Tensor) -> Tensor:
    """What a kernel overwrites with 0 when it meets an id or an offset that is none."""
    return torch.ones((), dtype=torch.int32, device=like.device)


def _packed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


OPS: list[Callable[..., Any]] = [
    embedding,
    embedding_int8,
    embedding_bag,
    embedding_bag_int8,
    embedding_bag_scale,
    embedding_grad,
    embedding_rows_grad,
    embedding_absent_,
    embedding_top_k,
    embedding_top_k_int8,
]
_NAMES = tuple(op.__name__ for op in OPS)
