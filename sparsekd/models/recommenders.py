"""Recommenders by tables of users and items, dense or sparse: MF, NeuMF and LightGCN, all trained on pairs.

    model = models.MF(task.sizes, dim=64)                         # nn.Embedding
    model = models.MF(task.sizes, dim=64, density=0.1)            # nn.SparseEmbedding: a tenth of the entries, packed
    model = models.LightGCN(task.sizes, (task.train.users, task.train.items), density=0.1)

`model(users [B], items [B], negatives [B, K])` returns the scores of the items [B] and of the negatives [B, K], and
`model.score_items(users [U])` those of all items [U, I]: what `goals.Ranking` asks for. `model.tables` are the tables,
each of users beside that of items with the same dimensions. With `sparse=True` MF and NeuMF have gradients of the rows
of a batch alone, for an optimizer that takes such: `sparsekd.optim` for packed tables, `torch.optim.SparseAdam` for
dense ones.

Names in this file: B pairs, K negatives, U users, I items, D dimensions, N = U + I.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import pairs
from ..nn import SparseEmbedding

__all__ = ["MF", "LightGCN", "NeuMF", "Recommender"]

START = 0.1  # deviation of a table's entries before training, as in LightGCN's code
_PIECE = 1 << 14  # rows of a table that are looked up at once
_AT_ONCE = 1 << 22  # numbers of an intermediate result


def table(rows: int, dim: int, density: float | None, sparse: bool = False) -> nn.Embedding | SparseEmbedding:
    """A dense table, or one that keeps the share `density` of its entries; they start from N(0, 0.1)."""
    made = (
        nn.Embedding(rows, dim, sparse=sparse)
        if density is None
        else SparseEmbedding(rows, dim, density=density, sparse=sparse)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(START)
    return made


class Recommender(nn.Module):
    """What MF, NeuMF and LightGCN share: a table of users and one of items.

    Args:
        sizes: {"users": how many, "items": how many}, as ``Task.sizes`` has it.
        dim: dimensions of every table.
        density: None makes dense tables, ``nn.Embedding``; a share in (0, 1] ``sparsekd.nn.SparseEmbedding`` that keep
            so much of their entries, at least one a row.
        sparse: gradients of the rows of a batch alone.
    """

    def __init__(self, sizes: Mapping[str, int], dim: int, density: float | None, sparse: bool = False) -> None:
        super().__init__()
        self.num_users, self.num_items, self.dim = sizes["users"], sizes["items"], dim
        self.dim_of_dense = dim  # a smaller model that stands for a larger one is counted against that
        self.users = table(self.num_users, dim, density, sparse)
        self.items = table(self.num_items, dim, density, sparse)

    @property
    def tables(self) -> tuple[tuple[Any, Any], ...]:
        """(users, items) of every pair of tables whose dimensions belong together."""
        return ((self.users, self.items),)

    def forward(self, users: Tensor, items: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B] of ``items [B]`` and [B, K] of ``negatives [B, K]`` for ``users [B]``: what ``Ranking`` learns."""
        raise NotImplementedError

    def score_items(self, users: Tensor) -> Tensor:
        """Scores [U, items] of all items for ``users [U]``."""
        raise NotImplementedError


