"""Packed embedding tables against dense ones of torch: `python -m benchmarks.embedding [--part lookup] [--json PATH]`.

lines   64-byte lines a second that this machine reads at random, from a table that fits the cache and one that does not
lookup  rows and bags a second, of tables in the nearest caches, in the last one and in memory, beside torch, and as a
        share of the rate of lines
top_k   the 20 best rows for each query beside dense matmul and topk
memory  resident bytes of training (table, gradient, Adam) beside dense training: each in a process of its own
growth  bytes and steps a second as rows grow from 10 thousand to 10 million, ids by Zipf's law

Each result is compared with the dense answer before it is timed. What was kept of growth is drawn without measuring:

    python -m benchmarks.embedding --chart benchmarks/results/embedding_growth.json --svg docs/embedding_growth.svg
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.growth_chart import picture
from benchmarks.lib.timing import compare, machine, write_json
from sparsekd import _C
from sparsekd.nn import SparseEmbedding, SparseEmbeddingBag
from sparsekd.optim import SparseAdam

PARTS = ("lines", "lookup", "top_k", "memory", "growth")
TURNS = 16  # batches of ids that take turns, so that a cold table stays cold


def zipf(rows: int, count: int) -> Tensor:
    """Ids whose frequency falls as one over their rank, ranks spread over the table."""
    rank = ((rows + 1) ** torch.rand(count, dtype=torch.float64)).long().clamp(1, rows) - 1
    return rank * 2654435761 % rows


def in_turns(call: Callable[[Tensor], object], batches: Sequence[Tensor]) -> Callable[[], object]:
    state = {"next": 0}

    def run() -> object:
        state["next"] = (state["next"] + 1) % len(batches)
        return call(batches[state["next"]])

    return run


def lines_of(layer: SparseEmbedding | SparseEmbeddingBag, ids: Tensor) -> float:
    """Lines that a lookup of a row reads, on average: of its bits and of its values."""
    counts = layer.counts[: layer.num_embeddings].long()
    begin = (counts.cumsum(0) - counts)[ids] * layer.values.element_size()
    end = begin + counts[ids] * layer.values.element_size() - 1
    words = layer.kept.shape[1] * 8
    bits = 1 + (words - 8) / 64
    return float((end // 64 - begin // 64 + 1).double().mean()) + bits


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for megabytes in (2, 64 if args.quick else 1024):
        memory = torch.ones(megabytes << 18)
        for threads in {1, torch.get_num_threads()}:
            rate = _C.random_lines(memory.data_ptr(), megabytes << 20, threads)
            yield {"part": "lines", "megabytes": megabytes, "threads": threads, "lines_a_second": rate}


def lookup(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tables = [("cached", 2_000), ("far cache", 5_000 if args.quick else 100_000)]
    tables += [("cold", 20_000 if args.quick else 4_000_000)]
    for name, rows in tables:
        for dim in (64, 128) if not args.quick else (64,):
            if name == "cold" and dim == 128:
                rows //= 2
            dense = nn.Embedding(rows, dim, _weight=torch.randn(rows, dim))
            for removed in (0.8, 0.9):
                layer = SparseEmbedding(rows, dim, density=1 - removed)
                memory = layer.values
                rate = _C.random_lines(memory.data_ptr(), memory.numel() * 4, torch.get_num_threads())
                yield from _lookups(args, name, layer, dense, removed, rate)


def _lookups(
    args: argparse.Namespace, name: str, layer: SparseEmbedding, dense: nn.Embedding, removed: float, rate: float
) -> Iterator[dict[str, Any]]:
    rows, dim = dense.num_embeddings, dense.embedding_dim
    bag = SparseEmbeddingBag(rows, dim, "sum", density=1)
    bag.load_state_dict(layer.state_dict())
    for op, count in (("lookup", 4096), ("bag", 256 * 32)):
        batches = [torch.randint(rows, (count,)) for _ in range(TURNS)]
        some = batches[0]
        with torch.no_grad():
            ours: Any = layer
            peer: Any = dense
            if op == "bag":
                batches = [ids.view(256, 32) for ids in batches]
                ours, peer = bag, nn.EmbeddingBag(rows, dim, mode="sum", _weight=dense.weight)
            exact = F.embedding(some.unique(), layer.rows()) if rows < 10_000 else None
            if exact is not None and not torch.equal(layer(some.unique()), exact):
                raise RuntimeError("benchmarks.embedding: a lookup differs from the dense rows")
            result = compare(in_turns(ours, batches), {"torch": in_turns(peer, batches)}, seconds=args.seconds)
        per_row = lines_of(layer, some)
        used = count * per_row / (result["us"] * 1e-6)
        row = {"part": "lookup", "table": name, "op": op, "rows": rows, "dim": dim, "removed": removed, "ids": count}
        yield {**row, **result, "lines_of_row": per_row, "lines_a_second": used, "share_of_line_rate": used / rate}


def top_k(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rows, most = (5_000, 64) if args.quick else (100_000, 256)
    for dim in (64, 128):
        for removed in (0.8, 0.9, 0.95):
            layer = SparseEmbedding(rows, dim, density=1 - removed)
            weight = layer.rows()
            for queries in (1, most):  # a request, and a batch of them
                query = torch.randn(queries, dim)
                got, want = layer.top_k(query, 20), (query @ weight.T).topk(20)
                torch.testing.assert_close(got[0], want.values, rtol=1e-4, atol=1e-4)

                def dense(weight: Tensor = weight, query: Tensor = query) -> object:
                    return (query @ weight.T).topk(20)

                def ours(layer: SparseEmbedding = layer, query: Tensor = query) -> object:
                    return layer.top_k(query, 20)

                row = {"part": "top_k", "rows": rows, "dim": dim, "removed": removed, "queries": queries, "k": 20}
                yield {**row, **compare(ours, {"matmul_topk": dense}, seconds=args.seconds)}


# ---- Processes of their own, whose resident bytes are counted


def memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rows = 20_000 if args.quick else 1_000_000
    for dim in (64, 128):
        found = {kind: _child(kind, rows, dim, 0.1, 20) for kind in ("ours", "dense", "dense_sparse_grad")}
        for peer in ("dense", "dense_sparse_grad"):
            for how in ("bytes", "resident_bytes"):
                found["ours"][f"{how}_over_density_x_{peer}"] = found["ours"][how] / (0.1 * found[peer][how])
        yield from ({"part": "memory", "kind": kind, **row} for kind, row in found.items())


def growth(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for rows in (1_000, 10_000) if args.quick else (10_000, 100_000, 1_000_000, 10_000_000):
        yield {"part": "growth", "kind": "ours", **_child("ours", rows, 64, 0.1, 200 if not args.quick else 5)}


def _child(kind: str, rows: int, dim: int, density: float, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.embedding", "--child", kind, str(rows), str(dim), str(density)]
    done = subprocess.run([*command, str(steps)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"benchmarks.embedding: {' '.join(command)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def train(kind: str, rows: int, dim: int, density: float, steps: int) -> dict[str, Any]:
    """A table under Adam, 4096 ids a step; with what it holds, by its tensors and by the process.

    Resident bytes are those beyond the same with a table of 64 rows, once the allocator has given back what is free.
    """
    if rows > 64:
        train(kind, 64, dim, 1.0, 3)
    batch = 4096
    before = _resident()
    began = time.perf_counter()
    table: Any
    optimizer: Any
    if kind == "ours":
        table = SparseEmbedding(rows, dim, density=density, sparse=True)
        optimizer = SparseAdam(table)
    else:
        table = nn.Embedding(rows, dim, sparse=kind == "dense_sparse_grad")
        make = torch.optim.Adam if kind == "dense" else torch.optim.SparseAdam
        optimizer = make(list(table.parameters()))
    made = time.perf_counter() - began
    seconds = []
    for _ in range(steps):
        ids = zipf(rows, batch)
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=kind != "dense")
        (table(ids) - 1).square().sum().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    resident = _resident() - before
    (weight,) = table.parameters()
    tensors = [weight, *table.buffers(), *(t for t in optimizer.state[weight].values() if torch.is_tensor(t))]
    grad = weight.grad
    parts = [grad._indices(), grad._values()] if grad.is_sparse else [grad]
    of_grad = sum(t.numel() * t.element_size() for t in parts)
    seconds.sort()
    return {
        "rows": rows, "dim": dim, "density": density if kind == "ours" else 1.0, "batch": batch,
        "bytes": sum(t.numel() * t.element_size() for t in tensors) + of_grad, "gradient_bytes": of_grad,
        "resident_bytes": resident, "peak_bytes": _peak() - before, "dense_adam_bytes": 16 * rows * dim,
        "seconds_to_make": made, "step_us": seconds[len(seconds) // 2] * 1e6,
        "steps_a_second": 1 / seconds[len(seconds) // 2],
    }  # fmt: skip


def _resident() -> int:
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return _of_status("VmRSS")


def _peak() -> int:
    return _of_status("VmHWM")


def _of_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; default: all")
    parser.add_argument("--quick", action="store_true", help="small tables")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each pair")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", metavar="PATH", help="also write the rows there, as benchmarks/results/*.json")
    parser.add_argument("--svg", metavar="PATH", help="also draw growth")
    parser.add_argument("--chart", metavar="PATH", help="measure nothing: draw what was written there into --svg")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.child:
        kind, rows, dim, density, steps = args.child
        print(json.dumps(train(kind, int(rows), int(dim), float(density), int(steps))))
        return
    if args.chart:
        if not args.svg:
            parser.error("--chart needs --svg PATH, where it draws")
        kept = json.loads(Path(args.chart).read_text())
        Path(args.svg).write_text(picture(kept["rows"], kept["machine"]))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = []
    for part in args.part or PARTS:
        for row in globals()[part](args):
            found.append(row)
            print("  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
    if args.json:
        write_json(args.json, f"python -m benchmarks.embedding {' '.join(argv)}", found, machine())
    if args.svg:
        Path(args.svg).write_text(picture(found, machine()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
