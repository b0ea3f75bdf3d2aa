"""Click models: ids of any kind have rows, also those that nobody has seen, and training, freezing and pruning work."""

import copy

import pytest
import torch

import sparsekd
from sparsekd.goals import Click
from sparsekd.models import DLRM, WideAndDeep
from sparsekd.models.click import HashedIds, ListedIds
from sparsekd.nn import SparseEmbedding
from sparsekd.pruning import Pruner

MODELS = {"dlrm": DLRM, "wide-deep": WideAndDeep}
LARGE = 2**62


def batch(rows=64, seed=0, ids=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator), torch.randint(-LARGE, LARGE, (rows, ids), generator=generator)


def made(kind, **options):
    torch.manual_seed(0)
    return MODELS[kind](5, 3, rows=50, dim=8, **options)


@pytest.mark.parametrize("table", ["dense", "sparse"])
@pytest.mark.parametrize("ids_by", ["hashed", "listed"])
@pytest.mark.parametrize("kind", MODELS)
def test_learns_and_answers_for_ids_never_seen(kind, ids_by, table):
    model, goal = made(kind, ids_by=ids_by, table=table), Click()
    inputs, clicks = batch(), (batch()[0][:, 0] > 0).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = goal.loss(model(*inputs), clicks)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    if table == "sparse":
        assert any(isinstance(module, SparseEmbedding) for module in model.modules())
    model.eval()
    assert torch.isfinite(model(*batch(16, seed=9))).all()


def test_hashed_rows_are_even_and_stable():
    index = HashedIds(100)
    ids = torch.cat([torch.arange(100_000), torch.arange(100_000) * 4096 + 7])
    rows = index(ids)
    counts = rows.bincount(minlength=100)
    assert rows.min() >= 0 and len(counts) == 100 and counts.min() > 1_700 and counts.max() < 2_300
    assert torch.equal(index(torch.tensor([-5, LARGE, -LARGE])), index(torch.tensor([-5, LARGE, -LARGE])))


def test_listed_ids_get_rows_in_the_order_in_which_they_come():
    index = ListedIds(6)
    assert index(torch.tensor([40, 7, 40, -3])).tolist() == [1, 2, 1, 3]
    index.eval()
    assert index(torch.tensor([7, 99, -3, 41])).tolist() == [2, 0, 3, 0]
    index.train()
    assert index(torch.tensor([99, 5, 6, 8])).tolist() == [4, 5, 0, 0]  # the table is full
    assert index(torch.tensor([8, 40, 6, torch.iinfo(torch.int64).max])).tolist() == [0, 1, 0, 0]
    other = ListedIds(6)
    other.load_state_dict(index.state_dict())
    assert other.eval()(torch.tensor([5, 40, 99])).tolist() == [5, 1, 4]


@pytest.mark.parametrize(
    "kind, ids_by, table", [("dlrm", "hashed", "dense"), ("dlrm", "listed", "sparse"), ("wide-deep", "listed", "dense")]
)
def test_a_pruned_model_freezes_and_is_read_back(kind, ids_by, table, tmp_path):
    model = made(kind, ids_by=ids_by, table=table)
    model(*batch())  # lists ids
    fresh = copy.deepcopy(model)
    Pruner(model, exclude=model.not_pruned, example_inputs=batch()).prune_to(0.5)
    model.eval()
    frozen = sparsekd.freeze(model, batch(8), min_gain=0.0, layer_ms=1.0)  # no choice by time
    assert len(frozen.plan.layers) >= 2
    inputs = batch(33, seed=3)
    torch.testing.assert_close(frozen(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    frozen.save(tmp_path / "frozen")
    read = sparsekd.load_frozen(tmp_path / "frozen", fresh)
    torch.testing.assert_close(read(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_sizes_that_mean_nothing_are_refused(kind):
    with pytest.raises(ValueError, match="at least one number and one column of ids, got 0 and 2"):
        MODELS[kind](0, 2)
    with pytest.raises(ValueError, match="hashed or listed"):
        MODELS[kind](3, 2, ids_by="guessed")
    with pytest.raises(ValueError, match="2 rows or more, got 1"):
        MODELS[kind](3, 2, rows=1)
