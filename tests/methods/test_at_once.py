"""Pruned before the first step: what goes, by which score, and that the look at the batches leaves no trace."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD

from sparsekd import BlockPattern
from sparsekd.distill import Distiller, Plain
from sparsekd.goals import Regression
from sparsekd.methods import METHODS, Method
from sparsekd.methods.saliency import saliency
from sparsekd.pruning import LinearSchedule, ListedSchedule

from ..cases import through_files

AT_ONCE = ListedSchedule((0.6,), every=2, first=0, unit="weights")
SCORES = ("snip", "taylor", "fisher")


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        return self.head(self.relu(self.norm(self.conv(x))).mean((2, 3))).squeeze(1)


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(6, 2, 5, 5, generator=generator) for _ in range(count)]
    return [((x,), x.square().mean((1, 2, 3))) for x in inputs]


def build(name, schedule=AT_ONCE, epochs=6, *, attached=True, student=None, **options):
    torch.manual_seed(0)
    teacher, student = Net(8), Net(8) if student is None else student
    goal, taps, example = Regression(), ("relu",), (torch.randn(2, 2, 5, 5),)
    distiller = Distiller(teacher, student, taps, taps, example_inputs=example, goal=goal, alpha=0.5, beta=5.0, dim=8)
    options = {"scope": "global", "pattern": BlockPattern(4, 1), **options}
    method = METHODS[name](distiller, schedule, epochs=epochs, **options)
    optimizer = SGD([*student.parameters(), *method.parameters()], lr=0.05, momentum=0.9)
    if attached:
        method.attach(optimizer)
    return method, student, optimizer


def train(method, optimizer, epochs):
    events = []
    for epoch in epochs:
        for inputs, target in batches():
            optimizer.zero_grad()
            method.loss(inputs, target).total.backward()
            optimizer.step()
            method.after_step()
        events.append(method.after_boundary(epoch))
    return [event for event in events if event]


@pytest.mark.parametrize("name", METHODS)
def test_all_goes_before_the_first_step(name):
    planned = [(0, 0.6)] if name != "ss-sad" else [(0, 0.3), (4, 0.6)]
    method, student, optimizer = build(name, epochs=8)
    first = copy.deepcopy(student.state_dict())
    event = method.before_training(batches())
    assert method.prunes() == planned and method.round(1).first == 1
    assert (event.boundary, event.target) == planned[0] and event.rewound == (name != "sp-sad")
    assert event.removed_share == pytest.approx(planned[0][1], abs=0.03)
    left = student.conv.values
    assert left.shape != first["conv.values"].shape and bool(torch.isin(left, first["conv.values"]).all())
    assert method.before_training() is None  # once
    later = train(method, optimizer, range(1, 9))
    assert [(each.boundary, each.target) for each in later] == planned[1:]
    assert method.pruner.removed_share == pytest.approx(0.6, abs=0.03)


def test_a_schedule_that_begins_at_once_goes_on():
    method, _, optimizer = build("lth-sad", LinearSchedule(0.2, 2, final=0.6, first=0, unit="weights"), 7)
    assert method.before_training(batches()).target == pytest.approx(0.2)
    assert [(each.boundary, each.target) for each in train(method, optimizer, range(1, 8))] == [
        (2, pytest.approx(0.4)),
        (4, pytest.approx(0.6)),
    ]


def test_nothing_is_trained_before_the_prune_that_comes_first():
    method, _, _ = build("sp-sad")
    with pytest.raises(
        RuntimeError, match=r"SPSAD\.loss: the schedule prunes before the first step; call before_train"
    ):
        method.loss(*batches(1)[0])
    method, _, _ = build("sp-sad", attached=False)
    with pytest.raises(RuntimeError, match=r"SPSAD\.before_training: no attached optimizer holds the weights of conv"):
        method.before_training()
    usual, student, _ = build("sp-sad", LinearSchedule(0.2, 2, final=0.6, unit="weights"), 7)
    assert usual.before_training() is None and usual.pruner.removed_share == 0.0
    assert Method(Plain(student, Regression())).before_training(batches()) is None


@pytest.mark.parametrize("score", SCORES)
def test_the_saliency_of_the_batches_chooses_and_leaves_no_trace(score):
    method, student, _ = build("sp-sad", first_score=score)
    before, meta = copy.deepcopy(student.state_dict()), copy.deepcopy(method.distiller.state_dict())
    wanted = saliency(method.pruner, [lambda b=b: method._loss(*b).total for b in batches()], score)
    student.load_state_dict(before)
    method.distiller.load_state_dict(meta)
    method.before_training(iter(batches()))
    scores = torch.cat([each.flatten() for each in wanted.values()])
    kept = torch.cat([mask.flatten() for mask in method.pruner.masks().values()])
    assert 0 < kept.sum() < len(kept) and scores[kept].min() >= scores[~kept & (scores > 0)].max()
    assert all(parameter.grad is None for parameter in [*student.parameters(), *method.parameters()])
    now = student.state_dict()
    dead = student.conv.dead_outputs()
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        there = now[name] if now[name].dim() == 0 else now[name][~dead]
        assert torch.equal(there, before[name] if now[name].dim() == 0 else before[name][~dead])
    for name, value in method.distiller.state_dict().items():
        assert torch.equal(value, meta[name])


def test_snip_is_the_sensitivity_to_gates_on_the_weights():
    method, student, _ = build("sp-sad", first_score="snip", student=Net(8).eval())
    (inputs, target), *_ = batches(1)
    found = saliency(method.pruner, [lambda: method._loss(inputs, target).total], "snip")
    method._loss(inputs, target).total.backward()
    weight = student.conv.values
    blocks = (weight * weight.grad).abs().detach().double().mean((1, 2))
    shown = found["conv"].permute(2, 3, 0, 1) if found["conv"].dim() == 4 else found["conv"]
    assert torch.allclose(shown.flatten().sort().values, blocks.sort().values)


def test_a_saliency_that_says_nothing_is_refused():
    student = Net(8)
    nn.init.zeros_(student.head.weight)
    method, _, _ = build("ss-sad", epochs=8, student=student, first_score="snip")  # its first stage has no teacher
    says = r"no gradient reaches conv and all weights of head are 0, so that first_score='snip' says nothing of it"
    with pytest.raises(ValueError, match=says):
        method.before_training(batches())
    assert method.pruner.removed_share == 0.0
    student = Net(8)
    nn.init.zeros_(student.conv.weight)
    nn.init.ones_(student.norm.bias)  # so that the head sees something
    method, _, _ = build("sp-sad", student=student, first_score="snip")
    with pytest.raises(ValueError, match=r"sparsekd\.methods: all weights of conv are 0, so that first_score='snip'"):
        method.before_training(batches())
    with pytest.raises(ValueError, match=r"needs some batches; call before_training\(batches\)"):
        method.before_training()
    masks, _, _ = build("sp-sad", first_score="snip", granularity="unstructured", pattern=None)
    with pytest.raises(ValueError, match="judges blocks, got granularity 'unstructured'"):
        masks.before_training(batches())


@pytest.mark.parametrize(
    ("name", "schedule", "options", "says"),
    [
        ("sp-sad", AT_ONCE, {"first_score": "luck"}, "first_score must be one of snip, taylor, fisher, or None"),
        ("sp-sad", ListedSchedule((0.6,), 2), {"first_score": "snip"}, "but the first one comes after epoch 2"),
        ("lth-sad", AT_ONCE, {"rewind_to": 1}, "rewind_to must come before the first prune, after epoch 0, got 1"),
        ("ss-sad", ListedSchedule((0.6,), 2, start=0.3, first=0), {}, "to prune before training give initial first=0"),
    ],
)
def test_bad_options(name, schedule, options, says):
    with pytest.raises(ValueError, match=says):
        build(name, schedule, **options)


@pytest.mark.parametrize("name", METHODS)
def test_a_student_pruned_at_once_goes_on_from_its_state(name):
    method, student, optimizer = build(name, epochs=8, first_score="snip")
    method.before_training(batches())
    train(method, optimizer, [1])
    saved = through_files(method.state_dict()), through_files(student.state_dict()), optimizer.state_dict()
    resumed, student_again, optimizer_again = build(name, epochs=8, first_score="snip")
    for part, state in zip((resumed, student_again, optimizer_again), copy.deepcopy(saved), strict=True):
        part.load_state_dict(state)
    assert resumed.before_training(batches()) is None
    for one, its_optimizer in ((method, optimizer), (resumed, optimizer_again)):
        train(one, its_optimizer, range(2, 9))
    for ours, theirs in zip(student.parameters(), student_again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
