"""The Triton kernels of packed embedding tables against the CPU's, on a GPU where there is one, else interpreted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsekd import backends
from sparsekd.backends.cuda import embedding as backend
from sparsekd.ops.embedding import count_kept, embedding_reference, pack_mask, row_index
from sparsekd.ops.embedding_int8 import quantize_rows

from .common import DEVICE, GPU, embedding_grad, needs_gpu

ROOT = Path(__file__).parents[2]
COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
CPU = torch.ops.sparsekd
DIMS = [1, 17, 33, 64, 128, 300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]
MULTIPLIED = torch.bfloat16 if GPU else torch.float16  # the interpreter multiplies the bits of bfloat16 as integers
ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if GPU else 2**-7, torch.float16: 2**-11}  # interpreted: cut off
ROWS = 131  # three bases, the last one of three rows


def table_of(dim, dtype=torch.float32, whole=False):
    """(values, kept, base, counts) on the CPU: a third is kept, one row nothing, some one entry, two everything."""
    mask = torch.rand(ROWS, dim) < 0.33
    mask[60:64] = False
    mask[[61, 62], [0, -1]] = True
    mask[[0, -1]] = True
    kept = pack_mask(mask)
    size = (int(mask.sum()),)
    values = torch.randint(-2, 3, size).to(dtype) if whole else torch.randn(size).to(dtype)
    return values, kept, *row_index(kept)


def int8_of(table):
    """(values, row_scale, kept, base, counts) of a table."""
    values, scale = quantize_rows(*table[:2])
    return values, scale, *table[1:]


def to(*operands):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in operands]


def both(name, *operands):
    """What the CPU's kernels make of the operands, and what those of a GPU do."""
    want = getattr(CPU, name)(*operands)
    got = getattr(backend, name)(*to(*operands))
    assert got.dtype == want.dtype and got.shape == want.shape
    return want, got.cpu()


def ids_of(count):
    """Some often, some never, all of the extremes."""
    return torch.cat([torch.tensor([0, 60, 61, 62, ROWS - 1]), torch.randint(ROWS, (count,)), torch.full((2,), 7)])


# ---- Lookup and bags


@pytest.mark.parametrize(
    ("dim", "dtype"), [*((dim, torch.float32) for dim in DIMS), *((33, one) for one in HALF)], ids=str
)
def test_rows_are_those_of_the_cpu_to_the_bit(dim, dtype):
    want, got = both("embedding", *table_of(dim, dtype), ids_of(20), dim, 7)
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 4)])
def test_ids_of_any_shape(shape):
    ids = torch.randint(ROWS, shape)
    for args in ((*table_of(17), ids, 17, -1), (*table_of(17), ids.expand(2, *shape).movedim(0, -1), 17, -1)):
        want, got = both("embedding", *args)
        assert torch.equal(got, want)


@pytest.mark.parametrize("dim", DIMS)
def test_rows_of_int8_values(dim):
    want, got = both("embedding_int8", *int8_of(table_of(dim)), ids_of(20), dim)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


BAGS = {
    "empty": ([], [0, 0, 0]),
    "none": ([], [0]),
    "short": ([1, 62, 3, 3, 0, 5], [0, 0, 2, 6, 6]),
    "padding": ([7, 7, 62, 7], [0, 2, 4]),
    "long": ([*range(40), *range(30)], [0, 40, 70]),
}


@pytest.mark.parametrize(
    ("dim", "weighted", "bags"),
    [
        (17, False, "empty"),
        (17, True, "none"),
        (17, False, "padding"),
        (33, True, "short"),
        (128, True, "long"),
        (300, False, "short"),
    ],
)
def test_bags(dim, weighted, bags):
    ids, offsets = (torch.tensor(numbers, dtype=torch.int64) for numbers in BAGS[bags])
    weight = torch.rand(ids.shape) if weighted else None
    for dtype in DTYPES if dim < 64 else [torch.float32]:
        want, got = both("embedding_bag", *table_of(dim, dtype), ids, offsets, weight, dim, 7)
        torch.testing.assert_close(got, want, rtol=2 * ERROR[dtype], atol=1e-5)
    want, got = both("embedding_bag_int8", *int8_of(table_of(dim)), ids, offsets, weight, dim, 7)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    want, got = both("embedding_bag_scale", ids, offsets, 7)
    assert torch.equal(got, want)


@pytest.mark.skipif(GPU, reason="stops the device for good")
@pytest.mark.parametrize("wrong", [ROWS, -1, 2**40])
def test_ids_outside_are_refused_and_nothing_is_read_there(wrong):
    """What is read is watched by the checks of this folder."""
    table, ids = table_of(17), torch.tensor([1, wrong, 2])
    grad, offsets, (values, *index) = torch.randn(3, 17), torch.tensor([0, 3]), table
    for call in (
        lambda: backend.embedding(*table, ids, 17, -1),
        lambda: backend.embedding_int8(*int8_of(table), ids, 17),
        lambda: backend.embedding_bag(*table, ids, offsets, None, 17, -1),
        lambda: backend.embedding_grad(grad, *index, ids, None, None, values.shape[0], -1),
        lambda: backend.embedding_absent_(grad.clone(), grad, index[0], ids, False),
    ):
        with pytest.raises(RuntimeError, match=rf"ids must lie in \[0, {ROWS}\)"):
            call()


