"""Embeddings whose rows keep some dimensions: against torch's own layers over the same table made dense."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd import backends, ops
from sparsekd.nn import SparseEmbedding, SparseEmbeddingBag
from sparsekd.ops.embedding import Table, count_kept, pack_mask, row_index, unpack_mask

SHAPES = [(1, 1), (5, 8), (64, 16), (130, 37), (200, 64), (70, 100), (66, 300), (70, 320)]
SHAPES += [(3000, 128)]  # of 64-bit words alone, and too large for the cache
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def layer_of(rows, dim, dtype=torch.float32, kind=SparseEmbedding, **options):
    """A table of which a third is kept, one row nothing and one everything; and the dense layer it stands for."""
    dense = kind.dense_type(rows, dim, **options).to(dtype)
    mask = torch.rand(rows, dim) < 0.3
    mask[rows // 2] = False
    mask[-1] = True
    layer = kind.from_dense(dense, mask=mask)
    with torch.no_grad():
        dense.weight.mul_(mask)
    return layer, dense, mask


def same_gradient(layer, dense, mask, **tolerance):
    torch.testing.assert_close(layer.values.grad, dense.weight.grad[mask], **tolerance)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_lookup_is_exact_and_its_gradient_is_that_of_the_kept_entries(rows, dim, dtype, ids_dtype):
    layer, dense, mask = layer_of(rows, dim, dtype)
    ids = torch.cat([torch.arange(rows), torch.randint(rows, (50,))]).to(ids_dtype)
    out, want = layer(ids), dense(ids)
    assert torch.equal(out, want) and out.dtype == dtype
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    exact = torch.zeros(rows, dim, dtype=torch.float64).index_add(0, ids.long(), grad.double())[mask]
    error = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6)
    torch.testing.assert_close(layer.values.grad.double(), exact, rtol=error, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4)])
def test_ids_of_any_shape(shape):
    layer, dense, _ = layer_of(20, 12)
    ids = torch.randint(20, shape)
    assert torch.equal(layer(ids), dense(ids))
    layer(ids.new_zeros(3, 4).T).sum().backward()  # not contiguous
    assert layer.values.grad is not None


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_do_not_depend_on_threads_and_twice_is_the_same(threads):
    before = torch.get_num_threads()
    layer, _, _ = layer_of(300, 24)
    ids, grad = torch.randint(300, (2000,)), torch.randn(2000, 24)
    results = []
    try:
        for number in (1, threads, threads):
            torch.set_num_threads(number)
            layer.values.grad = None
            layer(ids).backward(grad)
            results.append(layer.values.grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_padding_has_no_gradient():
    layer, dense, mask = layer_of(9, 8, padding_idx=4)
    ids = torch.tensor([4, 1, 4, 8])
    assert torch.equal(layer(ids), dense(ids))
    layer(ids).sum().backward()
    dense(ids).sum().backward()
    same_gradient(layer, dense, mask)


BAGS = [
    ([], [0, 0]),
    ([1], [0]),
    ([1, 2, 3, 3, 0, 5], [0, 0, 2, 6]),
    ([4, 4, 2, 4], [0, 2, 3]),  # 4 is the padding: a bag of nothing else
]


@pytest.mark.parametrize("padding_idx", [None, 4])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(("ids", "offsets"), BAGS, ids=["empty-bags", "one", "several", "padding"])
@pytest.mark.parametrize("dim", [5, 64, 100])
def test_bags_are_drop_ins(dim, ids, offsets, mode, padding_idx):
    layer, dense, mask = layer_of(7, dim, kind=SparseEmbeddingBag, mode=mode, padding_idx=padding_idx)
    ids, offsets = torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets)
    out, want = layer(ids, offsets), dense(ids, offsets)
    torch.testing.assert_close(out, want)
    if not ids.numel():
        return
    grad = torch.randn(want.shape)
    out.backward(grad)
    want.backward(grad)
    same_gradient(layer, dense, mask)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_one_length_and_last_offsets(mode):
    layer, dense, _ = layer_of(40, 33, kind=SparseEmbeddingBag, mode=mode)
    ids = torch.randint(40, (6, 5), dtype=torch.int32)
    torch.testing.assert_close(layer(ids), dense(ids))
    layer.include_last_offset = dense.include_last_offset = True
    flat, offsets = ids.reshape(-1), torch.tensor([0, 4, 4, 30], dtype=torch.int32)
    torch.testing.assert_close(layer(flat, offsets), dense(flat, offsets))


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_weights_of_samples_and_their_gradient(padding_idx):
    layer, dense, mask = layer_of(30, 20, kind=SparseEmbeddingBag, mode="sum", padding_idx=padding_idx)
    ids, offsets = torch.randint(30, (25,)), torch.tensor([0, 3, 3, 20])
    ids[5] = 3
    weights = [torch.rand(25, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    out, want = (bag(ids, offsets, weight) for bag, weight in zip((layer, dense), weights, strict=True))
    torch.testing.assert_close(out, want)
    grad = torch.randn(out.shape)
    out.backward(grad)
    want.backward(grad)
    same_gradient(layer, dense, mask)
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bags_of_half_types_are_rounded_once(dtype):
    layer, dense, _ = layer_of(50, 40, dtype, SparseEmbeddingBag, mode="sum")
    ids = torch.randint(50, (8, 30))
    exact = F.embedding(ids, dense.weight.double()).sum(1)
    torch.testing.assert_close(
        layer(ids).double(), exact, rtol=2 ** (-8 if dtype == torch.bfloat16 else -11), atol=1e-5
    )


def test_gradcheck_of_both_orders():
    mask = torch.rand(6, 5) < 0.5
    kept = pack_mask(mask)
    values = torch.randn(int(mask.sum()), dtype=torch.float64, requires_grad=True)
    scale = torch.rand(9, dtype=torch.float64, requires_grad=True)
    ids, offsets = torch.randint(6, (9,)), torch.tensor([0, 4, 4, 9])

    def rows(values):
        return ops.embedding(ids, Table(values, kept, *row_index(kept)), 5, padding_idx=2)

    def bags(values, scale):
        return ops.embedding_bag(ids, offsets, Table(values, kept, *row_index(kept)), 5, scale)

    # The padding row has no gradient, so what is checked must not move with it.
    ids[ids == 2] = 1
    assert torch.autograd.gradcheck(rows, values) and torch.autograd.gradgradcheck(rows, values)
    assert torch.autograd.gradcheck(bags, (values, scale)) and torch.autograd.gradgradcheck(bags, (values, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    layer, _, _ = layer_of(70, 20, dtype)
    table = (layer.values, layer.kept, layer.base, layer.counts)
    ids, offsets = torch.randint(70, (12,)), torch.tensor([0, 5, 5, 12])
    torch.library.opcheck(torch.ops.sparsekd.embedding, (*table, ids, 20, -1))
    scale = torch.rand(12, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.sparsekd.embedding_bag, (*table, ids, offsets, scale, 20, -1))
    torch.library.opcheck(torch.ops.sparsekd.embedding_bag_scale, (ids, offsets, -1))
    grad = torch.randn(12, 20, dtype=dtype, requires_grad=True)
    rest = (ids, None, None, layer.values.shape[0], -1)
    torch.library.opcheck(torch.ops.sparsekd.embedding_grad, (grad, *table[1:], *rest))
    values = layer.values.detach()
    queries = torch.randn(3, 20, dtype=dtype)
    torch.library.opcheck(torch.ops.sparsekd.embedding_top_k, (queries, values, *table[1:], 4, None, None))
    total = torch.zeros(12, 20, dtype=dtype)
    torch.library.opcheck(torch.ops.sparsekd.embedding_absent_, (total, grad.detach(), layer.kept, ids, False))


def test_compiled_and_exported(fresh_compiler):
    layer, dense, _ = layer_of(30, 12)
    ids = torch.randint(30, (4, 3))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), dense(ids))
    compiled(ids).sum().backward()
    assert layer.values.grad is not None
    assert torch.equal(torch.export.export(layer, (ids,)).module()(ids), dense(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("queries", [0, 1, 3, 20, 65])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (130, 37), (5000, 16)])
def test_top_k_is_the_start_of_a_stable_sort(rows, dim, queries, dtype):
    """Whole numbers: products are exact and many are equal."""
    mask = torch.rand(rows, dim) < 0.4
    dense = torch.randint(-2, 3, (rows, dim)).to(dtype) * mask
    embedding = nn.Embedding(rows, dim, _weight=dense)
    layer, query = SparseEmbedding.from_dense(embedding, mask=mask), torch.randint(-2, 3, (queries, dim)).to(dtype)
    some = [torch.randperm(rows)[: rows // 3].sort().values for _ in range(queries)]
    begin = torch.tensor([0, *(len(ids) for ids in some)]).cumsum(0)
    scores = query @ dense.T
    for excluded in (None, (begin, torch.cat([torch.zeros(0, dtype=torch.int64), *some]))):
        if excluded is not None:
            for row, ids in enumerate(some):
                scores[row, ids] = -math.inf
        k = min(20, rows + 2)
        want, order = scores.sort(dim=1, descending=True, stable=True)
        want, order = (
            F.pad(x, (0, max(k - rows, 0)), value=fill)[:, :k] for x, fill in ((want, -math.inf), (order, -1))
        )
        got, ids = layer.top_k(query, k, excluded)
        assert torch.equal(got, want)
        assert torch.equal(ids, order.masked_fill(want == -math.inf, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("absolute", [False, True])
def test_what_absent_entries_would_have_learnt_is_added(absolute, dtype):
    layer, _, mask = layer_of(80, 70, dtype)
    ids, grad, total = torch.randint(80, (15,)), torch.randn(15, 70, dtype=dtype), torch.randn(15, 70, dtype=dtype)
    want = total + torch.where(mask[ids], 0, grad.abs() if absolute else grad)
    assert ops.embedding_absent_(total, grad, layer.kept, ids, absolute) is total
    assert torch.equal(total, want)


@pytest.mark.parametrize("dim", [1, 63, 64, 65, 300])
def test_masks_survive_packing(dim):
    mask = torch.rand(133, dim) < 0.5
    kept = pack_mask(mask)
    assert torch.equal(unpack_mask(kept, dim), mask) and torch.equal(count_kept(kept), mask.sum(1))
    base, counts = row_index(kept)
    assert base.tolist() == [0, int(mask[:64].sum()), int(mask[:128].sum())]
    assert counts.tolist() == [*mask.sum(1).clamp(max=255).tolist(), *[0] * 59]


def test_a_row_index_written_by_hand():
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    kept = pack_mask(mask)
    assert kept.tolist() == [[5], [0], [7]]
    layer = SparseEmbedding.from_dense(nn.Embedding(3, 3, _weight=torch.arange(9.0).view(3, 3)), mask=mask)
    assert layer.values.tolist() == [0, 2, 6, 7, 8]
    assert layer(torch.tensor([2, 0, 1])).tolist() == [[6, 7, 8], [0, 0, 2], [0, 0, 0]]


@pytest.mark.parametrize("kind", [SparseEmbedding, SparseEmbeddingBag])
def test_from_dense_keeps_the_largest_and_one_in_every_row(kind):
    dense = kind.dense_type(50, 20)
    with torch.no_grad():
        dense.weight[7] *= 1e-6
    layer = kind.from_dense(dense, density=0.2)
    mask = layer.mask()
    assert layer.values.shape == (200,) and layer.density == 0.2
    assert mask[7].nonzero().tolist() == [[int(dense.weight[7].abs().argmax())]]
    magnitude = dense.weight.detach().abs()
    assert bool((mask.sum(1) >= 1).all())
    best = torch.zeros_like(mask).scatter(1, magnitude.argmax(1, keepdim=True), True)
    assert magnitude[mask & ~best].min() >= magnitude[~mask].max()
    again = layer.to_dense()
    assert type(again) is kind.dense_type and torch.equal(again.weight, dense.weight * mask)
    assert torch.equal(kind.from_dense(dense).to_dense().weight, dense.weight)


def test_a_new_table_keeps_its_share_in_every_row_and_learns():
    layer = SparseEmbedding(300, 40, padding_idx=-1, density=0.11)
    sizes = count_kept(layer.kept)
    assert layer.values.shape == (1320,) and set(sizes.tolist()) == {4, 5}
    assert layer.padding_idx == 299 and not layer(torch.tensor([299])).any()
    assert abs(float(layer.values.detach().std()) - 1) < 0.1
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    target, ids = torch.zeros(299, 40), torch.arange(299)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(ids), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_state_of_another_mask_is_loaded_and_a_broken_one_is_named():
    layer, other = SparseEmbedding(70, 10, density=0.3), SparseEmbedding(70, 10, density=0.6)
    ids = torch.arange(70)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(ids), other(ids)) and torch.equal(copy.deepcopy(layer)(ids), other(ids))
    layer(ids).sum().backward()
    state = other.state_dict()
    for broken, message in (
        (state | {"values": state["values"][1:]}, "420 entries"),
        (state | {"kept": state["kept"][1:]}, r"shape \(70, 1\)"),
        (state | {"kept": state["kept"] | 1 << 11}, "beyond the 10"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(broken)
    assert torch.equal(layer(ids), other(ids))


def test_half_of_a_state_and_one_of_other_dimensions_are_refused():
    """A table whose mask and values are of different states would read beyond its values."""
    layer, other, ids = SparseEmbedding(70, 10, density=0.3), SparseEmbedding(70, 10, density=0.6), torch.arange(70)
    before = layer(ids)
    for state, message in (
        ({"kept": other.kept}, "kept: expected values beside it"),
        ({"values": layer.values.data}, "values: expected kept beside it"),
        (SparseEmbedding(70, 8, density=0.3).state_dict(), "rows of 10 dimensions, got those of a table with 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, strict=False)
    layer.load_state_dict({}, strict=False)
    assert torch.equal(layer(ids), before)


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_largest_of_empty_and_padded_bags_have_a_gradient(padding_idx):
    layer = SparseEmbeddingBag(10, 5, mode="max", padding_idx=padding_idx, density=0.6)
    dense = layer.to_dense()
    for ids, offsets in (
        (torch.zeros(2, 3, dtype=torch.int64), None),
        (torch.tensor([0, 4, 4, 0, 9]), torch.tensor([0, 1, 1, 3])),
        (torch.empty(0, dtype=torch.int64), torch.tensor([0, 0])),
    ):
        pooled = layer(ids, offsets)
        torch.testing.assert_close(pooled, dense(ids, offsets))
        pooled.sum().backward()
        dense(ids, offsets).sum().backward()
    torch.testing.assert_close(layer.values.grad, dense.weight.grad[layer.mask()])


def test_largest_of_bags_is_exported_for_any_number_of_bags():
    layer = SparseEmbeddingBag(10, 5, mode="max", padding_idx=0, density=0.6)
    sizes = {0: torch.export.Dim("bags"), 1: torch.export.Dim("length")}
    exported = torch.export.export(layer, (torch.randint(10, (4, 6)),), dynamic_shapes=(sizes,))
    for shape in ((4, 6), (3, 2)):
        ids = torch.randint(10, shape)
        assert torch.equal(exported.module()(ids), layer(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wrong", [70, -1, 2**40])
def test_ids_outside_are_refused(wrong, dtype):
    layer, _, _ = layer_of(70, 10, dtype)
    bag, _, _ = layer_of(70, 10, dtype, SparseEmbeddingBag)
    ids = torch.tensor([1, wrong, 2])
    for call in (lambda: layer(ids), lambda: bag(ids, torch.tensor([0]))):
        with pytest.raises(IndexError, match=rf"\[0, 70\), got {wrong}"):
            call()


def test_bad_input_is_refused_with_the_way_out():
    bag, layer = SparseEmbeddingBag(8, 4, density=0.5), SparseEmbedding(8, 4, density=0.5)
    ids, short = torch.tensor([0, 1]), layer.table._replace(base=layer.base[:0])
    wide = layer.table._replace(kept=layer.kept | 1 << 10)

    def best_without(*excluded):
        return layer.top_k(torch.zeros(1, 4), 1, (torch.tensor([0, len(excluded)]), torch.tensor(excluded)))

    cases = [
        (TypeError, r"use .long\(\)", lambda: layer(ids.float())),
        (ValueError, "need 1-D offsets", lambda: bag(ids)),
        (ValueError, "take no offsets", lambda: bag(ids[None], ids)),
        (ValueError, "rise from 0", lambda: bag(ids, torch.tensor([0, 2, 1]))),
        (ValueError, "rise from 0", lambda: bag(ids, torch.tensor([1]))),
        (ValueError, "mode='sum'", lambda: bag(ids, torch.tensor([0]), torch.ones(2))),
        (ValueError, "every row keeps one", lambda: SparseEmbedding(100, 64, density=0.01)),
        (ValueError, r"density must lie in \(0, 1\]", lambda: SparseEmbedding(100, 64, density=0)),
        (ValueError, "mask must be bool", lambda: SparseEmbedding(3, 4, mask=torch.ones(3, 4))),
        (ValueError, "got both", lambda: SparseEmbedding(3, 4, density=1, mask=torch.ones(3, 4).bool())),
        (ValueError, "padding_idx", lambda: SparseEmbedding(3, 4, padding_idx=3)),
        (
            ValueError,
            "max_norm=1.0; leave this layer dense",
            lambda: SparseEmbedding.from_dense(nn.Embedding(3, 4, max_norm=1.0)),
        ),
        (TypeError, "expected nn.Embedding", lambda: SparseEmbedding.from_dense(nn.Linear(3, 4))),
        (ValueError, "'sum', 'mean' or 'max'", lambda: SparseEmbeddingBag(3, 4, mode="min")),
        (ValueError, "k must be positive", lambda: layer.top_k(torch.zeros(1, 4), 0)),
        (ValueError, r"queries must be \[n, 4\]", lambda: layer.top_k(torch.zeros(1, 5), 1)),
        (ValueError, "excluded must rise from 0", lambda: layer.top_k(torch.zeros(1, 4), 1, (ids + 1, ids))),
        (ValueError, "ascend, got 5 before 2", lambda: best_without(5, 2)),
        (IndexError, r"excluded ids must lie in \[0, 8\), got 8", lambda: best_without(8)),
        (IndexError, r"excluded ids must lie in \[0, 8\), got -1", lambda: best_without(-1, 3)),
        (TypeError, r"offsets must be int32 or int64, got torch.float32", lambda: bag(ids, torch.zeros(1))),
        (ValueError, r"\(begin \[3\], ids", lambda: layer.top_k(torch.zeros(2, 4), 1, (torch.tensor([0, 2]), ids))),
        (ValueError, "beyond the 4 of the queries", lambda: ops.embedding_top_k(torch.zeros(1, 4), wide, 1)),
        (ValueError, "base must be", lambda: ops.embedding_top_k(torch.zeros(1, 4), short, 1)),
        (ValueError, r"rows, 2\] for 100", lambda: ops.embedding_absent_(*torch.zeros(2, 2, 100), layer.kept, ids)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_what_runs_is_said():
    for op in ("embedding", "embedding_bag", "embedding_grad", "embedding_top_k"):
        assert "float32" in backends.describe()[op]["cpu"] and "reference" in backends.describe()[op]["cuda"]
