"""Packed tables on two gloo ranks: rows spread over them, or gradients averaged, as one process would have it."""

import pytest
import torch

from sparsekd import distributed, optim
from sparsekd.nn import ShardedEmbedding, SparseEmbedding
from sparsekd.nn.sharded import rows_of_rank
from sparsekd.pruning import exchange_entries

from .test_distributed import RANKS, run_on_every_rank

ROWS, DIM, STEPS = 37, 12, 4


def table():
    torch.manual_seed(0)
    return SparseEmbedding(ROWS, DIM, padding_idx=5, density=0.4, sparse=True).double()


def batch(step, rank):
    """Of ranks with as many ids each; the last step has none on rank 1, for sums."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(ROWS, (6, 2), generator=generator)


def learn(layer, ids, target):
    rows = layer(ids)
    return (rows - target[ids]).square().mean() if ids.numel() else rows.sum()


def target():
    return torch.linspace(-1, 1, ROWS * DIM, dtype=torch.float64).view(ROWS, DIM)


def _check_shards(rank, folder):
    layer = table().shard(rank, RANKS)
    optimizer = optim.SparseAdam(layer.own, lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        learn(layer, batch(step, rank), target()).backward()
        optimizer.step()
    nothing = torch.zeros(0, dtype=torch.int64) if rank else torch.arange(ROWS)
    torch.save((layer.own.rows(), layer(nothing).detach()), f"{folder}/{rank}.pt")
    with pytest.raises(IndexError, match=rf"\[0, {ROWS}\), a rank got {ROWS}"):
        layer(torch.tensor([ROWS] if rank else [0]))  # on every rank, or one would wait for the other


def _check_averages(rank, folder):
    layer = table()
    distributed.check_same_masks(layer)
    optimizer = optim.SparseAdam(layer, lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        if rank == 0 or step:  # in the first step one rank has no gradient at all
            learn(layer, batch(step, rank), target()).backward()
        distributed.average_gradients(layer.parameters())
        assert layer.values.grad.is_sparse
        optimizer.step()
        # Scores of its own on each rank; all do what rank 0 does.
        exchange_entries(layer, 5, torch.arange(ROWS), torch.rand(ROWS, DIM) + rank, [optimizer])
        distributed.check_same_masks(layer)
    distributed.check_same_parameters(layer.parameters())
    grads = torch.zeros_like(layer.values)
    layer.values.grad = grads.to_sparse() if rank else grads
    with pytest.raises(RuntimeError, match="sparse on some ranks and dense on others"):
        distributed.average_gradients(layer.parameters())
    other = SparseEmbedding(ROWS, DIM, mask=torch.rand(ROWS, DIM) < 0.5 + rank)
    with pytest.raises(RuntimeError, match="other masks"):
        distributed.check_same_masks(other)


def alone():
    layer = table()
    optimizer = optim.SparseAdam(layer, lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        learn(layer, torch.cat([batch(step, rank) for rank in range(RANKS)]), target()).backward()
        optimizer.step()
    return layer.rows()


def test_shards_learn_what_one_process_learns(tmp_path):
    run_on_every_rank(_check_shards, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    want = alone()
    torch.testing.assert_close(torch.cat([rows for rows, _ in parts]), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(parts[0][1], torch.cat([rows for rows, _ in parts])) and parts[1][1].shape == (0, DIM)


def test_ranks_keep_one_table_where_gradients_are_averaged(tmp_path):
    run_on_every_rank(_check_averages, tmp_path)


@pytest.mark.parametrize("ranks", [1, 3, 37])
def test_parts_are_the_whole(ranks):
    layer = table()
    parts = [layer.shard(rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.own.rows() for part in parts]), layer.rows())
    assert [part.own.padding_idx for part in parts if part.own.padding_idx is not None] == [
        5 - rows_of_rank(ROWS, [5 in rows_of_rank(ROWS, r, ranks) for r in range(ranks)].index(True), ranks).start
    ]
    assert all(part.own.sparse and part.own.values.requires_grad for part in parts)


def test_bad_parts_are_refused():
    with pytest.raises(ValueError, match="0 <= rank < ranks <= 37"):
        table().shard(2, 2)
    with pytest.raises(ValueError, match="0 <= rank < ranks"):
        table().shard(0, 38)
    with pytest.raises(ValueError, match="keeps 18 of 37 rows, got a table of 37"):
        ShardedEmbedding(table(), ROWS, 0, 2)
    with pytest.raises(TypeError, match="int32 or int64"):
        table().shard(0, 1)(torch.zeros(2))
