"""Single entries of an embedding table go and come back, by score, in packed form; optimizers follow.

    exchange_entries(table, moves, rows, scores, [optimizer])   # one update of dynamic sparse training, equal budget

Entries are ordered by the bits of their magnitude (float32), in two passes over pieces: what is needed beside the table
is one packed tensor, and never a dense one. Equal magnitudes go in the order in which they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..distributed import num_ranks
from ..nn.embedding_table import SparseTable
from ..ops.embedding import pack_mask, unpack_mask
from .surgery import state_slots

_PIECE = 1 << 20  # numbers that are looked at at once
_INFINITE = 0x7F800000  # bits of infinity
_LAST = 0x7FFFFFFF


@torch.no_grad()
def exchange_entries(
    table: SparseTable,
    moves: int,
    rows: Tensor,
    scores: Tensor,
    optimizers: Sequence[Optimizer] = (),
    *,
    weakest: Tensor | None = None,
    agree: bool = True,
) -> int:
    """Drop the ``moves`` entries of least magnitude and bring back as many absent ones of largest score.

    What comes back is zero, and so is its optimizer state; what stays keeps its bits. The number of entries does not
    change, the largest entry of every row stays, and what was just dropped does not come back.

    Args:
        moves: how many; fewer where fewer can go, or fewer absent entries have a score other than zero.
        rows: int64 ``[m]``, each once: the rows in which entries may come back.
        scores: float ``[m, dim]``: what absent entries of these rows are worth, such as the sum of their gradients
            since the last exchange (``ops.embedding_absent_``). Magnitudes count; kept entries are not looked at.
        optimizers: those whose state follows.
        weakest: ``[n]`` in place of the values: the least magnitudes of it go.
        agree: whether all ranks of a process group change what rank 0 does; not where each has rows of its own.

    Returns:
        how many were exchanged.

    Raises:
        ValueError: for scores of other shapes or not finite, rows twice or outside. Nothing has changed then.
        TypeError: for an optimizer whose state cannot follow.
    """
    _check_moves("exchange_entries", moves)
    _check_scores("exchange_entries", table, rows, scores)
    magnitudes = _magnitudes("exchange_entries", table, weakest)
    growth = _Growth(table, rows, scores)
    moves = min(moves, int((magnitudes < float("inf")).sum()), growth.available)
    kept = _without(table, magnitudes, moves)
    growth.add(kept, moves)
    rekeep(table, kept, optimizers, agree=agree)
    return moves


@torch.no_grad()
def drop_entries(
    table: SparseTable,
    count: int,
    optimizers: Sequence[Optimizer] = (),
    *,
    weakest: Tensor | None = None,
    agree: bool = True,
) -> None:
    """Drop the ``count`` entries of least magnitude; the largest of every row stays. See :func:`exchange_entries`."""
    _check_moves("drop_entries", count)
    magnitudes = _magnitudes("drop_entries", table, weakest)
    can_go = int((magnitudes < float("inf")).sum())
    if count > can_go:
        raise ValueError(
            f"sparsekd.pruning.drop_entries: {count} of {magnitudes.shape[0]} entries cannot go: one of every row "
            f"stays, so ask for {can_go} or fewer"
        )
    rekeep(table, _without(table, magnitudes, count), optimizers, agree=agree)


@torch.no_grad()
def grow_entries(
    table: SparseTable,
    count: int,
    rows: Tensor,
    scores: Tensor,
    optimizers: Sequence[Optimizer] = (),
    *,
    agree: bool = True,
) -> int:
    """Bring back the ``count`` absent entries of largest score, as zeros; fewer where fewer have one other than zero.

    Returns how many came back. See :func:`exchange_entries`.
    """
    _check_moves("grow_entries", count)
    _check_scores("grow_entries", table, rows, scores)
    growth = _Growth(table, rows, scores)
    count = min(count, growth.available)
    kept = table.kept.clone()
    growth.add(kept, count)
    rekeep(table, kept, optimizers, agree=agree)
    return count


@torch.no_grad()
def rekeep(table: SparseTable, kept: Tensor, optimizers: Sequence[Optimizer] = (), *, agree: bool = False) -> None:
    """Keep the entries of ``kept [rows, words]`` instead; new ones are zero, with fresh optimizer state.

    agree: as in :func:`exchange_entries`.
    """
    slots = list(state_slots(table.values, optimizers))
    if agree and num_ranks() > 1:
        dist.broadcast(kept, src=0)
    carry = table.rekeep_(kept)
    for slot in slots:
        slot.write(carry(slot.tensor, slot.fresh))


def _without(table: SparseTable, magnitudes: Tensor, count: int) -> Tensor:
    """``kept`` without the ``count`` entries of least magnitude."""
    bits = magnitudes.view(torch.int32)
    stays = torch.ones(bits.shape, dtype=torch.bool, device=bits.device)
    chosen = _Least(lambda: bits.split(_PIECE), count)
    for piece, of in zip(stays.split(_PIECE), bits.split(_PIECE), strict=True):
        piece &= ~chosen.take(of)
    return torch.ops.sparsekd.embedding_thin(*table.table[1:], stays)


class _Growth:
    """The absent entries of some rows, ordered by score."""

    def __init__(self, table: SparseTable, rows: Tensor, scores: Tensor) -> None:
        self._table, self._rows, self._scores = table, rows, scores
        self.available = sum(int((keys < _LAST).sum()) for _, keys in self._pieces())

    def add(self, kept: Tensor, count: int) -> None:
        """Name the best ``count`` in ``kept``."""
        chosen = _Least(lambda: (keys for _, keys in self._pieces()), count)
        for rows, keys in self._pieces():
            kept[rows] |= pack_mask(chosen.take(keys))

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, the smaller the better: int32 ``[rows, dim]``)."""
        dim, padding = self._table.embedding_dim, self._table.padding_idx
        size = max(1, _PIECE // dim)
        for rows, scores in zip(self._rows.split(size), self._scores.split(size), strict=True):
            magnitude = scores.float().abs().masked_fill(unpack_mask(self._table.kept[rows], dim), 0)
            if padding is not None:
                magnitude.masked_fill_((rows == padding)[:, None], 0)  # it learns nothing
            yield rows, (_INFINITE - magnitude.view(torch.int32)).masked_fill(magnitude == 0, _LAST)


class _Least:
    """The ``count`` least of many integers of 31 bits, equal ones in the order of the pieces."""

    def __init__(self, pieces: Callable[[], Iterable[Tensor]], count: int) -> None:
        self._last, self._ties = -1, 0
        if count == 0:
            return
        high, count = self._bucket((piece.flatten() >> 16 for piece in pieces()), count)
        lows = (piece[(piece >> 16) == high] & 0xFFFF for piece in pieces())
        low, self._ties = self._bucket(lows, count)
        self._last = high << 16 | low

    def take(self, piece: Tensor) -> Tensor:
        """Bool of its shape: what belongs to the least; to be asked for each piece once, in order."""
        chosen = piece < self._last
        if self._ties:
            ties = (piece == self._last).flatten().nonzero()[: self._ties, 0]
            chosen.view(-1)[ties] = True
            self._ties -= ties.shape[0]
        return chosen

    @staticmethod
    def _bucket(numbers: Iterable[Tensor], count: int) -> tuple[int, int]:
        """(the number of 16 bits at which ``count`` is reached, how many of it complete the count)."""
        sums = sum(torch.bincount(some, minlength=1 << 16) for some in numbers)
        assert isinstance(sums, Tensor)
        ends = sums.cumsum(0)
        at = int((ends < count).sum())
        return at, count - int(ends[at] - sums[at])


def _magnitudes(what: str, table: SparseTable, weakest: Tensor | None) -> Tensor:
    values = table.values.detach() if weakest is None else weakest
    if values.shape != table.values.shape or not values.is_floating_point():
        raise ValueError(
            f"sparsekd.pruning.{what}: weakest must be floats of shape {tuple(table.values.shape)}, one for each kept "
            f"entry, got {values.dtype} of shape {tuple(values.shape)}"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"sparsekd.pruning.{what}: expected finite numbers, got NaN or infinity among the "
            f"{'values of the table; load a checkpoint from before the divergence' if weakest is None else 'weakest'}"
        )
    return torch.ops.sparsekd.embedding_magnitudes(values, *table.table[1:])


def _check_moves(what: str, count: int) -> None:
    if count < 0:
        raise ValueError(f"sparsekd.pruning.{what}: expected a number of entries >= 0, got {count}")


def _check_scores(what: str, table: SparseTable, rows: Tensor, scores: Tensor) -> None:
    shape = (rows.shape[0], table.embedding_dim) if rows.dim() == 1 else None
    if rows.dtype != torch.int64 or shape is None or scores.shape != shape or not scores.is_floating_point():
        raise ValueError(
            f"sparsekd.pruning.{what}: expected int64 rows [m] and float scores [m, {table.embedding_dim}], got "
            f"{rows.dtype} {tuple(rows.shape)} and {scores.dtype} {tuple(scores.shape)}"
        )
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= table.num_embeddings):
        raise ValueError(f"sparsekd.pruning.{what}: rows must lie in [0, {table.num_embeddings}), got others")
    if rows.unique().shape[0] != rows.shape[0]:
        raise ValueError(f"sparsekd.pruning.{what}: every row must be named once; add the scores of equal rows first")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"sparsekd.pruning.{what}: expected finite scores, got NaN or infinity")
