"""Students of which something is gone before the training: a schedule goes on from its ``start``, and no earlier."""

import copy

import pytest
import torch
from torch.optim import SGD

from sparsekd import BlockPattern, sparsify
from sparsekd.distill import Plain
from sparsekd.goals import Regression
from sparsekd.methods import METHODS
from sparsekd.pruning import LinearSchedule, ListedSchedule

from ..cases import through_files
from ..test_methods import SMALL, Net, batches, train, weights

EXAMPLE = (torch.zeros(2, 2, 5, 5),)
LINEAR = LinearSchedule(0.1, 3, 0.7, start=0.5)
LISTED = ListedSchedule((0.6, 0.7), 3, start=0.5)
# Of SS-SAD: the schedule of the first stage, which ends where that of the second begins.
TICKETS = {LINEAR: LinearSchedule(0.1, 3, 0.6, start=0.5), LISTED: ListedSchedule((0.6,), 3, start=0.5)}


def build(name, schedule, epochs=10, *, gone=0.5, pattern=SMALL, **options):
    """(method, student, optimizer), of a student of which a share of the multiply-adds is gone."""
    torch.manual_seed(0)
    student = Net(6)
    if gone:
        sparsify(student, pattern, macs=1 - gone, example_inputs=EXAMPLE)
    if name == "ss-sad" and schedule in TICKETS:
        options = {"initial": TICKETS[schedule], "initial_epochs": 4, **options}
        kind = type(schedule)
        schedule = kind(0.1, 3, 0.7, start=0.6) if kind is LinearSchedule else kind((0.7,), 3, start=0.6)
    options = {"example_inputs": EXAMPLE, **options}
    method = METHODS[name](Plain(student, Regression()), schedule, epochs=epochs, pattern=pattern, **options)
    optimizer = SGD([*student.parameters(), *method.parameters()], lr=0.01, momentum=0.9)
    method.attach(optimizer)
    return method, student, optimizer


@pytest.mark.parametrize("gone", [0.5, 0.0])
@pytest.mark.parametrize("schedule", [LINEAR, LISTED], ids=["linear", "listed"])
@pytest.mark.parametrize("name", METHODS)
def test_nothing_goes_or_goes_back_before_the_first_prune(name, schedule, gone):
    method, student, optimizer = build(name, schedule, gone=gone)
    second = 7 if name == "ss-sad" else 6
    assert method.prunes() == [(3, pytest.approx(0.6)), (second, pytest.approx(0.7))]
    assert method.before_training() is None
    for epoch in (1, 2):
        before = method.pruner.num_kept
        assert train(method, optimizer, [epoch]) == []
        assert method.pruner.num_kept == before
    learnt = weights(student)
    assert any(bool(state["momentum_buffer"].any()) for state in optimizer.state.values())
    assert method.after_boundary(2) is None  # once more: no weight moves
    assert all(torch.equal(weight, learnt[key]) for key, weight in weights(student).items())
    events = train(method, optimizer, range(3, 11))
    assert [(event.boundary, event.target) for event in events] == method.prunes()
    assert [event.rewound for event in events] == {"lth-sad": [True] * 2, "ss-sad": [True, False]}.get(
        name, [False] * 2
    )
    assert events[0].removed_macs == pytest.approx(0.6, abs=0.02)
    assert events[-1].removed_macs == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("schedule", [LINEAR, LISTED], ids=["linear", "listed"])
@pytest.mark.parametrize("name", METHODS)
def test_rounds_end_where_something_goes_back(name, schedule):
    method = build(name, schedule)[0]
    found = [tuple(method.round(epoch)) for epoch in range(1, 11)]
    assert (
        found
        == {
            "sp-sad": [("distil", 1, 10)] * 10,
            "lth-sad": [("distil", 1, 3)] * 3 + [("distil", 4, 6)] * 3 + [("distil", 7, 10)] * 4,
            "ss-sad": [("ticket", 1, 3)] * 3 + [("ticket", 4, 4)] + [("distil", 5, 10)] * 6,
        }[name]
    )


def test_a_late_rewind_comes_before_the_first_prune():
    method, student, optimizer = build("lth-sad", LINEAR, gone=0.0, rewind_to=2)
    train(method, optimizer, [1, 2])
    late = weights(student)
    (event,) = train(method, optimizer, [3])
    assert event.rewound
    assert all(torch.equal(weight, late[key] * (weight != 0)) for key, weight in weights(student).items())
    with pytest.raises(ValueError, match="rewind_to must come before the first prune, after epoch 3, got 3"):
        build("lth-sad", LINEAR, rewind_to=3)


