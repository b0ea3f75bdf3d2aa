"""Packed tables in models: conversion by name, files, freezing, copies."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import checkpoint
from sparsekd.nn import SparseEmbedding, SparseEmbeddingBag


class Recommender(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.users, self.items = nn.Embedding(30, 8, **options), nn.EmbeddingBag(50, 8, mode="sum")
        self.head = nn.Linear(8, 16)

    def forward(self, users, items):
        return self.head(self.users(users) * self.items(items))


IDS = torch.tensor([0, 29, 3]), torch.tensor([[1, 2], [49, 49], [7, 0]])


def test_embeddings_are_converted_where_they_are_named_and_else_left():
    model = Recommender()
    dense = copy.deepcopy(model)
    report = sparsekd.conversion_report(model)
    assert set(report.dense) == {"users", "items"} and not report.unexpected
    assert "name it in include" in report.dense["users"]
    sparsekd.sparsify(model, density=0.5, pattern=sparsekd.BlockPattern(8, 1))
    sparsekd.densify(model)
    assert type(model.users) is nn.Embedding
    sparsekd.sparsify(model, density=0.25, include=["users", "it*"])
    assert type(model.users) is SparseEmbedding and type(model.items) is SparseEmbeddingBag
    assert type(model.head) is nn.Linear
    assert model.users.values.shape == (60,) and model.items.values.shape == (100,)
    mask = model.users.mask()
    assert torch.equal(model.users.rows(), dense.users.weight * mask)
    assert "SparseEmbedding(30, 8, density=0.25)" in str(sparsekd.conversion_report(model))
    with pytest.raises(ValueError, match=r"'users' is a packed table already"):
        sparsekd.sparsify(model, density=0.1, include=["users"])
    out = model(*IDS)
    sparsekd.densify(model)
    assert type(model.users) is nn.Embedding and type(model.items) is nn.EmbeddingBag
    torch.testing.assert_close(model(*IDS), out)


def test_embeddings_that_cannot_be_packed_are_refused_and_nothing_has_changed():
    class Own(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 2

    tied = Recommender()
    tied.decoder = nn.Linear(8, 30, bias=False)
    tied.decoder.weight = tied.users.weight
    own = Recommender()
    own.users = Own(30, 8)
    cases = [
        (TypeError, "max_norm=1.0; leave this layer dense", Recommender(max_norm=1.0)),
        (TypeError, "Own with a forward of its own", own),
        (ValueError, "share one weight", tied),
    ]
    for error, message, model in cases:
        with pytest.raises(error, match=message):
            sparsekd.sparsify(model, density=0.5, include=["users", "items"])
        assert type(model.items) is nn.EmbeddingBag
    with pytest.raises(ValueError, match="a bare layer cannot be replaced"):
        sparsekd.sparsify(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="to_dense"):
        sparsekd.densify(SparseEmbedding(3, 4))


def packed():
    torch.manual_seed(1)
    return sparsekd.sparsify(Recommender(), density=0.25, include=["users", "items"])


def test_files_hold_packed_tables_and_are_read_into_any(tmp_path):
    model = packed()
    path = tmp_path / "model.safetensors"
    checkpoint.save(model, path, note="tables")
    for other in (Recommender(), packed(), sparsekd.sparsify(Recommender(), density=0.9, include=["users"])):
        checkpoint.load(other, path)
        assert type(other.users) is SparseEmbedding and type(other.items) is SparseEmbeddingBag
        assert torch.equal(other(*IDS), model(*IDS))
        assert torch.equal(other.users.kept, model.users.kept)
    with pytest.raises(ValueError, match="belongs to another model"):
        checkpoint.load(nn.Sequential(nn.Embedding(30, 8)), path)
    narrow = Recommender()
    narrow.users = nn.Embedding(31, 8)
    with pytest.raises(ValueError, match=r"users.weight is \[30, 8\] in the file and \[31, 8\]"):
        checkpoint.load(narrow, path)
    dense = Recommender()
    checkpoint.save(dense, path)
    checkpoint.load(model, path)
    assert type(model.users) is nn.Embedding and torch.equal(model(*IDS), dense(*IDS))
    dense.users = nn.Embedding(30, 8, max_norm=1.0)
    checkpoint.save(packed(), path)
    with pytest.raises(ValueError, match=r"'users' is a packed table in the file, and no .* can stand for max_norm"):
        checkpoint.load(dense, path)


def test_copies_and_pickles_are_equal_and_apart():
    model = packed()
    before = model(*IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*IDS), before)
        with torch.no_grad():
            other.users.values.add_(1)
        assert torch.equal(model(*IDS), before)


def test_frozen_compiled_and_exported(fresh_compiler):
    model = packed().eval()
    want = model(*IDS)
    frozen = sparsekd.freeze(model, example_inputs=IDS)
    torch.testing.assert_close(frozen(*IDS), want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*IDS), want)
    torch.testing.assert_close(torch.export.export(model, IDS).module()(*IDS), want)
