"""Click models: the logit of a click by numbers and ids, as a DLRM-like network and as Wide&Deep.

`model(numeric [B, F], ids [B, C]) -> [B]`. Ids are any int64: each column has a table, whose rows are
hashed to or listed. Numbers are taken as sign(x) log(1 + |x|), at mean 0 and variance 1.

Names in this file: B batch, F numbers, C columns of ids, D dimensions of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..nn import SparseEmbedding

__all__ = ["DLRM", "HashedIds", "IdTable", "ListedIds", "WideAndDeep"]

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


class IdTable(nn.Module):
    """ids [B] -> [B, D]: a table whose rows ids are hashed to, or listed in.

    table: "dense" is `nn.Embedding`, "sparse" a `SparseEmbedding` that keeps `density` of its entries.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        ids: Literal["hashed", "listed"] = "hashed",
        table: Literal["dense", "sparse"] = "dense",
        density: float = 0.25,
        std: float = 0.05,
    ) -> None:
        super().__init__()
        if rows < 2 or dim < 1:
            raise ValueError(f"sparsekd.models.IdTable: expected 2 rows of 1 dimension or more, got {rows}, {dim}")
        if ids not in ("hashed", "listed") or table not in ("dense", "sparse"):
            raise ValueError(
                f"sparsekd.models.IdTable: ids must be hashed or listed, and the table dense or sparse, got {ids!r} "
                f"and {table!r}"
            )
        self.index = HashedIds(rows) if ids == "hashed" else ListedIds(rows)
        if table == "dense":
            self.table: nn.Module = nn.Embedding(rows, dim)
        else:
            self.table = SparseEmbedding(rows, dim, density=max(density, 1 / dim))
        with torch.no_grad():
            for parameter in self.table.parameters():
                parameter.mul_(std)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(self.index(ids))


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
        rows, dim: of every table. ids_by, table, density: as `ids`, `table` and `density` of `IdTable`.
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
        self.tables = nn.ModuleList(IdTable(rows, dim, ids_by, table, density) for _ in range(ids))
        count = ids + 1
        first, second = torch.triu_indices(count, count, 1)
        self.register_buffer("pairs", first * count + second, persistent=False)
        self.top = _layers(numeric + dim + len(first), list(top))
        self.head = nn.Linear(top[-1], 1)
        nn.init.zeros_(self.head.bias)

    pairs: Tensor

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        scaled = self.scaled(numeric)
        vectors = [self.bottom(scaled), *(table(ids[:, place]) for place, table in enumerate(self.tables))]
        stacked = torch.stack(vectors, dim=1)  # [B, C + 1, D]
        products = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1)[:, self.pairs]
        return self.head(self.top(torch.cat([scaled, vectors[0], products], dim=1))).squeeze(1)


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
        self.tables = nn.ModuleList(IdTable(rows, dim, ids_by, table, density) for _ in range(ids))
        self.wide = nn.ModuleList(IdTable(rows, 1, ids_by, "dense") for _ in range(ids))
        self.linear = nn.Linear(numeric, 1)
        self.deep = _layers(numeric + ids * dim, list(hidden))
        self.head = nn.Linear(hidden[-1], 1)
        nn.init.zeros_(self.head.bias)

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        scaled = self.scaled(numeric)
        rows = [table(ids[:, place]) for place, table in enumerate(self.tables)]
        wide = self.linear(scaled) + sum(table(ids[:, place]) for place, table in enumerate(self.wide))
        return (wide + self.head(self.deep(torch.cat([scaled, *rows], dim=1)))).squeeze(1)


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
