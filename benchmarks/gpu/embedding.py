"""Packed embedding tables on a GPU beside dense ones of torch: lookups, bags, gradients and the best rows for a query.

python -m benchmarks.gpu.embedding --out DIR

Each answer is held against that of the dense table before it is timed. `gigabytes_per_second` counts what must move:
the kept values and bits of the rows that are named, and what is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.embedding import zipf
from benchmarks.gpu import common
from benchmarks.gpu.rows import Rows
from sparsekd.backends.cuda import embedding as ours
from sparsekd.nn import SparseEmbedding
from sparsekd.ops.embedding import Table, embedding_reference

DENSITY = 0.1
K = 20
ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the largest value


class Sizes(NamedTuple):
    rows: int
    ids: int
    bags: int  # of as many ids as make `ids` in all
    queries: int
    ranked: int  # rows among which the best are looked for


GPU = Sizes(1_000_000, 131_072, 4096, 256, 100_000)
REHEARSAL = Sizes(200, 40, 4, 3, 130)


class Contest(NamedTuple):
    """A call of ours, what torch does with the dense table, and the bytes that ours must move.

    kept: which numbers of the dense answer are those of ours; None: all.
    """

    op: str
    ours: Callable[[], Any]
    dense: Callable[[], Any]
    bytes: float
    kept: Tensor | None = None


def table_of(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Table, Tensor]:
    """A packed table and the dense one that it stands for, which plain torch made of a sample of it, too."""
    layer = SparseEmbedding(rows, dim, density=DENSITY, dtype=dtype).to(device)
    table = Table(*(t.detach() for t in layer.table))
    dense = ours.embedding(*table, torch.arange(rows, device=device), dim, -1)
    some = torch.arange(0, rows, max(rows // 1000, 1), device=device)
    if not torch.equal(dense[some], embedding_reference(*table, some, dim, -1)):
        raise RuntimeError(f"gpu.embedding: rows of {dtype} and {dim} dimensions are not those of the reference")
    return table, dense


def contests(sizes: Sizes, dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Contest]:
    table, weight = table_of(sizes.rows, dim, dtype, device)
    values, index = table.values, (table.kept, table.base, table.counts)
    size, kept = values.element_size(), DENSITY * dim
    read = sizes.ids * (kept * size + dim / 8)
    ids, often = torch.randint(sizes.rows, (sizes.ids,), device=device), zipf(sizes.rows, sizes.ids).to(device)
    yield Contest(
        "lookup",
        lambda: ours.embedding(values, *index, ids, dim, -1),
        lambda: F.embedding(ids, weight),
        read + sizes.ids * dim * size,
    )
    offsets = torch.linspace(0, sizes.ids, sizes.bags + 1, device=device).long()
    yield Contest(
        "bag",
        lambda: ours.embedding_bag(values, *index, ids, offsets, None, dim, -1),
        lambda: F.embedding_bag(ids, weight, offsets, mode="sum", include_last_offset=True),
        read + sizes.bags * dim * size,
    )
    grad = torch.randn(sizes.ids, dim, device=device).to(dtype)
    mask = ours.embedding(torch.ones_like(values), *index, torch.arange(sizes.rows, device=device), dim, -1) != 0
    yield Contest(
        "gradient",
        lambda: ours.embedding_grad(grad, *index, often, None, None, values.shape[0], -1),
        lambda: torch.ops.aten.embedding_dense_backward(grad, often, sizes.rows, -1, False),
        sizes.ids * dim * size + values.shape[0] * size,
        mask,
    )


def rankings(sizes: Sizes, dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Contest]:
    table, weight = table_of(sizes.ranked, dim, dtype, device)
    for queries in (1, sizes.queries):
        query = torch.randn(queries, dim, device=device).to(dtype)
        yield Contest(
            f"top {K} of {queries}",
            lambda query=query: ours.embedding_top_k(query, *table, K, None, None)[0],  # type: ignore[misc]
            lambda query=query: (query @ weight.T).topk(K).values,  # type: ignore[misc]
            sizes.ranked * (DENSITY * dim * weight.element_size() + dim / 8),
        )


def measure(contest: Contest, dtype: torch.dtype) -> dict[str, Any]:
    got, want = contest.ours().float(), contest.dense().float()
    want = want if contest.kept is None else want[contest.kept]
    error = ((got - want).abs().max() / want.abs().max()).item()
    if not error <= ERROR[dtype]:
        raise RuntimeError(f"gpu.embedding: {contest.op} of {dtype} is wrong by {error:.3g} of its largest value")
    dense_us, us = common.medians([contest.dense, contest.ours])
    moved = {"gigabytes_per_second": contest.bytes / us * 1e-3}
    return {"us": us, "dense_us": dense_us, "speedup": dense_us / us, "error": error, **moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/gpu")
    options = parser.parse_args()
    device = common.start(options.rehearse)
    torch.manual_seed(0)
    sizes = REHEARSAL if options.rehearse else GPU
    rows, before = Rows(Path(options.out) / "rows" / "embedding.jsonl"), common.facts(device)
    for dim in (64,) if options.rehearse else (64, 128):
        for dtype in (torch.float32, torch.float16 if options.rehearse else torch.bfloat16):
            for made in (contests, rankings):
                for contest in made(sizes, dim, dtype, device):
                    case = {"op": contest.op, "dim": dim, "dtype": str(dtype).removeprefix("torch.")}
                    if (key := tuple(case.values())) not in rows:
                        rows.add(key, {**case, **measure(contest, dtype)})
    common.write(options.out, "embedding", before, device, rows.rows, sizes=sizes._asdict(), density=DENSITY)


if __name__ == "__main__":
    main()