@pytest.mark.skipif(GPU, reason="stops the device for good")
@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [0, 4], [1, 3], [-1, 3], [0, 2], [0, 2**40, 3]])
def test_offsets_that_do_not_rise_to_the_number_of_ids_are_refused(offsets):
    ids, offsets = torch.tensor([1, 2, 3]), torch.tensor(offsets)
    for call in (
        lambda: backend.embedding_bag(*table_of(17), ids, offsets, None, 17, -1),
        lambda: backend.embedding_bag_scale(ids, offsets, -1),
    ):
        with pytest.raises(RuntimeError, match="offsets must rise from 0 to the number of ids, 3"):
            call()
    with pytest.raises(ValueError, match="rise from 0"):
        backend.embedding_bag(*table_of(17), ids, torch.tensor([0]), None, 17, -1)


# ---- Gradients


@pytest.mark.parametrize(("dim", "bags", "often"), [(1, True, 9), (17, False, 9), (64, True, 9), (300, False, 0)])
def test_gradients_are_sums_over_the_ids_of_a_row(dim, bags, often, monkeypatch):
    """With chunks of 4 terms the row that most ids name goes through several, and another one crosses their ends."""
    monkeypatch.setattr(embedding_grad, "CHUNK", 4)
    values, *index = table_of(dim)
    ids = torch.cat([ids_of(0), torch.full((often,), 65)])
    ids = ids[torch.randperm(len(ids))]
    source, scale = (torch.randint(9, ids.shape), torch.rand(ids.shape)) if bags else (None, None)
    grad = torch.randn(9 if bags else len(ids), dim)
    args = (grad, *index, ids, source, scale, values.shape[0], 7)
    want, got = both("embedding_grad", *args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if dim == 17:
        assert torch.equal(backend.embedding_grad(*to(*args)).cpu(), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_rounded_once(dtype):
    values, *index = table_of(33)
    ids, grad = torch.randint(ROWS, (6,)).repeat(2), torch.randn(12, 33).to(dtype)
    rest = (None, None, values.shape[0], -1)
    exact = CPU.embedding_grad(grad.double(), *index, ids, *rest)
    got = backend.embedding_grad(*to(grad, *index, ids, *rest)).cpu()
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=ERROR[dtype], atol=1e-5)


def test_no_ids_have_no_gradient():
    values, *index = table_of(17)
    none = torch.zeros(0, dtype=torch.int64)
    _, got = both("embedding_grad", torch.zeros(0, 17), *index, none, None, None, values.shape[0], -1)
    assert not got.any()


@pytest.mark.parametrize(("dim", "bags"), [(1, False), (64, True)])
def test_gradients_of_the_rows_of_a_batch_alone(dim, bags, monkeypatch):
    monkeypatch.setattr(embedding_grad, "CHUNK", 4)
    _, *index = table_of(dim)
    in_order, order = torch.cat([ids_of(0), torch.full((9,), 65)]).sort(stable=True)
    rows, sizes = torch.unique_consecutive(in_order, return_counts=True)
    kept = count_kept(index[0])[rows]
    first, begin = (torch.cat([sums.new_zeros(1), sums.cumsum(0)]) for sums in (sizes, kept))
    source, scale = (torch.randint(9, order.shape), torch.rand(order.shape)) if bags else (None, None)
    grad = torch.randn(9 if bags else order.shape[0], dim)
    args = (grad, *index, rows, first, order, source, scale, begin, int(begin[-1]))
    (places, sums), (ours, of_ours) = CPU.embedding_rows_grad(*args), backend.embedding_rows_grad(*to(*args))
    assert torch.equal(ours.cpu(), places)
    torch.testing.assert_close(of_ours.cpu(), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dim", "absolute"), [(1, False), (33, True), (300, False)])
def test_what_absent_entries_would_have_learnt_is_added(dim, absolute):
    _, kept, _, _ = table_of(dim)
    ids = ids_of(6)
    total, grad = torch.randn(2, len(ids), dim)
    ours = total.to(DEVICE, copy=True)
    backend.embedding_absent_(ours, *to(grad, kept, ids), absolute)
    CPU.embedding_absent_(total, grad, kept, ids, absolute)
    assert torch.equal(ours.cpu(), total)


# ---- The best rows


def excluded_of(queries):
    some = [torch.randperm(ROWS)[: 40 * (query % 3)].sort().values for query in range(queries)]
    return torch.tensor([0, *map(len, some)]).cumsum(0), torch.cat([torch.zeros(0, dtype=torch.int64), *some])


@pytest.mark.parametrize(
    ("dim", "queries", "k", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (17, 3, 20, MULTIPLIED),
        (33, 40, 5, torch.float32),
        (64, 2, 128, torch.float16),
        (128, 2, 7, torch.float32),
        (300, 1, 3, MULTIPLIED),
    ],
    ids=str,
)
def test_the_best_rows_are_those_of_the_cpu(dim, queries, k, dtype):
    """Whole numbers: products are exact, and many are equal."""
    table = table_of(dim, dtype, whole=True)
    query = torch.randint(-2, 3, (queries, dim)).to(dtype)
    for begin, out in ((None, None), excluded_of(queries)):
        args = (query, *table, k, begin, out)
        want, got = CPU.embedding_top_k(*args), backend.embedding_top_k(*to(*args))
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours.cpu(), theirs)


def test_no_row_may_be_left_and_scores_may_be_infinite_or_no_numbers():
    values, *index = table_of(17, whole=True)
    values[[9, 40, 80]] = torch.tensor([math.inf, -math.inf, math.nan])
    begin, every = torch.tensor([0, 0, ROWS]), torch.arange(ROWS)
    args = (torch.randint(1, 3, (2, 17)).float(), values, *index, 20, begin, every)
    want, got = CPU.embedding_top_k(*args), backend.embedding_top_k(*to(*args))
    assert want[0][0, 0] == math.inf and (want[1][1] == -1).all()
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("processors", [1, 132])
def test_the_best_rows_do_not_depend_on_how_many_programs_look(processors, monkeypatch):
    monkeypatch.setattr(backend.cost, "of_device", lambda device: SimpleNamespace(processors=processors))
    table, query = int8_of(table_of(64)), torch.randn(2, 64)
    args = (query, *table, 20, *excluded_of(2))
    want, got = CPU.embedding_top_k_int8(*args), backend.embedding_top_k_int8(*to(*args))
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1].cpu(), want[1])


