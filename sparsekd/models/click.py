"""Click models: the logit of a click by numbers and ids, as a DLRM-like network and as Wide&Deep.

`model(numeric [B, F], ids [B, C]) -> [B]`. Ids are any int64: each column has rows in a table, which are
hashed to or listed. Numbers are taken as sign(x) log(1 + |x|), at mean 0 and variance 1.

Names in this file: B batch, F numbers, C columns of ids, D dimensions of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..nn import SparseEmbedding

__all__ = ["DLRM", "HashedIds", "ListedIds", "WideAndDeep"]

_EMPTY = torch.iinfo(torch.int64).max  # no id: sorts behind all others


class HashedIds(nn.Module):
    """int64 ids of any size -> rows 0 .. rows - 1. Ids never seen have a row as all others do, which they may share."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        # Multiplication wraps; the upper bits of the product depend on all bits of the id.
        mixed = ids * -7_046_029_254_386_353_131
        return ((mixed >> 24) ^ mixed).remainder(self.rows)

    def extra_repr(self) -> str:
        return f"rows={self.rows}"


class ListedIds(nn.Module):
    """int64 ids -> a row of their own, in the order in which they come in training; row 0 is that of all others.

    An id is entered when it is first seen in training mode. Once all rows are given, further ids share row 0.
    State: `keys`, the ids known in rising order, and `places`, the row of each.
    """

    keys: Tensor
    places: Tensor
    known: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.register_buffer("keys", torch.full((rows,), _EMPTY))
        self.register_buffer("places", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("known", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        if self.training:
            self.enter(ids)
        at = torch.searchsorted(self.keys, ids.contiguous()).clamp(max=self.rows - 1)
        return torch.where(self.keys[at] == ids, self.places[at], 0)

    @torch.no_grad()
    def enter(self, ids: Tensor) -> None:
        """Give each new id a row, as long as there are any."""
        known = int(self.known)
        if known == self.rows - 1:
            return
        distinct, first = _first_places(ids.flatten())
        keys = self.keys[:known]
        at = torch.searchsorted(keys, distinct).clamp(max=max(known - 1, 0))
        is_new = keys[at] != distinct if known else torch.ones_like(distinct, dtype=torch.bool)
        new = distinct[is_new][first[is_new].argsort()][: self.rows - 1 - known]
        if not len(new):
            return
        rows = torch.arange(known + 1, known + 1 + len(new), device=ids.device)
        merged, order = torch.cat([keys, new]).sort()
        self.keys[: len(merged)] = merged
        self.places[: len(merged)] = torch.cat([self.places[:known], rows])[order]
        self.known.fill_(len(merged))

    def extra_repr(self) -> str:
        return f"rows={self.rows}, known={int(self.known)}"


def _first_places(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids in rising order, and the place at which each stands first."""
    distinct, place = ids.unique(return_inverse=True)
    first = torch.full_like(distinct, len(ids))
    return distinct, first.scatter_reduce(0, place, torch.arange(len(ids), device=ids.device), "amin")


class IdRows(nn.Module):
    """ids [B, C] -> rows [B, C] of one table for all columns, in which each column has `rows` rows."""

    offsets: Tensor

    def __init__(self, columns: int, rows: int, by: Literal["hashed", "listed"]) -> None:
        super().__init__()
        if by not in ("hashed", "listed"):
            raise ValueError(f"sparsekd.models: ids must be hashed or listed, got {by!r}")
        if rows < 2:
            raise ValueError(f"sparsekd.models: a column of ids needs 2 rows or more, got {rows}")
        self.hashed = HashedIds(rows) if by == "hashed" else None
        self.lists = nn.ModuleList(ListedIds(rows) for _ in range(columns if by == "listed" else 0))
        self.register_buffer("offsets", torch.arange(columns) * rows, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        if self.hashed is not None:
            return self.hashed(ids) + self.offsets
        return torch.stack([index(ids[:, place]) for place, index in enumerate(self.lists)], 1) + self.offsets


def table_of(
    rows: int, dim: int, kind: Literal["dense", "sparse"] = "dense", density: float = 0.25, std: float = 0.05
) -> nn.Module:
    """A table of ids: `nn.Embedding`, or a `SparseEmbedding` that keeps `density` of its entries."""
    if kind not in ("dense", "sparse"):
        raise ValueError(f"sparsekd.models: a table must be dense or sparse, got {kind!r}")
    table: Any = (
        nn.Embedding(rows, dim) if kind == "dense" else SparseEmbedding(rows, dim, density=max(density, 1 / dim))
    )
    with torch.no_grad():
        for parameter in table.parameters():
            parameter.mul_(std)
    return table


class Scaled(nn.Module):
    """sign(x) log(1 + |x|) at mean 0 and variance 1: [B, F] -> [B, F]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.sign() * x.abs().log1p())


class DLRM(nn.Module):
    """Numbers through a network, ids through tables, dot products of all pairs of these, a network on top (Naumov et
    al., arXiv 1906.00091); the numbers go to the top one by themselves, too.

    Args:
        numeric, ids: F and C, the columns of the inputs.
        rows, dim: of every column of ids: so many rows of so many numbers.
        ids_by: "hashed", or "listed" as `ListedIds`.
        table: "dense", or "sparse", which keeps `density` of the entries (`SparseEmbedding`).
        bottom, top: widths of the hidden layers.
    """

    not_pruned: tuple[str, ...] = ("head",)

    def __init__(
        self,
        numeric: int,
        ids: int,
        *,
        rows: int = 20_000,
        dim: int = 16,
        ids_by: Literal["hashed", "listed"] = "hashed",
        table: Literal["dense", "sparse"] = "dense",
        density: float = 0.25,
        bottom: Sequence[int] = (256,),
        top: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        _check_inputs("DLRM", numeric, ids)
        self.scaled = Scaled(numeric)
        self.bottom = _layers(numeric, [*bottom, dim])
        self.rows = IdRows(ids, rows, ids_by)
        self.table = table_of(ids * rows, dim, table, density)
        count = ids + 1
        first, second = torch.triu_indices(count, count, 1)
        self.register_buffer("pairs", first * count + second, persistent=False)
        self.top = _layers(numeric + dim + len(first), list(top))
        self.head = nn.Linear(top[-1], 1)
        nn.init.zeros_(self.head.bias)

    pairs: Tensor

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        scaled = self.scaled(numeric)
        bottom = self.bottom(scaled)
        vectors = torch.cat([bottom.unsqueeze(1), self.table(self.rows(ids))], dim=1)  # [B, C + 1, D]
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)[:, self.pairs]
        return self.head(self.top(torch.cat([scaled, bottom, products], dim=1))).squeeze(1)


class WideAndDeep(nn.Module):
    """A linear model of numbers and ids, plus a network on the numbers and the rows of the ids' tables (Cheng et al.,
    arXiv 1606.07792). Arguments as `DLRM`; `hidden` are the widths of the network."""

    not_pruned: tuple[str, ...] = ("linear", "head")

    def __init__(
        self,
        numeric: int,
        ids: int,
        *,
        rows: int = 20_000,
        dim: int = 16,
        ids_by: Literal["hashed", "listed"] = "hashed",
        table: Literal["dense", "sparse"] = "dense",
        density: float = 0.25,
        hidden: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        _check_inputs("WideAndDeep", numeric, ids)
        self.scaled = Scaled(numeric)
        self.rows = IdRows(ids, rows, ids_by)
        self.table = table_of(ids * rows, dim, table, density)
        self.wide = table_of(ids * rows, 1)
        self.linear = nn.Linear(numeric, 1)
        self.deep = _layers(numeric + ids * dim, list(hidden))
        self.head = nn.Linear(hidden[-1], 1)
        nn.init.zeros_(self.head.bias)

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        scaled = self.scaled(numeric)
        rows = self.rows(ids)
        wide = self.linear(scaled) + self.wide(rows).sum(1)
        return (wide + self.head(self.deep(torch.cat([scaled, self.table(rows).flatten(1)], dim=1)))).squeeze(1)


def _check_inputs(kind: str, numeric: int, ids: int) -> None:
    if numeric < 1 or ids < 1:
        raise ValueError(
            f"sparsekd.models.{kind}: expected at least one number and one column of ids, got {numeric} and {ids}; a "
            "stream without numbers can be given a column of ones"
        )


def _layers(inputs: int, widths: list[int]) -> nn.Sequential:
    parts: list[Any] = []
    for width in widths:
        parts += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*parts)
