"""Embedding tables: lookups forward and backward, bags, and the best rows for queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.contest import Case, Contest, Setup, agree
from sparsekd.nn import SparseEmbedding
from sparsekd.ops import embedding_bag


def cases(setup: Setup) -> list[Case]:
    found = []
    rows, dim, batch = (1_000, 16, 64) if setup.quick else (100_000, 64, 4096)
    for density in setup.densities:
        table = f"{rows}x{dim}-d{density:g}"
        learning = ("dense", "dense_sparse_grad", "ours")
        found.append(Case(f"learn-{table}-n{batch}", learning, partial(_learn, setup, rows, dim, batch, density)))
        found.append(Case(f"bag-{table}-n{batch}", ("dense", "ours"), partial(_bag, setup, rows, dim, batch, density)))
        found.append(Case(f"top20-{table}-n64", ("dense", "ours"), partial(_top, setup, rows, dim, density)))
    return found


def _table(setup: Setup, rows: int, dim: int, density: float) -> tuple[SparseEmbedding, Tensor]:
    """A packed table with sparse gradients, and the same rows dense."""
    packed = SparseEmbedding(rows, dim, density=density, device=setup.device, sparse=True)
    return packed, packed.rows().requires_grad_()


def _learn(setup: Setup, rows: int, dim: int, batch: int, density: float) -> Contest:
    packed, table = _table(setup, rows, dim, density)
    ids = torch.randint(rows, (batch,), device=setup.device)
    gradient = torch.randn(batch, dim, device=setup.device)

    def call(sparse: bool) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(F.embedding(ids, table, sparse=sparse), table, gradient)[0]

    def ours() -> Tensor:
        return torch.autograd.grad(packed(ids), packed.values, gradient)[0]

    calls = {"dense": call(False), "dense_sparse_grad": call(True), "ours": ours}
    expected = calls["dense"]()
    agree("embedding: sparse gradient", calls["dense_sparse_grad"]().to_dense(), expected)
    agree("embedding: gradient of a packed table", ours().to_dense(), expected[packed.mask()])
    return Contest(calls)


def _bag(setup: Setup, rows: int, dim: int, batch: int, density: float) -> Contest:
    packed, table = _table(setup, rows, dim, density)
    ids = torch.randint(rows, (batch,), device=setup.device)
    offsets = torch.arange(0, batch + 1, 32, device=setup.device)

    @torch.no_grad()
    def dense() -> Tensor:
        return F.embedding_bag(ids, table, offsets, mode="sum", include_last_offset=True)

    @torch.no_grad()
    def ours() -> Tensor:
        return embedding_bag(ids, offsets, packed.table, dim)

    agree("embedding: bags of a packed table", ours(), dense())
    return Contest({"dense": dense, "ours": ours})


def _top(setup: Setup, rows: int, dim: int, density: float) -> Contest:
    packed, table = _table(setup, rows, dim, density)
    queries = torch.randn(64, dim, device=setup.device)

    @torch.no_grad()
    def dense() -> tuple[Tensor, Tensor]:
        scores, ids = (queries @ table.T).topk(20)
        return scores, ids

    def ours() -> tuple[Tensor, Tensor]:
        return packed.top_k(queries, 20)

    agree("embedding: best scores of a packed table", ours()[0], dense()[0])
    return Contest({"dense": dense, "ours": ours})
