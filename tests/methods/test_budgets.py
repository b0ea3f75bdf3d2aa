"""What a method counts: multiply-adds by cost unless told otherwise, in shares or down to a number."""

import pytest
import torch

from sparsekd.distill import Plain
from sparsekd.goals import Regression
from sparsekd.methods import METHODS, PAPER
from sparsekd.pruning import LinearSchedule, ListedSchedule

from ..test_methods import Net, build, train, weights


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scope", ["cost", "layer"])
def test_a_schedule_counts_multiply_adds_unless_told_otherwise(name, scope):
    schedule = LinearSchedule(0.2, 2, final=0.6)
    assert schedule.unit == "macs" == ListedSchedule((0.5,), 2).unit
    method, student, optimizer = build(name, plan=(schedule, 10), scope=scope)
    assert method.pruner.scope == scope
    events = train(method, optimizer, range(1, 11))
    work = {"conv1": 25, "conv2": 25, "head": 1}
    dense = sum(work[each] * weight.numel() for each, weight in weights(student).items())
    left = sum(work[each] * student.get_submodule(each).num_kept for each in work)
    assert [event.unit for event in events] == ["macs"] * 3
    assert [event.removed_macs for event in events] == pytest.approx([0.2, 0.4, 0.6], abs=4 * 25 / dense)
    assert events[-1].macs == left == pytest.approx(0.4 * dense, abs=4 * 25)
    assert events[-1].predicted_us is None
    assert events[-1].kept == method.pruner.num_kept


@pytest.mark.parametrize("name", METHODS)
def test_methods_choose_by_cost_unless_told_otherwise(name):
    method = METHODS[name](Plain(Net(6), Regression()), LinearSchedule(0.2, 2, final=0.6), epochs=8)
    assert (method.pruner.scope, method.pruner.score) == ("cost", "lamp")
    assert {stage.schedule.unit for stage in method.stages} == {"macs"}
    assert PAPER[name].schedule.unit == "weights"


@pytest.mark.parametrize("name", METHODS)
def test_a_schedule_may_end_at_a_number(name):
    """Of multiply-adds: 25 pixels for each weight of a convolution, one for the head's."""
    example = (torch.randn(2, 2, 5, 5),)
    dense = 25 * (6 * 18 + 13 * 54) + 13
    schedule = LinearSchedule(0.2, 2, final=0.5 * dense)
    method, _, optimizer = build(name, plan=(schedule, 10), example_inputs=example, scope="cost")
    assert method.pruner.cost("macs") == (dense, dense)
    events = train(method, optimizer, range(1, 11))
    assert events[-1].target == pytest.approx(0.5) and events[-1].macs == pytest.approx(0.5 * dense, abs=4 * 25)
    listed = build(name, plan=(ListedSchedule((0.7 * dense, 0.5 * dense), 2), 10), example_inputs=example)[0]
    assert listed.prunes()[-1][1] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("schedule", "options", "says"),
    [
        (LinearSchedule(0.2, 2, final=9000), {}, "macs are counted on an example"),
        (LinearSchedule(0.2, 2, final=80, unit="latency_us"), {}, "latency_us needs the costs of layers"),
        (
            LinearSchedule(0.2, 2, final=9e9, unit="bytes"),
            {},
            "bytes=9e[+]09 is to stay, but the dense network has only",
        ),
        (LinearSchedule(0.2, 2, final=0.6), {"initial": LinearSchedule(0.1, 1, final=9000)}, "initial ends at an abs"),
    ],
)
def test_a_number_that_means_nothing_is_refused_at_once(schedule, options, says):
    with pytest.raises(ValueError, match=says):
        build("ss-sad", plan=(schedule, 10), **options)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("example", [True, False])
def test_a_floor_that_forbids_the_end_is_named_before_the_training(name, example):
    says = r"macs=0.9 cannot be reached: one unit of each layer stays, and 0.5 of its weights, .* 'conv2'"
    schedule = LinearSchedule(0.3, 2, final=0.9)
    method = None
    with pytest.raises(ValueError, match=says):
        given = {"example_inputs": (torch.randn(2, 2, 5, 5),)} if example else {}
        method, student, _ = build(name, plan=(schedule, 10), floor=0.5, **given)
        before = weights(student)
        method.loss((torch.randn(2, 2, 5, 5),), torch.randn(2, 13))
    if not example:  # nobody knew what a weight costs before the first loss
        assert all(torch.equal(before[key], value) for key, value in weights(student).items())
    assert (method is None) == example
