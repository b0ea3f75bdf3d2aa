"""Packed tables in frozen networks: they stay packed, in memory and in files."""

import importlib

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.nn import SparseEmbedding, SparseEmbeddingBag

ROWS, DIM = 400, 32


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.bag = nn.Embedding(ROWS, DIM), nn.EmbeddingBag(ROWS, DIM, mode="mean")
        self.head = nn.Linear(DIM, 4)

    def forward(self, ids):
        return self.head(self.table(ids[:, 0]) + self.bag(ids))


def take(monkeypatch, eager):
    """The model's own forward as the fastest, or what freezing makes of it."""
    monkeypatch.setattr(importlib.import_module("sparsekd.freeze.freeze"), "NOISE", torch.inf if eager else 0)


def packed(density):
    return sparsekd.sparsify(Recommender(), density=density, include=["table", "bag"])


@pytest.mark.parametrize("eager", [False, True])
def test_tables_stay_packed_in_memory_and_in_files(tmp_path, monkeypatch, eager):
    take(monkeypatch, eager)
    ids = torch.randint(ROWS, (16, 3))
    model = packed(0.1)
    frozen = sparsekd.freeze(model, ids, layer_ms=0.1)
    assert frozen.plan.eager == eager and not any("no block-sparse layer" in note for note in frozen.plan.notes)
    assert (type(frozen.network.table), type(frozen.network.bag)) == (SparseEmbedding, SparseEmbeddingBag)
    torch.testing.assert_close(frozen(ids), model(ids))
    frozen.save(tmp_path / "frozen.safetensors")
    frozen.export(tmp_path / "network.skd")
    dense = 2 * ROWS * DIM * 4
    assert all(path.stat().st_size < dense / 2 for path in tmp_path.iterdir())
    for other in (model, packed(0.1), packed(0.5), Recommender()):
        loaded = sparsekd.load_frozen(tmp_path / "frozen.safetensors", other)
        assert torch.equal(loaded(ids), frozen(ids)) and isinstance(loaded.network.table, SparseEmbedding)
    other = Recommender()
    other.table = nn.Embedding(ROWS, DIM, max_norm=1.0)
    with pytest.raises(ValueError, match=r"another model: 'table' is a packed table in it, and no .*for max_norm=1.0"):
        sparsekd.load_frozen(tmp_path / "frozen.safetensors", other)


@pytest.mark.parametrize("eager", [False, True])
def test_a_file_of_dense_tables_loads_with_a_model_of_packed_ones(tmp_path, monkeypatch, eager):
    take(monkeypatch, eager)
    ids = torch.randint(ROWS, (16, 3))
    frozen = sparsekd.freeze(Recommender(), ids, layer_ms=0.1)
    frozen.save(tmp_path / "frozen.safetensors")
    loaded = sparsekd.load_frozen(tmp_path / "frozen.safetensors", packed(0.1))
    assert torch.equal(loaded(ids), frozen(ids)) and type(loaded.network.table) is nn.Embedding
