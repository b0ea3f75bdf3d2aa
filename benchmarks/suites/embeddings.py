"""Embedding tables, forward and backward. There is no block-sparse embedding yet, so `ours` says so."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.contest import Case, Contest, Setup, agree

MISSING = "sparsekd.ops has no embedding, and sparsekd.nn no SparseEmbedding, yet"


def cases(setup: Setup) -> list[Case]:
    rows, dim, batch = (1_000, 16, 64) if setup.quick else (100_000, 64, 4096)
    id = f"lookup-{rows}x{dim}-n{batch}"
    return [Case(id, ("dense", "dense_sparse_grad", "ours"), lambda: _build(setup, rows, dim, batch))]


def _build(setup: Setup, rows: int, dim: int, batch: int) -> Contest:
    table = torch.randn(rows, dim, device=setup.device, requires_grad=True)
    ids = torch.randint(rows, (batch,), device=setup.device)
    gradient = torch.randn(batch, dim, device=setup.device)

    def call(sparse: bool) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(F.embedding(ids, table, sparse=sparse), table, gradient)[0]

    calls = {"dense": call(False), "dense_sparse_grad": call(True)}
    agree("embedding: sparse gradient", calls["dense_sparse_grad"]().to_dense(), calls["dense"]())
    return Contest(calls, {"ours": MISSING})
