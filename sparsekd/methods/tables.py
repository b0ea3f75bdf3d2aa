"""What methods that prune embedding tables share: one budget over several tables, entries that go and come, rewinding.

A budget counts entries over all tables together, and every row keeps one entry at least. What goes and what comes is
chosen over all of them too: an entry of a table of items competes with one of a table of users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distill import Distiller, Plain
from ..nn import SparseEmbedding
from ..nn.embedding_table import SparseTable
from ..ops.embedding import pack_mask
from ..pruning.entries import rekeep
from ..pruning.surgery import check_optimizer
from .base import Method, PruneEvent

__all__ = ["TableMethod", "budget_of_bytes", "bytes_of", "largest", "tables_of"]


def tables_of(model: Any) -> tuple[tuple[SparseEmbedding, SparseEmbedding], ...]:
    """The (users, items) pairs of a recommender.  TypeError where it has none, or others; ValueError where the two of a
    pair have other dimensions, or one table stands in two places."""
    pairs = getattr(model, "tables", None)
    if not pairs or not all(map(_is_pair, pairs)):
        raise TypeError(
            f"sparsekd.methods: {type(model).__name__} must have `tables`, pairs (users, items) of SparseEmbedding as "
            "in ((users, items),); make a recommender with density=, or convert its tables with "
            "SparseEmbedding.from_dense"
        )
    for users, items in pairs:
        if users.embedding_dim != items.embedding_dim:
            raise ValueError(
                f"sparsekd.methods: the tables of a pair in {type(model).__name__}.tables must have as many dimensions "
                f"as each other, got {users.embedding_dim} and {items.embedding_dim}"
            )
    tables = [table for pair in pairs for table in pair]
    if len(set(map(id, tables))) < len(tables):
        raise ValueError(
            f"sparsekd.methods: {type(model).__name__}.tables names one table in two places, and its entries would be "
            "counted twice; give each table once, in one pair"
        )
    return tuple(tuple(pair) for pair in pairs)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(t, SparseEmbedding) for t in pair)


def bytes_of(tables: Sequence[SparseTable]) -> int:
    """What tables take in memory: values, masks of kept dimensions and where rows begin."""
    return sum(t.numel() * t.element_size() for table in tables for t in table.table)


def budget_of_bytes(tables: Sequence[SparseTable], number: float) -> int:
    """Entries that fit into `number` bytes, beside masks and row positions.  ValueError for fewer than one a row."""
    size = tables[0].values.element_size()
    rows = sum(table.num_embeddings for table in tables)
    fixed = bytes_of(tables) - sum(table.values.numel() * size for table in tables)
    entries = int(number - fixed) // size
    if entries < rows:
        raise ValueError(
            f"sparsekd.methods: {number:.0f} bytes hold {max(entries, 0)} entries beside {fixed} bytes of masks and "
            f"positions, fewer than the {rows} rows; every row keeps one at least, so give {fixed + rows * size}"
        )
    return min(entries, sum(table.num_embeddings * table.embedding_dim for table in tables))


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the largest entry of every row and of the largest others, `count` over all [rows, dim] together."""
    masks = [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    for mask, score in zip(masks, scores, strict=True):
        mask.scatter_(1, score.argmax(1, keepdim=True), True)
    rest = count - sum(mask.shape[0] for mask in masks)
    flat = torch.cat(
        [score.masked_fill(mask, float("-inf")).flatten() for mask, score in zip(masks, scores, strict=True)]
    )
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(rest).indices] = True
    parts = chosen.split([score.numel() for score in scores])
    return [mask | part.view_as(mask) for mask, part in zip(masks, parts, strict=True)]


class TableMethod(Method):
    """A method over the tables of a recommender: `student.tables`, pairs of SparseEmbedding."""

    def __init__(self, distiller: Distiller | Plain) -> None:
        super().__init__(distiller)
        self.pairs = tables_of(self.student)
        self.tables = [table for pair in self.pairs for table in pair]
        self.optimizers: list[Optimizer] = []

    def attach(self, optimizer: Optimizer) -> None:
        self.optimizers.append(check_optimizer(optimizer))

    @property
    def num_kept(self) -> int:
        """Entries over all tables."""
        return sum(table.values.shape[0] for table in self.tables)

    @property
    def num_entries(self) -> int:
        """Entries over all tables if they were dense."""
        return sum(table.num_embeddings * table.embedding_dim for table in self.tables)

    def level(self, epoch: int) -> float:
        """The share of the entries that the method means to keep during an epoch."""
        return round(self.num_kept / self.num_entries, 6)

    def drop_to(self, count: int, scores: Sequence[Tensor] | None = None) -> None:
        """Keep the `count` entries of largest magnitude, or of largest `scores [n]` of each table; survivors keep their
        values and optimizer state."""
        packed = [table.values.detach().abs() for table in self.tables] if scores is None else scores
        spread = []
        for table, values in zip(self.tables, packed, strict=True):
            full = values.new_full((table.num_embeddings, table.embedding_dim), -1.0)
            full[table.mask()] = values.clamp(min=0)
            spread.append(full)
        for table, mask in zip(self.tables, largest(spread, count), strict=True):
            rekeep(table, pack_mask(mask), self.optimizers)

    def forget_moments(self) -> None:
        """Optimizer state of the tables as if they had never been stepped."""
        for optimizer in self.optimizers:
            for table in self.tables:
                optimizer.state.pop(table.values, None)

    def event(self, boundary: int, stage: str, rewound: bool) -> PruneEvent:
        removed = 1 - self.num_kept / self.num_entries
        return PruneEvent(boundary, stage, removed, removed, self.num_kept, 0, rewound)
