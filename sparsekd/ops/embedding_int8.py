"""Serving of packed tables whose values are int8 with a float32 scale for each row: lookup, bags and the best rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ._schema import define
from .embedding import (
    check_excluded,
    embedding_bag_reference,
    embedding_reference,
    embedding_top_k_reference,
    unpack_mask,
)

_PIECE = 1 << 14


def quantize_rows(values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """``(int8 [n], scale [rows])``: a row's largest magnitude becomes 127, ties go to even."""
    out = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    scales, begin = [], 0
    for piece in kept.split(_PIECE):
        mask = unpack_mask(piece, 64 * kept.shape[1])
        count = int(mask.sum())
        dense = torch.zeros(mask.shape, device=values.device)
        dense[mask] = values[begin : begin + count].float()
        scale = dense.abs().amax(1) / 127
        scales.append(scale)
        dense /= scale.masked_fill(scale == 0, 1)[:, None]
        out[begin : begin + count] = dense[mask].round().to(torch.int8)
        begin += count
    return out, torch.cat(scales)


def embedding_int8_reference(
    values: Tensor, row_scale: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, dim: int
) -> Tensor:
    rows = embedding_reference(values, kept, base, counts, ids, dim, -1)
    return rows.float() * row_scale[ids][..., None]


def embedding_bag_int8_reference(
    values: Tensor, row_scale: Tensor, kept: Tensor, base: Tensor, counts: Tensor, ids: Tensor, offsets: Tensor,
    scale: Tensor | None, dim: int, padding: int,
) -> Tensor:  # fmt: skip
    scale = row_scale[ids] if scale is None else scale * row_scale[ids]
    return embedding_bag_reference(values.float(), kept, base, counts, ids, offsets, scale, dim, padding)


def embedding_top_k_int8_reference(
    queries: Tensor, values: Tensor, row_scale: Tensor, kept: Tensor, base: Tensor, counts: Tensor, k: int,
    begin: Tensor | None, excluded: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_excluded(begin, excluded, kept.shape[0])
    every = torch.arange(kept.shape[0], device=kept.device)
    sizes = [unpack_mask(kept[rows], 64 * kept.shape[1]).sum(1) for rows in every.split(_PIECE)]
    exact = values.float() * row_scale.repeat_interleave(torch.cat(sizes))
    return embedding_top_k_reference(queries, exact, kept, base, counts, k, begin, excluded)


_TABLE = "Tensor values, Tensor row_scale, Tensor kept, Tensor base, Tensor counts"
define(
    "embedding_int8",
    f"({_TABLE}, Tensor ids, SymInt dim) -> Tensor",
    embedding_int8_reference,
    lambda values, row_scale, kept, base, counts, ids, dim: row_scale.new_empty(*ids.shape, dim),
)
define(
    "embedding_bag_int8",
    f"({_TABLE}, Tensor ids, Tensor offsets, Tensor? scale, SymInt dim, SymInt padding) -> Tensor",
    embedding_bag_int8_reference,
    lambda values, row_scale, kept, base, counts, ids, offsets, scale, dim, padding: row_scale.new_empty(
        offsets.shape[0] - 1, dim
    ),
)
define(
    "embedding_top_k_int8",
    f"(Tensor queries, {_TABLE}, SymInt k, Tensor? begin, Tensor? excluded) -> (Tensor, Tensor)",
    embedding_top_k_int8_reference,
    lambda queries, values, row_scale, kept, base, counts, k, begin, excluded: (
        queries.new_empty(queries.shape[0], k),
        queries.new_empty(queries.shape[0], k, dtype=torch.int64),
    ),
)
