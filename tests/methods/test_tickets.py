"""Tickets of tables: rounds fall to their density, survivors go back to the start, PEP's thresholds are as written."""

import pytest
import torch

from sparsekd import models
from sparsekd.distill import Plain
from sparsekd.goals import Ranking
from sparsekd.methods import PEP, TableTickets
from sparsekd.methods.tickets import imp_rounds

from .made_up import SIZES, epoch, learner


def test_rounds_of_iterative_pruning():
    rounds = imp_rounds((0.5, 0.7), epochs=2, last_epochs=9)
    assert rounds == [(1.0, 2), (0.9, 2), (0.81, 2), (0.729, 2), (0.7, 9), (0.63, 2), (0.567, 2), (0.5103, 2), (0.5, 9)]


def test_survivors_are_the_largest_and_go_back_to_the_start():
    _, method, optimizer = learner(TableTickets, density=1.0, rounds=[(1, 2), (0.5, 1), (0.2, 1)])
    start = [table.rows() for table in method.tables]
    for number in (1, 2):
        epoch(method, optimizer, number)
        trained = torch.cat([table.rows().flatten() for table in method.tables]).abs()
        event = method.after_boundary(number)
        assert (event is None) == (number == 1)
    assert event.rewound and event.kept == method.num_kept == 216
    masks = torch.cat([table.mask().flatten() for table in method.tables])
    most_gone, rows = trained[~masks].max(), torch.cat([table.mask() for table in method.tables])
    assert int((trained[masks] < most_gone).sum()) <= len(rows)  # those that are the largest of their row
    for table, first in zip(method.tables, start, strict=True):
        assert torch.equal(table.rows(), first * table.mask())
        assert table.values not in optimizer.state
    assert [method.level(number) for number in (1, 2, 3, 4)] == [1.0, 1.0, 0.5, 0.2]
    epoch(method, optimizer, 3)
    method.after_boundary(3)
    assert method.num_kept == round(0.2 * 432) and method.after_boundary(4) is None


def test_pep_trains_what_is_above_the_threshold():
    model, method, optimizer = pep()
    users = torch.tensor([0, 5])
    s = torch.sigmoid(torch.tensor(-2.0))
    rows = model.users.rows()[users]
    torch.testing.assert_close(model.users(users), rows.sign() * (rows.abs() - s).clamp(min=0))
    epoch(method, optimizer, 0)
    assert any(float((one.detach() + 2.0).abs().max()) > 0 for one in method.thresholds)
    start = method._first[0].clone()
    above = [table.rows().abs() - method._threshold(place) for place, table in enumerate(method.tables)]
    event = method.after_boundary(1)
    assert event.rewound and method.num_kept == round(0.25 * 432) and method.level(1) == 1 and method.level(2) == 0.25
    assert torch.equal(model.users.rows(), start * model.users.mask())
    torch.testing.assert_close(model.users(users), model.users.rows()[users])  # without threshold from here on
    flat, kept = torch.cat(above).flatten(), torch.cat([table.mask() for table in method.tables]).flatten()
    assert int((flat[kept] < flat[~kept].max()).sum()) <= 54


def pep(**options):
    defaults = {"density": 1.0, "start": -2.0, "rate": 1.0, "search": 1}
    made = lambda distiller, **rest: PEP(distiller, 0.25, **rest)  # noqa: E731 - the density of PEP, not of the model
    return learner(made, **{**defaults, **options})


@pytest.mark.parametrize("kind", ["tickets", "pep"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_training_ends_with_the_same_bits(kind, stop):
    def make():
        return pep(search=2) if kind == "pep" else learner(TableTickets, density=1.0, rounds=[(1, 2), (0.5, 2)])

    def run(stop):
        model, method, optimizer = make()
        for number in range(1, 5):
            epoch(method, optimizer, number)
            method.after_boundary(number)
            if number == stop:
                states = [dict(one.state_dict()) for one in (method, model, optimizer)]
                model, method, optimizer = make()
                for one, state in zip((method, model, optimizer), states, strict=True):
                    one.load_state_dict(state)
        return model.state_dict()

    whole, resumed = run(None), run(stop)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_bad_options():
    full = Plain(models.MF(SIZES, 8, density=1.0), Ranking())
    for rounds in ([], [(0.5, 1)], [(1, 1), (0.2, 1), (0.5, 1)], [(1, 1), (1, 1)]):
        with pytest.raises(ValueError, match="densities of the rounds must fall from 1"):
            TableTickets(full, rounds)
    with pytest.raises(ValueError, match="at least 1 epoch"):
        TableTickets(full, [(1, 0), (0.5, 1)])
    with pytest.raises(ValueError, match="density must lie in"):
        PEP(full, 1.0, 2)
    with pytest.raises(ValueError, match=r"tables must keep every entry at the start, got density 0\.25"):
        TableTickets(Plain(models.MF(SIZES, 8, density=0.25), Ranking()), [(1, 1)])
