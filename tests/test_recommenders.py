"""Recommenders over dense and sparse tables: scores against products written out, gradients, and equal answers."""

import copy

import pytest
import torch

from sparsekd import models
from sparsekd.goals import Ranking, evaluating
from sparsekd.nn import SparseEmbedding

SIZES = {"users": 7, "items": 9}
PAIRS = (torch.tensor([0, 0, 1, 2, 3, 4, 5, 5]), torch.tensor([0, 3, 3, 8, 1, 2, 2, 0]))  # user 6 chose nothing
MAKERS = {
    "mf": lambda **options: models.MF(SIZES, 6, **options),
    "neumf": lambda **options: models.NeuMF(SIZES, 6, **options),
    "lightgcn": lambda **options: models.LightGCN(SIZES, PAIRS, 6, **options),
    "lightgcn-sum": lambda **options: models.LightGCN(SIZES, PAIRS, 6, layers=2, combine="sum", **options),
}
KINDS = pytest.mark.parametrize("kind", MAKERS)


def made(kind, **options):
    torch.manual_seed(0)
    return MAKERS[kind](**options)


@KINDS
@pytest.mark.parametrize("density", [None, 0.4])
def test_single_scores_are_those_of_all_items(kind, density):
    model = made(kind, density=density)
    users, items = torch.tensor([3, 0, 6]), torch.tensor([8, 0, 4])
    negatives = torch.tensor([[1, 2], [0, 8], [5, 5]])
    chosen, others = model(users, items, negatives)
    with evaluating(model):
        every = model.score_items(users)
    assert every.shape == (3, 9)
    torch.testing.assert_close(chosen, every.gather(1, items[:, None]).squeeze(1))
    torch.testing.assert_close(others, every.gather(1, negatives))


@KINDS
def test_a_sparse_table_answers_as_the_dense_one_with_its_zeros(kind):
    sparse, dense = made(kind, density=0.3), made(kind)
    for ours, theirs in zip(sparse.tables, dense.tables, strict=True):
        for packed, full in zip(ours, theirs, strict=True):
            assert isinstance(packed, SparseEmbedding) and packed.density == pytest.approx(0.3, abs=0.02)
            full.weight.data.copy_(packed.rows())
    rest = {name: value for name, value in sparse.state_dict().items() if "users" not in name and "items" not in name}
    dense.load_state_dict(rest, strict=False)
    inputs = (torch.arange(7), torch.arange(7), torch.arange(7)[:, None] + 1)
    losses = [Ranking().loss(model(*inputs), torch.empty(7, 0)) for model in (sparse, dense)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for packed, full in ((sparse.users, dense.users), (sparse.items, dense.items)):
        torch.testing.assert_close(packed.values.grad, full.weight.grad[packed.mask()])


@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize("kind", ["mf", "neumf"])
def test_sparse_gradients_are_those_of_the_rows_of_a_batch(kind, density):
    gradients = []
    for sparse in (False, True):
        model = made(kind, density=density, sparse=sparse)
        sum(scores.square().sum() for scores in model(*PAIRS, PAIRS[1][:, None])).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    of_all, of_rows = gradients
    assert all(of_rows[name].is_sparse == ("users" in name or "items" in name) for name in of_rows)
    for name, gradient in of_all.items():
        torch.testing.assert_close(of_rows[name].to_dense(), gradient)


@pytest.mark.parametrize(("combine", "layers"), [("mean", 3), ("sum", 2)])
def test_lightgcn_averages_over_the_normalised_graph(combine, layers):
    model = models.LightGCN(SIZES, PAIRS, 6, layers=layers, combine=combine).double()
    model.graph_weights = model.graph_weights.double()
    adjacency = torch.zeros(16, 16, dtype=torch.float64)
    adjacency[PAIRS[0], 7 + PAIRS[1]] = 1
    adjacency += adjacency.T.clone()
    degree = adjacency.sum(1)
    graph = adjacency / (degree[:, None] * degree[None]).sqrt().clamp(min=1e-300)
    rows = torch.cat([model.users.weight, model.items.weight])
    powers = [torch.linalg.matrix_power(graph, layer) @ rows for layer in range(layers + 1)]
    want = sum(powers) / (layers + 1 if combine == "mean" else 1)
    torch.testing.assert_close(model.propagated(), want, atol=1e-7, rtol=1e-6)
    (model.propagated() ** 2).sum().backward()
    total = sum(torch.linalg.matrix_power(graph, layer) for layer in range(layers + 1))
    total = total / (layers + 1 if combine == "mean" else 1)
    torch.testing.assert_close(model.users.weight.grad, (2 * total.T @ total @ rows).detach()[:7], atol=1e-7, rtol=1e-6)


def test_lightgcn_keeps_a_propagation_until_a_table_changes():
    model = made("lightgcn", density=0.5)
    with evaluating(model):
        first = model.propagated()
        assert model.propagated() is first
        model.users.values.mul_(2)
        assert not torch.equal(model.propagated(), first)
        second = model.propagated()
        model.load_state_dict({**model.state_dict(), "items.values": 3 * model.items.values})
        assert not torch.equal(model.propagated(), second)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("density", [None, 0.5])
def test_lightgcn_ranks_by_what_an_optimizer_has_just_changed(density, fused):
    """A fused optimizer does not count up the versions of what it changes."""
    model = made("lightgcn", density=density)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    with evaluating(model):
        before = model.score_items(torch.arange(7))
    sum(scores.sum() for scores in model(*PAIRS, PAIRS[1][:, None])).backward()
    optimizer.step()
    with evaluating(model):
        after = model.score_items(torch.arange(7))
        model._kept = None
        assert torch.equal(model.score_items(torch.arange(7)), after)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("density", [None, 0.5])
def test_lightgcn_that_has_been_evaluated_is_exported_and_copied(density):
    model, users = made("lightgcn", density=density), torch.tensor([0, 3, 6])

    class Scores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, users):
            return self.model.score_items(users)

    with evaluating(model):
        scores = model.score_items(users)
        program = torch.export.export(Scores().eval(), (users,))
        torch.testing.assert_close(program.module()(users), scores)
    again = copy.deepcopy(model)
    assert model._kept is not None and again._kept is None
    with evaluating(again):
        assert torch.equal(again.score_items(users), scores)


def test_the_graph_is_no_part_of_a_state():
    assert set(made("lightgcn", density=0.5).state_dict()) == {
        "users.values", "users.kept", "items.values", "items.kept",
    }  # fmt: skip


def test_lightgcn_takes_numbers_of_32_bits_and_refuses_other_rows():
    users, items = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2])
    sizes = {"users": 3, "items": 3}
    graphs = [models.LightGCN(sizes, pair, 4).graph_weights for pair in ((users, items), (users.int(), items.int()))]
    assert torch.equal(*graphs)
    for error, message, pair in (
        (ValueError, r"LightGCN: users must lie in 0\.\.2, got 0\.\.3", (torch.tensor([0, 3, 1]), items)),
        (TypeError, "LightGCN: items must be integers", (users, items.float())),
    ):
        with pytest.raises(error, match=message):
            models.LightGCN(sizes, pair, 4)


def test_bad_options_of_lightgcn():
    with pytest.raises(ValueError, match="combine must be 'mean' or 'sum', got 'max'"):
        models.LightGCN(SIZES, PAIRS, combine="max")
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        models.LightGCN(SIZES, PAIRS, layers=0)
