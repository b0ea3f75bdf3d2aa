"""Tables whose entries lie past what 32 bits count. Their values are files without contents, of which only the pages of
the rows in use exist."""

import copy
import sys

import pytest
import torch

from sparsekd import ops
from sparsekd.backends.native import native
from sparsekd.nn import Int8Embedding, SparseEmbedding, SparseEmbeddingBag
from sparsekd.ops.embedding import Table, row_index
from sparsekd.optim import SparseSGD

ROWS, DIM, FAR = 128, 37, 2**31 + 3  # the second 64 rows begin there
needs_kernels = pytest.mark.skipif(native is None, reason="the references follow kept, not base")


@pytest.fixture
def far(tmp_path):
    """`far(near)`: as the one-dimensional `near`, but what belongs to the second 64 rows lies from FAR on."""
    count = 0

    def move(near, first):
        nonlocal count
        count += 1
        size = FAR + len(near) - first
        moved = torch.from_file(str(tmp_path / str(count)), shared=True, size=size, dtype=near.dtype)
        moved[:first], moved[FAR:] = near[:first], near[first:]
        return moved

    return move


@pytest.fixture
def in_two_parts():
    """The best rows are found in as many parts as there are threads: with two, the second begins at the second base.
    The gap before it is of these tests alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def near_and_far(far, kind=SparseEmbedding, **options):
    layer = kind(ROWS, DIM, density=0.3, **options)
    first = int(layer.base[1])
    moved = copy.deepcopy(layer)
    moved.values.data = far(layer.values.detach(), first)
    moved.base = torch.tensor([0, FAR])
    return layer, moved, first


IDS = torch.tensor([0, 63, 64, 65, 127, 64, 3])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_and_bags_far_from_the_start(far, dtype, in_two_parts):
    near, moved, _ = near_and_far(far, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(near(IDS), moved(IDS))
        offsets = torch.tensor([0, 3, 7])
        tables = [layer.table for layer in (near, moved)]
        assert torch.equal(*(ops.embedding_bag(IDS, offsets, table, DIM) for table in tables))
    queries = torch.randn(3, DIM).to(dtype)
    for found, wanted in zip(moved.top_k(queries, 20), near.top_k(queries, 20), strict=True):
        assert torch.equal(found, wanted)


@needs_kernels
def test_int8_rows_far_from_the_start(far, in_two_parts):
    near = Int8Embedding(SparseEmbedding(ROWS, DIM, density=0.3))
    moved = copy.deepcopy(near)
    moved.values, moved.base = far(near.values, int(near.base[1])), torch.tensor([0, FAR])
    assert torch.equal(near(IDS), moved(IDS))
    assert torch.equal(near.top_k(torch.ones(1, DIM), 5)[1], moved.top_k(torch.ones(1, DIM), 5)[1])


@needs_kernels
@pytest.mark.parametrize("kind", [SparseEmbedding, SparseEmbeddingBag])
def test_gradients_and_steps_far_from_the_start(far, kind):
    near, moved, first = near_and_far(far, kind, sparse=True)
    for layer in (near, moved):
        arguments = (IDS,) if kind is SparseEmbedding else (IDS, torch.tensor([0, 3]))
        (layer(*arguments).square().sum() + layer(*arguments).sum()).backward()  # two lookups: torch joins their terms
    places, far_places = (layer.values.grad.coalesce().indices()[0] for layer in (near, moved))
    assert torch.equal(far_places, torch.where(places < first, places, places - first + FAR))
    assert torch.equal(near.values.grad.coalesce().values(), moved.values.grad.coalesce().values())
    for layer in (near, moved):
        SparseSGD(layer, lr=0.1).step()
    with torch.no_grad():
        assert torch.equal(near.table.values[first:], moved.table.values[FAR:])


@needs_kernels
@pytest.mark.parametrize("name", ["adagrad_", "adagrad_rows_", "adam_"])
def test_optimizers_with_state_step_far_from_the_start(far, name):
    near, moved, first = near_and_far(far)
    places = torch.tensor([0, first - 1, first, first + 7])
    of_places = {"adagrad_": 1, "adagrad_rows_": 0, "adam_": 2}[name]
    state = [torch.zeros(len(near.values)) for _ in range(of_places)]
    far_state = [far(each, first) for each in state]
    of_rows = {"adagrad_rows_": torch.zeros(ROWS), "adam_": torch.zeros(ROWS, dtype=torch.int16)}
    grad, numbers = torch.randn(4), (0.1, 0.9, 0.99, 1e-8, 0.0) if name == "adam_" else (0.1, 1e-8, 0.0)
    for layer, at, own in ((near, places, state), (moved, places + (places >= first) * (FAR - first), far_state)):
        rows = [of_rows[name].clone()] if name in of_rows else []
        index = layer.table[1:] if rows else ()
        getattr(torch.ops.sparsekd, f"embedding_{name}")(layer.values.data, *own, *rows, *index, at, grad, *numbers)
    assert torch.equal(near.values.data[first:], moved.values.data[FAR:])
    assert all(torch.equal(a[first:], b[FAR:]) for a, b in zip(state, far_state, strict=True))


@needs_kernels
def test_entries_far_from_the_start_go_and_move(far):
    near, moved, first = near_and_far(far)
    stays = torch.rand(len(near.values)) < 0.5
    thinner = torch.ops.sparsekd.embedding_thin(*near.table[1:], stays)
    assert torch.equal(thinner, torch.ops.sparsekd.embedding_thin(*moved.table[1:], far(stays, first)))
    to = (thinner, *row_index(thinner), int(stays.sum()), 0.0)
    packed = [torch.ops.sparsekd.embedding_repack(layer.values.data, *layer.table[1:], *to) for layer in (near, moved)]
    assert torch.equal(*packed) and torch.equal(packed[0], near.values.data[stays])


def test_rows_begin_past_32_bits(monkeypatch):
    """By the arithmetic alone: two groups of 64 rows with 2^25 entries each."""
    module = sys.modules["sparsekd.ops.embedding"]
    monkeypatch.setattr(module, "count_kept", lambda kept: torch.full((len(kept),), 2**25))
    base, counts = row_index(torch.zeros(3 * 64, 1, dtype=torch.int64))
    assert base.tolist() == [0, 2**31, 2**32] and counts.unique().tolist() == [255]


def test_shapes_past_32_bits_are_those_of_torch():
    """On the device without memory: 2^27 ids of 64 dimensions, of a table with 2^33 entries."""
    rows = 2**27
    shapes = ((64 * rows,), (rows, 1), (rows // 64,), (rows,))
    dtypes = (torch.float32, torch.int64, torch.int64, torch.uint8)
    table = Table(
        *(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, dtypes, strict=True))
    )
    ids = torch.empty(rows, dtype=torch.int64, device="meta")
    out = ops.embedding(ids, table, 64)
    assert out.shape == (rows, 64) and out.numel() == 2**33
    args = (torch.empty(rows, 64, device="meta"), *table[1:], ids, None, None, 64 * rows, -1)
    assert torch.ops.sparsekd.embedding_grad(*args).shape == table.values.shape