def test_bad_operands_of_the_best_rows_are_refused_as_on_the_cpu():
    values, kept, *index = table_of(4)
    query, some = torch.zeros(1, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="beyond the 4 of the queries in row 0"):
        backend.embedding_top_k(*to(query, values, kept | 1 << 10, *index, 1, None, None))
    with pytest.raises(ValueError, match="excluded must rise from 0"):
        backend.embedding_top_k(*to(query, values, kept, *index, 1, some, some))
    scores, ids = backend.embedding_top_k(*to(query[:0], values, kept, *index, 3, None, None))
    assert scores.shape == ids.shape == (0, 3)


# ---- What runs


def test_what_has_no_kernel_runs_the_reference_and_says_so():
    table, ids = table_of(17, torch.float64), torch.tensor([1, 130])
    want = embedding_reference(*table, ids, 17, -1)
    assert torch.equal(backend.embedding(*to(*table, ids, 17, -1)).cpu(), want)
    query = torch.randn(2, 17)
    table = table_of(17)
    args = (query, *table, 129, None, None)
    assert torch.equal(backend.embedding_top_k(*to(*args))[1].cpu(), CPU.embedding_top_k(*args)[1])
    said = backends.describe()
    assert "Triton" in said["embedding"]["cuda"] and "up to 128" in said["embedding_top_k"]["cuda"]
    assert "no kernel" in said["embedding_adam_"]["cuda"] and "int8" in said["embedding_int8"]["cuda"]


def test_machine_code():
    """Compiled for a GPU that need not be there; in a process of its own, since kernels may be interpreted here."""
    command = [sys.executable, "-m", "benchmarks.gpu.aot_embedding", "--quick", "--sm", "90", "--out", ""]
    found = subprocess.run(command, cwd=ROOT, env=COMPILED, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("good") >= 14


def test_the_kept_machine_code_is_that_of_the_kernels_as_they_are():
    """After a change of a kernel: python -m benchmarks.gpu.aot_embedding --sm 90"""
    check = "from benchmarks.gpu import aot_embedding as aot; print(aot.missing(aot.kept(), 90))"
    found = subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=COMPILED, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr
    rows = json.loads((ROOT / "benchmarks" / "results" / "gpu_aot_embedding.json").read_text())["rows"]
    assert {row["sm"] for row in rows} == {80, 90, 100, 942}
    assert not [row["config"] for row in rows if row["faults"] or row["stack_bytes"]]


@needs_gpu
def test_gpu_a_layer_trains_in_a_cuda_graph_and_two_runs_give_the_same_bits():
    from sparsekd.nn import SparseEmbedding

    layer = SparseEmbedding(5000, 64, density=0.1).cuda()
    ids, grad = torch.randint(5000, (20000,), device=DEVICE), torch.randn(20000, 64, device=DEVICE)
    found = []
    for _ in range(3):
        layer.values.grad = None
        layer(ids).backward(grad)
        found.append(layer.values.grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    graph, out = torch.cuda.CUDAGraph(), None
    with torch.no_grad(), torch.cuda.graph(graph):
        out = layer(ids)
    graph.replay()
    assert torch.equal(out, layer(ids))


@needs_gpu
def test_gpu_no_synchronisation():
    values, kept, base, counts = to(*table_of(64))
    ids = ids_of(20).to(DEVICE)
    grad = torch.randn(len(ids), 64, device=DEVICE)

    def step():
        backend.embedding(values, kept, base, counts, ids, 64, -1)
        backend.embedding_grad(grad, kept, base, counts, ids, None, None, values.shape[0], -1)
        backend.embedding_absent_(grad.clone(), grad, kept, ids, False)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
