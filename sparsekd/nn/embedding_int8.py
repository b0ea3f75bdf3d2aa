"""Packed tables for serving whose values are int8 with a float32 scale for each row: a quarter of the values' bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.embedding import Table, check_bags, check_lookup, row_index
from ..ops.embedding_int8 import quantize_rows
from .bags import bags_and_scale
from .embedding import SparseEmbedding, SparseEmbeddingBag
from .embedding_table import PackedState, SparseTable

__all__ = ["Int8Embedding", "Int8EmbeddingBag"]


class _Int8Table(PackedState):
    """What both share: the table, which learns nothing, and its best rows."""

    packed_type: ClassVar[type[SparseTable]]

    row_scale: Tensor
    dtype = torch.float32  # of what it gives out

    def __init__(self, table: Any) -> None:
        super().__init__()
        kind = type(self).__name__
        if not isinstance(table, self.packed_type):
            raise TypeError(f"{kind}: expected a {self.packed_type.__name__}, got {type(table).__name__}")
        if not bool(torch.isfinite(table.values).all()):
            raise ValueError(f"{kind}: expected finite values, got NaN or infinity")
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx
        kept = table.kept.clone()
        values, row_scale = quantize_rows(table.values.detach(), kept)
        base, counts = row_index(kept)
        for name, tensor in (("values", values), ("row_scale", row_scale), ("kept", kept)):
            self.register_buffer(name, tensor)
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("counts", counts, persistent=False)

    def top_k(self, queries: Tensor, k: int, excluded: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """As ``SparseEmbedding.top_k``; queries are float32 ``[n, dim]``."""
        kind = type(self).__name__
        if queries.dim() != 2 or queries.shape[1] != self.embedding_dim or queries.dtype != torch.float32:
            raise ValueError(
                f"{kind}.top_k: queries must be float32 [n, {self.embedding_dim}], got {queries.dtype} of shape "
                f"{tuple(queries.shape)}"
            )
        if k < 1:
            raise ValueError(f"{kind}.top_k: k must be positive, got {k}")
        begin, ids = (None, None) if excluded is None else (excluded[0].long(), excluded[1].long())
        if begin is not None and ids is not None and (begin.shape != (queries.shape[0] + 1,) or ids.dim() != 1):
            raise ValueError(
                f"{kind}.top_k: excluded must be (begin [{queries.shape[0] + 1}], ids [m]), got shapes "
                f"{tuple(begin.shape)} and {tuple(ids.shape)}"
            )
        return torch.ops.sparsekd.embedding_top_k_int8(queries.detach(), *self._tensors, k, begin, ids)

    def extra_repr(self) -> str:
        density = self.values.shape[0] / (self.num_embeddings * self.embedding_dim)
        return f"{self.num_embeddings}, {self.embedding_dim}, density={density:.3g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A cast of the model is one of the rows that are given out. The scales stay float32, as kernels read them."""
        scale = self.row_scale
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        if self.row_scale.dtype != torch.float32:
            self.row_scale = scale.to(self.row_scale.device)
        return self

    def _make_room(self, count: int) -> None:
        self.values = self.values.new_empty(count)

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.values, self.row_scale, self.kept, self.base, self.counts

    @property
    def _floats(self) -> Table:
        """What the checks of a lookup look at: scales stand for values, whose type is theirs."""
        return Table(self.row_scale, self.kept, self.base, self.counts)


class Int8Embedding(_Int8Table):
    """``SparseEmbedding`` for inference: ``[...] -> [..., embedding_dim]``, float32, or what the model is cast to.

    A row's largest magnitude becomes 127, so that an entry is off by half a 127th of it at most.
    """

    packed_type = SparseEmbedding

    def forward(self, input: Tensor) -> Tensor:
        check_lookup("embedding_int8", input, self._floats, self.embedding_dim, self.padding_idx)
        rows = torch.ops.sparsekd.embedding_int8(*self._tensors, input.long(), self.embedding_dim)
        return rows.to(self.dtype)


class Int8EmbeddingBag(_Int8Table):
    """``SparseEmbeddingBag`` for inference, modes "sum" and "mean"; summed in float32, then cast as the model is."""

    packed_type = SparseEmbeddingBag

    def __init__(self, table: SparseEmbeddingBag) -> None:
        super().__init__(table)
        if table.mode == "max":
            raise ValueError("Int8EmbeddingBag: mode must be 'sum' or 'mean', got 'max'; serve the table unquantised")
        self.mode, self.include_last_offset = table.mode, table.include_last_offset

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        ids, offsets, scale = bags_and_scale(self, input, offsets, per_sample_weights)
        check_bags(ids, offsets, self._floats, self.embedding_dim, scale, self.padding_idx)
        padding = -1 if self.padding_idx is None else self.padding_idx
        pooled = torch.ops.sparsekd.embedding_bag_int8(*self._tensors, ids, offsets, scale, self.embedding_dim, padding)
        return pooled.to(self.dtype)