@pytest.mark.parametrize("stopped", [1, 2, 3, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_training_prunes_when_the_whole_one_does(name, stopped):
    whole, student, optimizer = build(name, LINEAR)
    train(whole, optimizer, range(1, stopped + 1))
    saved = through_files(whole.state_dict()), through_files(student.state_dict()), optimizer.state_dict()
    resumed, student_again, optimizer_again = build(name, LINEAR)
    for part, state in zip((resumed, student_again, optimizer_again), copy.deepcopy(saved), strict=True):
        part.load_state_dict(state)
    expected = train(whole, optimizer, range(stopped + 1, 11))
    assert train(resumed, optimizer_again, range(stopped + 1, 11)) == expected
    assert [event.boundary for event in expected] == [epoch for epoch, _ in whole.prunes() if epoch > stopped]
    for key, weight in weights(student).items():
        assert torch.equal(weight, weights(student_again)[key])


def test_a_boundary_that_was_left_out_is_made_up_for():
    method, _, optimizer = build("lth-sad", LINEAR)
    events = train(method, optimizer, [1, 2, 4])
    assert [(event.boundary, event.target) for event in events] == [(4, pytest.approx(0.6))]


@pytest.mark.parametrize("name", ["sp-sad", "lth-sad"])
def test_a_prune_before_the_first_step_goes_on_from_the_start(name):
    method, _, optimizer = build(name, LinearSchedule(0.1, 3, 0.7, start=0.5, first=0))
    assert method.prunes() == [(0, pytest.approx(0.6)), (3, pytest.approx(0.7))]
    assert method.before_training(batches(1)).removed_macs == pytest.approx(0.6, abs=0.02)
    assert [event.boundary for event in train(method, optimizer, range(1, 11))] == [3]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_student_of_which_more_is_gone_is_refused_before_the_training(name, known):
    remedy = "initial" if name == "ss-sad" else "the schedule"
    says = rf"is at macs=0\.\d+ already, and the first prune, after epoch 3, is to 0\.2: .*; give {remedy} start=0\.\d+"
    given = {} if known else {"example_inputs": None}
    method = build(name, LinearSchedule(0.2, 3, 0.8), 14, **given)[0]
    with pytest.raises(ValueError, match=says):
        method.loss(*next(batches(1)))


def test_what_is_gone_is_asked_for_in_the_unit_of_the_schedule():
    method = build("sp-sad", LinearSchedule(0.3, 3, 0.9, unit="weights"), gone=0.0)[0]
    dense = method.pruner.num_weights
    student = sparsify(Net(6), SMALL, weights=0.6, example_inputs=EXAMPLE)
    for schedule in (
        LinearSchedule(0.3, 3, 0.9, unit="weights"),
        ListedSchedule((0.8 * dense, 0.2 * dense), 3, unit="weights"),
    ):
        method = METHODS["sp-sad"](Plain(student, Regression()), schedule, epochs=10, pattern=SMALL)
        with pytest.raises(ValueError, match=r"is at weights=0\.4\d* already"):
            method.loss(*next(batches(1)))


def test_a_training_goes_on_with_a_student_that_its_own_prunes_have_left():
    """From a copy of the pruned student, of which more is gone than the first prune takes."""
    method, _, optimizer = build("sp-sad", LinearSchedule(0.2, 3, 0.6), 14, gone=0.0)
    train(method, optimizer, range(1, 7))
    again = METHODS["sp-sad"](
        Plain(copy.deepcopy(method.student), Regression()), LinearSchedule(0.2, 3, 0.6), epochs=14, pattern=SMALL,
        example_inputs=EXAMPLE,
    )  # fmt: skip
    again_by = SGD(again.student.parameters(), lr=0.01)
    again.attach(again_by)
    again.load_state_dict(method.state_dict())
    assert [event.boundary for event in train(again, again_by, range(7, 11))] == [9]


def test_what_the_method_removed_itself_is_no_reason_to_refuse():
    """Though the first example, at which the check is made, comes after it."""
    schedule = LinearSchedule(0.2, 2, 0.6, unit="weights")
    student = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1), torch.nn.Flatten(0))
    method = METHODS["sp-sad"](Plain(student, Regression()), schedule, epochs=8, pattern=BlockPattern(1, 1))
    method.attach(SGD(student.parameters(), lr=0.01))
    assert method.after_boundary(2).target == pytest.approx(0.2) and method.after_boundary(4).target > 0.3
    method.loss((torch.zeros(3, 8),), torch.zeros(3))  # the first example
    assert method.after_boundary(6).target == pytest.approx(0.6)
