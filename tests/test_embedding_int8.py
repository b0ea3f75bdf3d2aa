"""Tables for serving with int8 values: against the table of floats that they stand for, and the rounding promised."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from sparsekd.nn import Int8Embedding, Int8EmbeddingBag, SparseEmbedding, SparseEmbeddingBag
from sparsekd.ops.embedding_int8 import (
    embedding_bag_int8_reference,
    embedding_int8_reference,
    embedding_top_k_int8_reference,
)

from .test_embedding import layer_of

SHAPES = [(1, 1), (130, 37), (64, 64), (70, 300)]


def exact(served):
    """The table that int8 values and scales stand for, float64 ``[rows, dim]``."""
    ids = torch.arange(served.num_embeddings)
    index = (served.kept, served.base, served.counts)
    rows = torch.ops.sparsekd.embedding(served.values.double(), *index, ids, served.embedding_dim, -1)
    return rows * served.row_scale.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_rows_are_the_scaled_integers_and_near_the_floats(rows, dim, dtype):
    layer, _, mask = layer_of(rows, dim, dtype)
    served = Int8Embedding(layer)
    assert served.values.dtype == torch.int8 and served.row_scale.shape == (rows,)
    ids = torch.randint(rows, (9, 7), dtype=torch.int32)
    out = served(ids)
    assert out.dtype == torch.float32 and out.shape == (9, 7, dim)
    torch.testing.assert_close(out.double(), exact(served)[ids.long()], rtol=1e-6, atol=0)
    dense = layer.rows().double()
    largest = dense.abs().amax(1, keepdim=True)
    every = served(torch.arange(rows)).double()
    assert bool(((every - dense).abs() <= largest / 254 + 1e-6 * largest).all())
    assert not every[~mask].any()


@pytest.mark.parametrize("padding_idx", [None, 4])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize(("rows", "dim"), SHAPES[1:])
def test_bags_are_sums_of_the_rows(rows, dim, mode, padding_idx):
    layer, _, _ = layer_of(rows, dim, kind=SparseEmbeddingBag, mode=mode, padding_idx=padding_idx)
    served = Int8EmbeddingBag(layer)
    ids, offsets = torch.randint(rows, (40,)), torch.tensor([0, 0, 13, 39])
    ids[3] = 4
    weights = torch.rand(40) if mode == "sum" else None
    doubles = None if weights is None else weights.double()
    want = F.embedding_bag(ids, exact(served), offsets, mode=mode, per_sample_weights=doubles, padding_idx=padding_idx)
    torch.testing.assert_close(served(ids, offsets, weights).double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(served(ids.view(8, 5)).double(),
                               F.embedding_bag(ids.view(8, 5), exact(served), mode=mode, padding_idx=padding_idx),
                               rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("queries", [0, 1, 70])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_the_best_rows_are_those_of_the_scaled_table(rows, dim, queries):
    served = Int8Embedding(layer_of(rows, dim)[0])
    query, k = torch.randn(queries, dim), min(20, rows)
    scores, ids = served.top_k(query, k)
    every = query.double() @ exact(served).T
    torch.testing.assert_close(scores.double(), every.topk(k).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.double(), every.gather(1, ids), rtol=1e-5, atol=1e-5)
    begin, out = torch.arange(queries + 1), torch.zeros(queries, dtype=torch.int64)
    assert not (served.top_k(query, k, (begin, out))[1] == 0).any()


def test_kernels_are_the_references_and_pass_opcheck():
    served = Int8Embedding(layer_of(130, 37)[0])
    table, ids = served._tensors, torch.randint(130, (11,))
    bags = (*table, ids, torch.tensor([0, 4, 11]), torch.rand(11), 37, -1)
    top_k = (torch.randn(5, 37), *table, 4, None, None)
    ops = torch.ops.sparsekd
    for op, reference, args in (
        (ops.embedding_int8, embedding_int8_reference, (*table, ids, 37)),
        (ops.embedding_bag_int8, embedding_bag_int8_reference, bags),
        (ops.embedding_top_k_int8, embedding_top_k_int8_reference, top_k),
    ):
        torch.testing.assert_close(op(*args), reference(*args))
        torch.library.opcheck(op, args)


def test_it_is_copied_saved_exported_and_smaller():
    layer = SparseEmbedding(200, 64, density=0.2)
    served, ids = Int8Embedding(layer), torch.tensor([3, 199])
    for other in (
        copy.deepcopy(served),
        pickle.loads(pickle.dumps(served)),
        torch.export.export(served, (ids,)).module(),
    ):
        assert torch.equal(other(ids), served(ids))
    state = served.state_dict()
    assert set(state) == {"values", "row_scale", "kept"}
    assert state["values"].nbytes * 4 == layer.values.nbytes
    with torch.no_grad():
        layer.values.zero_()
    assert served(ids).any() and not Int8Embedding(layer)(ids).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_cast_of_the_model_is_one_of_what_it_gives_out(dtype):
    """The scales stay float32, as the kernels read them."""
    torch.manual_seed(0)
    served, ids = Int8Embedding(SparseEmbedding(300, 70, density=0.2)), torch.arange(300)
    bags = Int8EmbeddingBag(SparseEmbeddingBag(300, 70, density=0.2, mode="sum"))
    rows, pooled, best = served(ids), bags(ids.view(30, 10)), served.top_k(torch.ones(2, 70), 5)
    model = torch.nn.Sequential(copy.deepcopy(served), torch.nn.Linear(70, 3)).to(dtype)
    assert model(ids).dtype == dtype and torch.equal(model[0](ids), rows.to(dtype))
    assert torch.equal(copy.deepcopy(bags).to(dtype)(ids.view(30, 10)), pooled.to(dtype))
    assert all(map(torch.equal, model[0].top_k(torch.ones(2, 70), 5), best))
    assert torch.equal(model.float()[0](ids), rows)
    empty = copy.deepcopy(served).to(dtype).to("meta").to_empty(device="cpu")
    assert empty.row_scale.dtype == torch.float32 and empty.dtype == dtype
    assert copy.deepcopy(served).to(dtype).share_memory().row_scale.is_shared()
    # Straight from the op, too, which knows of no module.
    cast = list(served._tensors)
    cast[1] = cast[1].half()
    torch.testing.assert_close(torch.ops.sparsekd.embedding_int8(*cast, ids, 70), rows, rtol=1e-3, atol=1e-4)


def test_the_state_of_another_mask_is_loaded():
    torch.manual_seed(0)
    ids = torch.arange(300)
    for density in (0.2, 0.5):  # as many entries elsewhere, and another number of them
        served = Int8Embedding(SparseEmbedding(300, 70, mask=torch.randperm(21000).view(300, 70) < 4200))
        other = Int8Embedding(SparseEmbedding(300, 70, density=density))
        other.load_state_dict(served.state_dict())
        assert torch.equal(other(ids), served(ids))
        with pytest.raises(RuntimeError, match=r"kept: expected values beside it"):
            other.load_state_dict({"kept": served.kept}, strict=False)
        assert torch.equal(other(ids), served(ids))


def test_bad_input_is_refused_with_the_way_out():
    layer, bag = SparseEmbedding(8, 4, density=0.5), SparseEmbeddingBag(8, 4, mode="max", density=0.5)
    served = Int8Embedding(layer)
    cases = [
        (TypeError, "expected a SparseEmbedding, got Embedding", lambda: Int8Embedding(layer.to_dense())),
        (ValueError, "'sum' or 'mean'", lambda: Int8EmbeddingBag(bag)),
        (IndexError, r"\[0, 8\), got 8", lambda: served(torch.tensor([8]))),
        (TypeError, r"use .long\(\)", lambda: served(torch.zeros(2))),
        (ValueError, r"float32 \[n, 4\]", lambda: served.top_k(torch.zeros(1, 5), 1)),
        (ValueError, "k must be positive", lambda: served.top_k(torch.zeros(1, 4), 0)),
        (ValueError, r"\(begin \[2\]", lambda: served.top_k(torch.zeros(1, 4), 1, (torch.zeros(1), torch.zeros(1)))),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    with torch.no_grad():
        layer.values[0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        Int8Embedding(layer)
