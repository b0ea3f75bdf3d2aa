"""The sparse copy of D2S learns as the full model does: by its groups of parameters, and beside its tables of ids."""

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import BlockPattern, Click
from sparsekd.blocks import BlockSparse
from sparsekd.data.streams import DriftingClicks
from sparsekd.distill import Plain
from sparsekd.methods import D2S
from sparsekd.methods.sparse_copy import SparseCopy

from .runs.made_up import same


def clicks():
    return DriftingClicks("abrupt", windows=5, rows=300, every=3, features=24, active=6)


class Ranks(nn.Module):
    """Users' rows of a table and numbers -> one logit; with ``tied`` the table is read a second time, by its weight."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.tied, self.ids = tied, nn.Embedding(50, 16)
        self.body = nn.Sequential(nn.Linear(24, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 16))
        self.head = nn.Linear(50 if tied else 32, 1)

    def forward(self, x, ids):
        hidden = self.body(x)
        rows = self.ids(ids[:, 0] % self.ids.num_embeddings)
        if self.tied:
            return self.head((hidden + rows) @ self.ids.weight.t()).squeeze(1)
        return self.head(torch.cat([hidden, rows], 1)).squeeze(1)


def learnt_by(groups_of, windows=2, change=lambda number, optimizer: None, model=None, **options):
    """A method after some windows, with what the copy was just after it had been made."""
    model = model or Ranks()
    window = next(iter(clicks()))
    options = {"trigger": 9.0, "accept": 9.0, "compare": False, "catch_up": 0.0, "every": 9} | options
    method = D2S(Plain(model, Click()), 0.5, exclude=["head"], example_inputs=window.examples(8), **options)
    optimizer = torch.optim.SGD(groups_of(model), lr=0.05, momentum=0.9, weight_decay=1e-3)
    method.attach(optimizer)
    fresh = {}
    for number in range(1, windows + 1):
        change(number, optimizer)
        for batch, target in window.batches(100):
            optimizer.zero_grad()
            method.loss(batch, target).total.backward()
            optimizer.step()
            method.after_step()
        method.after_boundary(number)
        fresh = fresh or {name: p.detach().clone() for name, p in method.sparse.model.named_parameters()}
    return method, fresh


def moved(method, fresh):
    return {name for name, p in method.sparse.model.named_parameters() if not torch.equal(p, fresh[name])}


def of_tables_and_of_layers(model, of_tables, of_layers):
    layers = [p for name, p in model.named_parameters() if not name.startswith("ids")]
    return [{"params": model.ids.parameters(), **of_tables}, {"params": layers, **of_layers}]


@pytest.mark.parametrize("share", [True, False])
def test_every_parameter_of_the_copy_learns_as_the_group_of_its_counterpart(share):
    method, fresh = learnt_by(
        lambda model: of_tables_and_of_layers(model, {"lr": 0.0, "momentum": 0.0}, {}), share_tables=share
    )
    layers = {name for name in fresh if not name.startswith("ids")}
    assert moved(method, fresh) == layers and len(layers) == 8  # the tables have a rate of 0
    assert share or "ids.weight" in fresh
    groups = method.sparse.optimizer.param_groups
    assert [group["lr"] for group in groups] == ([0.05] if share else [0.0, 0.05])
    assert [group["momentum"] for group in groups] == ([0.9] if share else [0.0, 0.9])
    stopped, fresh = learnt_by(lambda model: of_tables_and_of_layers(model, {}, {"lr": 0.0}), share_tables=share)
    assert moved(stopped, fresh) == (set() if share else {"ids.weight"})


def test_the_groups_of_the_copy_follow_those_of_the_full_model_at_every_step():
    def biases_apart(model):
        biases = [p for p in model.parameters() if p.dim() == 1]
        return [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": biases, "weight_decay": 0.0}]

    def change(number, optimizer):
        if number == 2:  # after the copy was made
            optimizer.param_groups[0].update(lr=0.0, momentum=0.5)

    method, fresh = learnt_by(biases_apart, change=change)
    assert moved(method, fresh) == {name for name, p in fresh.items() if p.dim() == 1}
    seen = [(g["lr"], g["momentum"], g["weight_decay"]) for g in method.sparse.optimizer.param_groups]
    assert seen == [(0.0, 0.5, 1e-3), (0.05, 0.9, 0.0)]
    for parameter, name in ((p, name) for name, p in method.sparse.model.named_parameters()):
        decays = any(parameter is one for one in method.sparse.optimizer.param_groups[0]["params"])
        assert decays == (fresh[name].dim() > 1)


def test_a_copy_with_groups_begins_with_the_momentum_of_the_full_model():
    method, _ = learnt_by(lambda model: of_tables_and_of_layers(model, {"lr": 1e-3}, {}), windows=1, share_tables=False)
    full, state = dict(method.student.named_parameters()), method.sparse.optimizer.state
    for name, parameter in method.sparse.model.named_parameters():
        momentum = state[parameter]["momentum_buffer"]
        assert momentum.shape == parameter.shape
        if name in full:
            assert torch.equal(momentum, method._optimizer.state[full[name]]["momentum_buffer"])


def test_state_is_cut_into_blocks_where_the_weight_is_even_if_both_have_one_shape():
    """Conv1d(16, 32, 1) has a weight [32, 16, 1], as many numbers in each direction as 32 blocks of 16x1."""
    torch.manual_seed(0)
    full = nn.Sequential(nn.Conv1d(16, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4, 1), nn.Flatten(0))
    optimizer = torch.optim.SGD(full.parameters(), lr=0.01, momentum=0.9)
    full(torch.randn(3, 16, 4)).sum().backward()
    optimizer.step()
    made = SparseCopy(full, optimizer, False, {"pattern": BlockPattern(16, 1), "exclude": ["3"], "costs": None})
    layer = made.model[0]
    assert layer.values.shape == full[0].weight.shape
    momentum = optimizer.state[full[0].weight]["momentum_buffer"]
    blocks = BlockSparse.from_dense(momentum.reshape(layer.matrix_shape), layer.pattern).values
    assert torch.equal(made.optimizer.state[layer.values]["momentum_buffer"], blocks)
    assert not torch.equal(blocks, momentum)


def test_groups_resume(tmp_path):
    def groups(model):
        return of_tables_and_of_layers(model, {"lr": 1e-3}, {"lr": 0.02})

    whole, _ = learnt_by(groups, windows=2)
    resumed, _ = learnt_by(groups, windows=1)
    other, _ = learnt_by(groups, windows=1)
    with torch.no_grad():
        for parameter in other.sparse.model.parameters():
            parameter.zero_()
    other.load_state_dict(resumed.state_dict())
    window = next(iter(clicks()))
    for batch, target in window.batches(100):
        other._optimizer.zero_grad()
        other.loss(batch, target).total.backward()
        other._optimizer.step()
        other.after_step()
    assert same(whole.sparse.model, other.sparse.model)


def test_what_is_frozen_in_the_full_model_is_frozen_in_the_copy_and_not_worthless():
    def all_but_the_first(model):
        return [p for name, p in model.named_parameters() if not name.startswith("body.0")]

    with pytest.warns(UserWarning, match=r"does not hold body\.0\.weight, body\.0\.bias, which the sparse copy"):
        method, fresh = learnt_by(all_but_the_first)
    assert moved(method, fresh) == {name for name in fresh if not name.startswith("body.0")}
    kept = {name: layer.num_kept / layer.num_weights for name, layer in method.pruner.layers().items()}
    assert kept["body.0"] > 0.3  # without a gradient it would be taken down to the floor
    assert not method.pruner.layers()["body.0"].values.requires_grad
    model = Ranks()
    model.body[0].requires_grad_(False)
    frozen, fresh = learnt_by(lambda _: model.parameters(), model=model)
    assert moved(frozen, fresh) == {name for name in fresh if not name.startswith("body.0")}


def test_optimizers_that_the_copy_cannot_follow_are_refused():
    method, _ = learnt_by(lambda model: model.parameters(), windows=1)
    model = method.student
    method.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"D2S\.attach: expected an optimizer with the groups .* got 2 other"):
        method.attach(torch.optim.SGD([{"params": [p]} for p in list(model.parameters())[:2]], lr=0.1))
    tables_alone = D2S(Plain(Ranks(), Click()), 0.5, exclude=["head"], example_inputs=next(iter(clicks())).examples(8))
    with pytest.warns(UserWarning, match="which the sparse copy will not learn"):
        tables_alone.attach(torch.optim.SGD(tables_alone.student.ids.parameters(), lr=0.1))
    tables_alone.loss(*next(next(iter(clicks())).batches(100)))
    with pytest.raises(ValueError, match=r"got one that holds none of those .* make it from model\.parameters\(\)"):
        tables_alone.after_boundary(1)


@pytest.mark.parametrize("table", ["dense", "sparse"])
def test_a_table_that_is_read_by_its_weight_is_shared_and_not_trained_by_the_copy(table):
    class Packed(Ranks):
        def __init__(self):
            super().__init__(tied=True)
            if table == "sparse":
                self.ids = sparsekd.nn.SparseEmbedding.from_dense(self.ids, density=0.5)

        def forward(self, x, ids):
            if table == "dense":
                return super().forward(x, ids)
            rows = self.ids(ids[:, 0] % self.ids.num_embeddings)
            return self.head((self.body(x) + rows) @ self.ids.rows().t()).squeeze(1)

    alone = Packed()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    window = next(iter(clicks()))
    for batch, target in [*window.batches(100), *window.batches(100)]:
        optimizer.zero_grad()
        Click().loss(alone(*batch), target).backward()
        optimizer.step()
    method, fresh = learnt_by(lambda model: model.parameters(), model=Packed())
    assert same(alone, method.student)  # the copy has given the table no gradient
    assert moved(method, fresh) == set(fresh) and not any(name.startswith("ids") for name in fresh)
    if table == "dense":
        shared = method.sparse.model.ids.weight
        assert shared.data_ptr() == method.student.ids.weight.data_ptr() and not shared.requires_grad
    inputs = window.examples(8)
    stands_alone = method.standalone()
    expected = stands_alone(*inputs)
    with torch.no_grad():
        next(method.student.ids.parameters()).zero_()
    assert torch.equal(stands_alone(*inputs), expected)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        method.sparse.model.ids.nothing  # noqa: B018
