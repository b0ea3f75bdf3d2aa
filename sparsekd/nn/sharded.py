"""A packed table whose rows are spread over the ranks of a process group, which exchange lookups and gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .embedding_table import SparseTable

__all__ = ["ShardedEmbedding", "rows_of_rank"]


def rows_of_rank(rows: int, rank: int, ranks: int) -> range:
    """The rows that a rank keeps: neighbouring ones, as evenly as possible."""
    return range(rows * rank // ranks, rows * (rank + 1) // ranks)


class ShardedEmbedding(nn.Module):
    """Rows of a table of which this rank keeps its part, ``own``; see ``SparseEmbedding.shard``.

    Every rank must call it in every step, with ids of its own (also none), and run the backward pass. Gradients of a
    row arrive from all ranks and are summed at its owner. A loss that every rank averages over its own batch alone
    wants them divided by the number of ranks: ``average=True`` does so, as averaging gradients does for other layers.
    """

    def __init__(self, own: SparseTable, num_embeddings: int, rank: int, ranks: int, average: bool = True) -> None:
        super().__init__()
        part = rows_of_rank(num_embeddings, rank, ranks)
        if own.num_embeddings != len(part):
            raise ValueError(
                f"ShardedEmbedding: rank {rank} of {ranks} keeps {len(part)} of {num_embeddings} rows, got a table of "
                f"{own.num_embeddings}"
            )
        self.own, self.num_embeddings, self.embedding_dim = own, num_embeddings, own.embedding_dim
        self.rank, self.ranks, self.first, self.average = rank, ranks, part.start, average

    def forward(self, input: Tensor) -> Tensor:
        """``[...]`` ids of the whole table to ``[..., embedding_dim]``."""
        if input.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ShardedEmbedding: ids must be int32 or int64, got {input.dtype}; use .long()")
        ids = input.reshape(-1).long()
        outside = (ids < 0) | (ids >= self.num_embeddings)
        # All ranks must hear of it, or the others would wait for an exchange that never comes.
        wrong = torch.tensor([int(ids[outside][0]) if bool(outside.any()) else -(2**62)], device=ids.device)
        dist.all_reduce(wrong, dist.ReduceOp.MAX)
        if int(wrong) != -(2**62):
            raise IndexError(f"ShardedEmbedding: ids must lie in [0, {self.num_embeddings}), a rank got {int(wrong)}")
        starts = torch.tensor([rows_of_rank(self.num_embeddings, r, self.ranks).start for r in range(1, self.ranks)])
        owner = torch.bucketize(ids, starts.to(ids.device), right=True)
        order = owner.argsort(stable=True)
        sent = torch.bincount(owner, minlength=self.ranks)
        asked = torch.empty_like(sent)
        dist.all_to_all_single(asked, sent)
        to, back = sent.tolist(), asked.tolist()
        theirs = ids.new_empty(sum(back))
        dist.all_to_all_single(theirs, ids[order], back, to)
        rows = _Exchange.apply(self.own(theirs - self.first), to, back, self.ranks if self.average else 1)
        found = torch.empty_like(rows).index_copy(0, order, rows)
        return found.view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        part = rows_of_rank(self.num_embeddings, self.rank, self.ranks)
        return f"{self.num_embeddings}, {self.embedding_dim}, rows {part.start} to {part.stop - 1}"


class _Exchange(torch.autograd.Function):
    """Rows to the ranks that asked for them; their gradients back to where the rows are."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to: list[int], back: list[int], share: int) -> Tensor:
        ctx.to, ctx.back, ctx.share = to, back, share
        return _all_to_all(rows, to, back)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _all_to_all(grad, ctx.back, ctx.to) / ctx.share, None, None, None


def _all_to_all(rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), received, sent)
    return out
