"""``nn.Embedding`` and ``nn.EmbeddingBag`` whose rows keep some dimensions each.

table = sparsekd.nn.SparseEmbedding(1_000_000, 64, density=0.1)         # 26 MB of values, never 256
table = sparsekd.nn.SparseEmbedding.from_dense(embedding, density=0.1)  # keeps the entries of largest magnitude
rows = table(ids)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._schema import DIRECT, nobody_looks_on
from ..ops.embedding import count_kept
from ..ops.embedding_rows import embedding_bag_rows, embedding_rows
from .bags import bags_and_scale
from .embedding_table import SparseTable
from .sharded import ShardedEmbedding, rows_of_rank


class SparseEmbedding(SparseTable):
    """``nn.Embedding`` whose rows keep some dimensions each: ``[...] -> [..., embedding_dim]``.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as ``nn.Embedding``; kept entries start from N(0, 1).
        sparse: as ``nn.Embedding``: whether the gradient is a sparse tensor, of the rows that a batch touched alone.
            The optimizers of ``sparsekd.optim`` take it; a step then costs what the batch touches. ``torch.compile``
            leaves the graph for it.
        density: share of the entries to keep, in (0, 1], drawn at random in every row; or
        mask: bool ``[num_embeddings, embedding_dim]``.
    """

    dense_type = nn.Embedding

    def forward(self, input: Tensor, learns: Tensor | None = None) -> Tensor:
        """Rows ``[*input.shape, embedding_dim]``; ``learns``: a bool for each id: whether its gradient is wanted."""
        if learns is None and (table := self._again(input)) is not None:
            return DIRECT["embedding"](*table, input, self.embedding_dim, -1)
        if self._own_gradient(learns):
            return embedding_rows(input, self.table, self.embedding_dim, self.padding_idx, learns, self.sparse)
        rows = ops.embedding(input, self.table, self.embedding_dim, self.padding_idx)
        self._remember()
        return rows

    def shard(self, rank: int, ranks: int, *, average: bool = True) -> ShardedEmbedding:
        """The part of ``rank``, as a layer that asks the other ranks of the process group for rows of theirs.

        Every rank begins with the same table, of which it copies its rows, and may then delete it.
        """
        if not 0 <= rank < ranks <= self.num_embeddings:
            raise ValueError(
                f"SparseEmbedding.shard: expected 0 <= rank < ranks <= {self.num_embeddings} rows, got rank {rank} of "
                f"{ranks}"
            )
        part = rows_of_rank(self.num_embeddings, rank, ranks)
        sizes = count_kept(self.kept)
        begin, end = int(sizes[: part.start].sum()), int(sizes[: part.stop].sum())
        own = type(self).__new__(type(self))
        nn.Module.__init__(own)
        padding = self.padding_idx
        padding = padding - part.start if padding is not None and padding in part else None
        values = self.values.detach()[begin:end].clone()
        own._adopt(len(part), self.embedding_dim, padding, values, self.kept[part.start : part.stop].clone())
        own.values.requires_grad_(self.values.requires_grad)
        own.sparse = self.sparse
        return ShardedEmbedding(own.train(self.training), self.num_embeddings, rank, ranks, average)


class SparseEmbeddingBag(SparseTable):
    """``nn.EmbeddingBag`` whose rows keep some dimensions each: bags of ids to ``[bags, embedding_dim]``.

    Args:
        mode: "sum", "mean" or "max", as ``nn.EmbeddingBag``.
        include_last_offset: whether offsets end with the number of ids.
        The others as ``SparseEmbedding``.
    """

    dense_type = nn.EmbeddingBag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sparse: bool = False,
        density: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"SparseEmbeddingBag: mode must be 'sum', 'mean' or 'max', got {mode!r}")
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, device, dtype, sparse=sparse, density=density, mask=mask
        )
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        learns: Tensor | None = None,
    ) -> Tensor:
        """Bags ``[bags, embedding_dim]``; ``learns``: a bool for each id: whether its gradient is wanted."""
        ids, offsets, scale = bags_and_scale(self, input, offsets, per_sample_weights)
        known = self._again(ids) if learns is None and self.mode != "max" else None
        if known is not None and nobody_looks_on((offsets, scale)):
            padding = -1 if self.padding_idx is None else self.padding_idx
            return DIRECT["embedding_bag"](*known, ids, offsets, scale, self.embedding_dim, padding)
        own = self._own_gradient(learns)
        if learns is not None and learns.shape == input.shape:
            learns = learns.reshape(-1)
        if self.mode == "max":
            return self._maximum(ids, offsets, learns, own)
        if own:
            return embedding_bag_rows(
                ids, offsets, self.table, self.embedding_dim, scale, self.padding_idx, learns, self.sparse
            )
        pooled = ops.embedding_bag(ids, offsets, self.table, self.embedding_dim, scale, self.padding_idx)
        self._remember()
        return pooled

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"

    def _maximum(self, ids: Tensor, offsets: Tensor, learns: Tensor | None, own: bool) -> Tensor:
        """By torch's own bags over the rows that were looked up. Its padding_idx would fix their number in an export,
        so the padding is what every other row exceeds."""
        if own:
            rows = embedding_rows(ids, self.table, self.embedding_dim, self.padding_idx, learns, self.sparse)
        else:
            rows = ops.embedding(ids, self.table, self.embedding_dim, self.padding_idx)
        if not ids.shape[0]:
            return rows.new_zeros(offsets.shape[0] - 1, self.embedding_dim) + rows.sum()  # torch takes no 0 rows
        place = torch.arange(ids.shape[0], device=ids.device)
        if self.padding_idx is None:
            return F.embedding_bag(place, rows, offsets, mode="max", include_last_offset=True)
        real = ids != self.padding_idx
        rows = rows.masked_fill(~real[:, None], float("-inf"))
        pooled = F.embedding_bag(place, rows, offsets, mode="max", include_last_offset=True)
        before = torch.cat([real.new_zeros(1, dtype=torch.int64), real.long().cumsum(0)])[offsets]
        return pooled.masked_fill((before[1:] == before[:-1])[:, None], 0)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "mode": self.mode, "include_last_offset": self.include_last_offset}

    def _adopt_options(self, dense: Any) -> None:
        self.mode, self.include_last_offset = dense.mode, dense.include_last_offset