class MF(Recommender):
    """Matrix factorisation: the score is the product of two rows (BPR-MF: Rendle et al., UAI 2009)."""

    def __init__(
        self, sizes: Mapping[str, int], dim: int = 64, density: float | None = None, sparse: bool = False
    ) -> None:
        super().__init__(sizes, dim, density, sparse)

    def forward(self, users: Tensor, items: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        return _products(self.users(users), self.items(items), self.items(negatives))

    def score_items(self, users: Tensor) -> Tensor:
        mine = self.users(users)
        pieces = _all(self.num_items, users).split(_PIECE)
        if len(pieces) == 1:
            return mine @ self.items(pieces[0]).T
        return torch.cat([mine @ self.items(some).T for some in pieces], 1)


class NeuMF(Recommender):
    """A product of two rows and a small network on two others, summed with learnt weights (He et al., Neural
    Collaborative Filtering, WWW 2017, equation 12); trained on pairs as the others here, not on single labels."""

    def __init__(
        self, sizes: Mapping[str, int], dim: int = 64, density: float | None = None, sparse: bool = False
    ) -> None:
        super().__init__(sizes, dim, density, sparse)
        self.mlp_users = table(self.num_users, dim, density, sparse)
        self.mlp_items = table(self.num_items, dim, density, sparse)
        self.left, self.right = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.ReLU(), nn.Linear(dim, dim // 2), nn.ReLU())
        self.head = nn.Linear(dim + dim // 2, 1, bias=False)

    @property
    def tables(self) -> tuple[tuple[Any, Any], ...]:
        return (self.users, self.items), (self.mlp_users, self.mlp_items)

    def forward(self, users: Tensor, items: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        candidates = torch.cat([items[:, None], negatives], 1)
        of_items = self.items(candidates), self.right(self.mlp_items(candidates))
        mine, my_half = (side[:, None] for side in self._of_users(users))
        scores = self._scores((mine, my_half), of_items)
        return scores[:, 0], scores[:, 1:]

    def score_items(self, users: Tensor) -> Tensor:
        size = max(1, _AT_ONCE // (self.dim * self.num_items))
        ids = _all(self.num_items, users)
        of_items = self.items(ids), self.right(self.mlp_items(ids))
        scores = []
        for block in users.split(size):
            mine, my_half = (side[:, None] for side in self._of_users(block))
            scores.append(self._scores((mine, my_half), of_items))
        return torch.cat(scores)

    def _of_users(self, users: Tensor) -> tuple[Tensor, Tensor]:
        return self.users(users), self.left(self.mlp_users(users))

    def _scores(self, of_users: tuple[Tensor, Tensor], of_items: tuple[Tensor, Tensor]) -> Tensor:
        """The first layer of the network is a sum of two halves, so that each row is multiplied once."""
        (mine, my_half), (theirs, their_half) = of_users, of_items
        return self.head(torch.cat([mine * theirs, self.mlp(my_half + their_half)], -1)).squeeze(-1)


class LightGCN(Recommender):
    """Rows averaged over neighbours of the graph of interactions (He et al., LightGCN, SIGIR 2020, equations 3 and 4).

    Args:
        interactions: who chose what, in training: (users [M], items [M]); they are the graph.
        layers: times that every row becomes the average of its neighbours.
        combine: "mean" of the rows before and after each time, as in LightGCN's code, or their "sum".
        sizes, dim, density: as of ``Recommender``.

    One propagation serves a batch, whatever its size: large batches cost little more than small ones. In evaluation it
    is kept for as long as the tables stay as they are. To tell, every call compares them with a copy, which takes as
    much memory again; `sparsekd.recommend.save` writes what serves single users at once.
    """

    graph_begin: Tensor
    graph_neighbours: Tensor
    graph_weights: Tensor

    def __init__(
        self,
        sizes: Mapping[str, int],
        interactions: tuple[Tensor, Tensor],
        dim: int = 64,
        density: float | None = None,
        layers: int = 3,
        combine: str = "mean",
    ) -> None:
        super().__init__(sizes, dim, density)
        if combine not in ("mean", "sum"):
            raise ValueError(f"sparsekd.models.LightGCN: combine must be 'mean' or 'sum', got {combine!r}")
        if layers < 1:
            raise ValueError(f"sparsekd.models.LightGCN: layers must be at least 1, got {layers}")
        self.layers, self.combine = layers, combine
        users, items = interactions
        begin, neighbours, weights = _graph(users.cpu(), items.cpu(), self.num_users, self.num_items)
        # Three plain buffers: a sparse tensor would not go into a state dict of safetensors. Made anew with the model.
        self.register_buffer("graph_begin", begin, persistent=False)
        self.register_buffer("graph_neighbours", neighbours, persistent=False)
        self.register_buffer("graph_weights", weights, persistent=False)
        self._kept: tuple[list[Tensor], Tensor] | None = None

    def forward(self, users: Tensor, items: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.propagated()
        return _products(rows[users], rows[self.num_users + items], rows[self.num_users + negatives])

    def score_items(self, users: Tensor) -> Tensor:
        rows = self.propagated()
        return rows[users] @ rows[self.num_users :].T

    def propagated(self) -> Tensor:
        """The rows that are multiplied, users before items: [N, D]."""
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return self._propagated()
        now = [*self.users.state_dict().values(), *self.items.state_dict().values()]
        # By value: the fused optimizers of torch change parameters without counting up their versions.
        if self._kept is None or not all(map(_same, self._kept[0], now)):
            self._kept = [tensor.clone() for tensor in now], self._propagated()
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}

    def _propagated(self) -> Tensor:
        ids = [_all(rows, self.graph_begin) for rows in (self.num_users, self.num_items)]
        rows = torch.cat([self.users(ids[0]), self.items(ids[1])])
        graph = (self.graph_begin, self.graph_neighbours, self.graph_weights)
        total = rows
        for _ in range(self.layers):
            rows = _Averaged.apply(*graph, rows)
            total = total + rows
        return total / (self.layers + 1) if self.combine == "mean" else total


class _Averaged(torch.autograd.Function):
    """graph @ rows of a symmetric graph, whose gradient is the same product. Summed as bags of weighted rows, which
    torch does faster on a CPU than the product of a sparse matrix."""

    @staticmethod
    def forward(ctx: Any, begin: Tensor, neighbours: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        ctx.graph = begin, neighbours, weights
        return _weighted_sums(begin, neighbours, weights, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor]:
        begin, neighbours, weights = ctx.graph
        return None, None, None, _weighted_sums(begin, neighbours, weights, grads[0].contiguous())


def _weighted_sums(begin: Tensor, neighbours: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Of the neighbours of every row."""
    return nn.functional.embedding_bag(
        neighbours, rows, begin, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _graph(users: Tensor, items: Tensor, num_users: int, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """(begin [N + 1], neighbours, weights) in CSR form: 1 / sqrt(degree of both ends) for every pair, both ways."""
    size = num_users + num_items
    users, items = pairs.checked("models.LightGCN", users, items, num_users, num_items)
    left, right = pairs.once(users, items, num_items)
    right = right + num_users
    ends = torch.unique(torch.cat([left * size + right, right * size + left]))
    row, column = ends // size, ends % size
    degree = torch.bincount(row, minlength=size)
    begin = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    weights = (degree[row].double() * degree[column].double()).rsqrt().float()
    return begin, column, weights


def _same(left: Tensor, right: Tensor) -> bool:
    return left.device == right.device and left.dtype == right.dtype and torch.equal(left, right)


def _products(mine: Tensor, chosen: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B] and [B, K] of rows [B, D], [B, D] and [B, K, D]."""
    return (mine * chosen).sum(1), (others * mine[:, None]).sum(2)


def _all(rows: int, like: Tensor) -> Tensor:
    return torch.arange(rows, device=like.device)
