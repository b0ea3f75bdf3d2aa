"""The three methods in a loop like anybody's: what goes when, what survives with which values, and resuming."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from sparsekd import BlockPattern
from sparsekd.distill import Distiller, Plain
from sparsekd.goals import Regression
from sparsekd.methods import LTHSAD, METHODS, PAPER, SPSAD, SSSAD, Method
from sparsekd.pruning import LinearSchedule, ListedSchedule

from .cases import through_files

SMALL = BlockPattern(4, 1)
GRANULARITIES = ("block", "filter", "unstructured")
PLANS = {
    "sp-sad": (LinearSchedule(0.2, 2, final=0.6, unit="weights"), 8),
    "lth-sad": (LinearSchedule(0.2, 2, final=0.6, unit="weights"), 8),
    "ss-sad": (LinearSchedule(0.2, 2, final=0.6, start=0.2, unit="weights"), 9),
}


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, 2 * width + 1, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * width + 1)
        self.relu2 = nn.ReLU()
        self.head = nn.Linear(2 * width + 1, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.head(self.relu2(self.bn2(self.conv2(x))).mean((2, 3))).squeeze(1)


def build(name, *, seed=0, granularity="block", kind=SGD, plan=None, **options):
    """(method, student, optimizer) of a fresh student; all from one seed. As in the paper unless told otherwise."""
    options = {"scope": PAPER[name].scope, **options}
    torch.manual_seed(seed)
    teacher, student = Net(12), Net(6)
    taps = ("relu1", "relu2")
    distiller = Distiller(
        teacher,
        student,
        taps,
        taps,
        example_inputs=(torch.randn(2, 2, 5, 5),),
        goal=Regression(),
        alpha=0.5,
        beta=5.0,
        dim=8,
    )
    schedule, epochs = plan or PLANS[name]
    pattern = SMALL if granularity == "block" else None
    method = METHODS[name](distiller, schedule, epochs=epochs, granularity=granularity, pattern=pattern, **options)
    settings = {"momentum": 0.9} if kind is SGD else {}
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = kind(parameters, lr=0.01, weight_decay=1e-2, **settings)
    method.attach(optimizer)
    return method, student, optimizer


BATCHES = 3


def batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(BATCHES):
        x = torch.randn(4, 2, 5, 5, generator=generator)
        yield (x,), x.square().mean((1, 2, 3))


def train(method, optimizer, epochs, after_step=lambda: None):
    """The loop; returns the events of the epochs that pruned."""
    events = []
    for epoch in epochs:
        for inputs, target in batches(epoch):
            optimizer.zero_grad()
            losses = method.loss(inputs, target)
            losses.total.backward()
            optimizer.step()
            method.after_step()
            after_step()
        event = method.after_boundary(epoch)
        after_step()
        if event:
            events.append(event)
    return events


def weights(student):
    names = ("conv1", "conv2", "head")
    layers = {name: student.get_submodule(name) for name in names}
    dense = {name: layer.to_dense() if hasattr(layer, "values") else layer for name, layer in layers.items()}
    return {name: layer.weight.detach().clone() for name, layer in dense.items()}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("name", METHODS)
def test_targets_are_met_and_hold_after_every_step(name, kind, granularity):
    method, student, optimizer = build(name, granularity=granularity, kind=kind)
    largest = {"block": 4, "filter": 9 * 6, "unstructured": 1}[granularity]
    number = method.pruner.num_weights
    steps = []

    def after_step():
        method.pruner.check()
        assert sum(int((weight != 0).sum()) for weight in weights(student).values()) <= method.pruner.num_kept
        steps.append(method.pruner.num_kept)

    events = train(method, optimizer, range(1, method.epochs + 1), after_step)
    assert [(event.boundary, event.stage) for event in events] == {
        "sp-sad": [(2, "distil"), (4, "distil"), (6, "distil")],
        "lth-sad": [(2, "distil"), (4, "distil"), (6, "distil")],
        "ss-sad": [(2, "ticket"), (6, "distil"), (8, "distil")],
    }[name]
    for event, target in zip(events, (0.2, 0.4, 0.6), strict=True):
        assert event.target == pytest.approx(target)
        assert abs(number - event.kept - event.target * number) < largest
        assert event.removed_share == 1 - event.kept / number
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == events[-1].kept


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sp_survivors_keep_their_values_and_lose_their_momentum(granularity):
    method, student, optimizer = build("sp-sad", granularity=granularity)
    train(method, optimizer, [1])
    for inputs, target in batches(2):
        method.loss(inputs, target).total.backward()
        optimizer.step()
    before = weights(student)
    event = method.after_boundary(2)
    assert not event.rewound
    for name, weight in weights(student).items():
        assert torch.equal(weight, before[name] * (weight != 0))
        assert bool((weight != 0).any())
    forgotten = [parameter not in optimizer.state for parameter in student.parameters()]
    assert all(forgotten)
    assert any(bool(optimizer.state[p]["momentum_buffer"].any()) for p in method.parameters())


def test_sp_prunes_every_layer_alike():
    method, student, optimizer = build("sp-sad", granularity="unstructured")
    with torch.no_grad():
        student.conv2.weight.mul_(0.01)
    train(method, optimizer, [1, 2])
    for weight in weights(student).values():
        assert float((weight == 0).double().mean()) == pytest.approx(0.2, abs=1 / weight.numel())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rewind", ["all", "weights"])
def test_lth_survivors_go_back_to_epoch_0_bit_for_bit(granularity, rewind):
    method, student, optimizer = build("lth-sad", granularity=granularity, rewind=rewind)
    first = weights(student)
    running = student.bn1.running_mean.clone()
    for epoch in range(1, method.epochs + 1):
        for inputs, target in batches(epoch):
            optimizer.zero_grad()
            method.loss(inputs, target).total.backward()
            optimizer.step()
            method.after_step()
        trained = weights(student)
        assert not torch.equal(trained["conv2"], first["conv2"])
        event = method.after_boundary(epoch)
        if event is None:
            assert all(torch.equal(weight, trained[name]) for name, weight in weights(student).items())
            continue
        assert event.rewound
        for name, weight in weights(student).items():
            assert torch.equal(weight, first[name] * (weight != 0))
            assert not torch.equal(weight, trained[name])
        assert torch.equal(student.bn1.running_mean, running) == (rewind == "all")
        assert not any(parameter in optimizer.state for parameter in student.parameters())


def test_lth_keeps_what_was_largest_after_training():
    method, student, optimizer = build("lth-sad", granularity="unstructured")
    at_first = weights(student)
    train(method, optimizer, [1])
    for inputs, target in batches(2):
        method.loss(inputs, target).total.backward()
        optimizer.step()
    trained = torch.cat([weight.flatten().abs() for weight in weights(student).values()])
    method.after_boundary(2)
    kept = torch.cat([weight.flatten() != 0 for weight in weights(student).values()])
    first = torch.cat([weight.flatten().abs() for weight in at_first.values()])
    assert trained[kept].min() >= trained[~kept].max()
    assert first[kept].min() < first[~kept].max()


def test_late_rewinding():
    method, student, optimizer = build("lth-sad", rewind_to=1)
    train(method, optimizer, [1])
    late = weights(student)
    train(method, optimizer, [2])
    assert all(torch.equal(weight, late[name] * (weight != 0)) for name, weight in weights(student).items())


def test_ss_asks_the_teacher_only_in_its_second_stage():
    method, student, optimizer = build("ss-sad")
    teacher = method.distiller.teacher
    calls = teacher.calls
    first = weights(student)
    stages = []
    for epoch in range(1, method.epochs + 1):
        stages.append(method.stage)
        loss = method.loss(*next(batches(epoch)))
        assert (loss.total > loss.task) == (method.stage == "distil")
        before = weights(student)
        events = train(method, optimizer, [epoch])
        if epoch == 2:
            assert all(torch.equal(weight, first[name] * (weight != 0)) for name, weight in weights(student).items())
        elif events:
            assert not events[0].rewound
            assert not torch.equal(before["conv2"], first["conv2"])
    assert stages == ["ticket"] * 4 + ["distil"] * 5
    assert teacher.calls - calls == 5 * (BATCHES + 1)
    assert (method.distiller.alpha, method.distiller.beta) == (0.5, 5.0)


def test_rounds_are_what_no_rewinding_interrupts():
    def rounds(name):
        method = build(name)[0]
        return [tuple(method.round(epoch)) for epoch in range(1, method.epochs + 1)]

    lth = [("distil", 1, 2), ("distil", 3, 4), ("distil", 5, 6), ("distil", 7, 8)]
    assert rounds("lth-sad") == [one for one in lth for _ in range(2)]
    assert rounds("sp-sad") == [("distil", 1, 8)] * 8
    assert rounds("ss-sad") == [("ticket", 1, 2)] * 2 + [("ticket", 3, 4)] * 2 + [("distil", 5, 9)] * 5


@pytest.mark.parametrize("kind", ["distilled", "plain"])
def test_a_method_that_prunes_nothing_has_the_hooks_of_all(kind):
    torch.manual_seed(0)
    student, teacher = Net(6), Net(12)
    taps = ("relu1", "relu2")
    learner = Plain(student, Regression())
    if kind == "distilled":
        learner = Distiller(teacher, student, taps, taps, goal=Regression(), example_inputs=(torch.randn(2, 2, 5, 5),))
    method = Method(learner)
    optimizer = SGD([*student.parameters(), *method.parameters()], lr=0.01)
    method.attach(optimizer)
    before = weights(student)
    assert train(method, optimizer, range(1, 3)) == []
    after = weights(student)
    assert method.student is student and type(student.conv2) is nn.Conv2d
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert teacher.calls == (1 + 2 * BATCHES if kind == "distilled" else 0)
    state = through_files(method.state_dict())
    other = Method(copy.deepcopy(learner))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(state)
    torch.testing.assert_close(other.distiller.state_dict(), learner.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"expected the state of .*none.* got .*sp-sad"):
        method.load_state_dict(build("sp-sad")[0].state_dict())


def test_a_plain_student_is_pruned_by_any_method():
    method = SSSAD(Plain(Net(6), Regression()), *PLANS["ss-sad"][:1], epochs=9, pattern=SMALL)
    optimizer = SGD(method.student.parameters(), lr=0.01)
    method.attach(optimizer)
    assert [event.stage for event in train(method, optimizer, range(1, 10))] == ["ticket", "distil", "distil"]
    assert method.pruner.removed_share == pytest.approx(0.6, abs=0.01)


def test_random_scores_choose_otherwise():
    kept = {}
    for score in ("magnitude", "random"):
        method, student, optimizer = build("lth-sad", score=score)
        train(method, optimizer, range(1, 7))
        kept[score] = torch.cat([weight.flatten() != 0 for weight in weights(student).values()])
    assert int(kept["random"].sum()) == pytest.approx(int(kept["magnitude"].sum()), abs=4)
    assert not torch.equal(kept["random"], kept["magnitude"])


@pytest.mark.parametrize("killed_after", [3, 4])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name, granularity, killed_after):
    def new():
        score = "random" if killed_after == 3 else "magnitude"
        rewind_to = 0 if name == "sp-sad" else 1
        return build(name, granularity=granularity, kind=AdamW, score=score, rewind_to=rewind_to)

    whole = new()
    expected_events = train(whole[0], whole[2], range(1, whole[0].epochs + 1))
    method, student, optimizer = new()
    train(method, optimizer, range(1, killed_after + 1))
    saved = through_files(method.state_dict()), through_files(student.state_dict()), optimizer.state_dict()
    method, student, optimizer = new()
    for part, state in zip((method, student, optimizer), saved, strict=True):
        part.load_state_dict(state)
    method.pruner.check()
    events = train(method, optimizer, range(killed_after + 1, method.epochs + 1))
    assert events == [event for event in expected_events if event.boundary > killed_after]
    for part, other in ((student, whole[1]), (method.distiller, whole[0].distiller)):
        expected = other.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in part.state_dict().items())


def test_the_state_of_another_training_is_refused():
    state = build("lth-sad")[0].state_dict()
    for other in (build("sp-sad")[0], build("lth-sad", plan=(LinearSchedule(0.1, 2, final=0.3), 8))[0]):
        with pytest.raises(ValueError, match=r"load_state_dict: expected the state of .* make the method as it was"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="another model or another Pruner"):
        build("lth-sad", exclude=["head"])[0].load_state_dict(state)


def test_an_optimizer_is_needed_before_the_first_epoch_ends():
    torch.manual_seed(0)
    distiller = Distiller(Net(4), Net(4), (), (), goal=Regression(), alpha=0.5, beta=0.0)
    method = SPSAD(distiller, LinearSchedule(0.2, 2, final=0.6), epochs=8)
    with pytest.raises(
        RuntimeError, match=r"no attached optimizer holds the weights of conv1, conv2, head; call attach"
    ):
        method.after_boundary(1)


@pytest.mark.parametrize(
    ("name", "plan", "options", "says"),
    [
        ("lth-sad", (LinearSchedule(0.2, 2, final=0.6), 6), {}, "3 prunes every 2 epochs reach 0.6 after epoch 6"),
        ("ss-sad", (LinearSchedule(0.2, 2, final=0.6, start=0.2), 8), {}, "2 prunes every 2 epochs need at least 9"),
        ("ss-sad", (LinearSchedule(0.2, 2, final=0.6), 7), {}, "2 prunes every 2 epochs need at least 8 epochs"),
        (
            "ss-sad",
            None,
            {"initial": LinearSchedule(0.1, 1, final=0.2, unit="macs")},
            "both stages must count the same",
        ),
        (
            "ss-sad",
            None,
            {"initial": LinearSchedule(0.1, 1, final=0.3, unit="weights")},
            "starts at 0.2 but the first ends at 0.3",
        ),
        ("ss-sad", None, {"initial_epochs": 2}, "1 prunes every 2 epochs reach 0.2 after epoch 2"),
        ("lth-sad", None, {"rewind": "some"}, "rewind must be 'all' or 'weights', got 'some'"),
        ("lth-sad", None, {"rewind_to": 2}, "rewind_to must come before the first prune, after epoch 2, got 2"),
        ("sp-sad", None, {"rewind_to": 1}, "survivors keep their values, got rewind_to=1"),
        ("sp-sad", None, {"include": ["cnn.*"]}, r"include pattern 'cnn\.\*' names no"),
    ],
)
def test_bad_options(name, plan, options, says):
    with pytest.raises(ValueError, match=says):
        build(name, plan=plan, **options)


@pytest.mark.parametrize("epoch", [0, 9])
def test_an_epoch_outside_the_training_is_refused(epoch):
    with pytest.raises(ValueError, match=f"SPSAD: epochs go from 1 to 8, got {epoch}"):
        build("sp-sad")[0].after_boundary(epoch)


@pytest.mark.parametrize(
    ("schedule", "epochs", "stages", "prunes"),
    [
        (LinearSchedule(0.2, 2, final=0.6), 8, [3, 5], [(2, 0.2), (5, 0.4), (7, 0.6)]),
        (LinearSchedule(0.2, 2, final=0.6), 20, [4, 16], [(2, 0.2), (6, 0.4), (8, 0.6)]),
        (LinearSchedule(0.6, 2, final=0.6), 8, [4, 4], [(2, 0.3), (6, 0.6)]),
        (ListedSchedule((0.3, 0.5), 2), 8, [4, 4], [(2, 0.3), (6, 0.5)]),
        (ListedSchedule((0.5,), 2), 8, [4, 4], [(2, 0.25), (6, 0.5)]),
    ],
)
def test_ss_takes_the_schedules_of_the_others(schedule, epochs, stages, prunes):
    method = build("ss-sad", plan=(schedule, epochs))[0]
    assert [stage.epochs for stage in method.stages] == stages
    assert method.prunes() == [(epoch, pytest.approx(share)) for epoch, share in prunes]


def test_names_and_notes():
    assert METHODS == {"sp-sad": SPSAD, "lth-sad": LTHSAD, "ss-sad": SSSAD}
    assert "masks only, nothing gets faster" in str(build("sp-sad", granularity="unstructured")[0])
    assert str(build("lth-sad")[0]).startswith("lth-sad: Pruner(block 4x1, global magnitude: 0.0% of")


@pytest.mark.parametrize("name", METHODS)
def test_the_published_recipes_can_be_followed(name):
    recipe = PAPER[name]
    method = build(name, plan=(recipe.schedule, recipe.epochs))[0]
    reported = {"sp-sad": 0.6, "lth-sad": 0.6, "ss-sad": 0.7}[name]
    stage = method.stages[-1]
    shares = [stage.schedule.removed_after(epoch) for epoch in range(1, stage.epochs)]
    assert any(share == pytest.approx(reported) for share in shares)
    assert stage.epochs == {"sp-sad": 160, "lth-sad": 1200, "ss-sad": 200}[name]
