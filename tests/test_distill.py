"""Distiller: the sum of its terms, who trains and who does not, and what it refuses."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from sparsekd import BlockPattern, sparsify
from sparsekd.distill import Distiller, Losses, Plain
from sparsekd.goals import Classification, Click, Ranking, Regression
from sparsekd.losses import kd_loss
from sparsekd.taps import FeatureTap

from .tapped import hooks, network

TAPS = ["0.2", "1.2"]


def distiller(teacher=None, student=None, **options):
    options = {"goal": Classification(), "example_inputs": (torch.randn(2, 3, 8, 8),), "dim": 8, **options}
    return Distiller(teacher or network(6), student or network(4), TAPS, TAPS, **options)


def batch():
    return (torch.randn(4, 3, 8, 8),), torch.tensor([0, 4, 1, 1])


def test_distiller_classification_is_the_sum_of_its_terms():
    d = distiller(alpha=0.7, beta=30.0, temperature=3.0)
    inputs, target = batch()
    losses = d.loss(inputs, target)

    logits, student = FeatureTap(d.student, TAPS)(*inputs)
    with torch.no_grad():
        teacher_logits, teacher = FeatureTap(d.teacher, TAPS)(*inputs)
    torch.testing.assert_close(losses.task, nn.functional.cross_entropy(logits, target))
    torch.testing.assert_close(losses.kd, kd_loss(logits, teacher_logits, 3.0))
    torch.testing.assert_close(losses.sad, d.sad(teacher, student))
    torch.testing.assert_close(losses.total, losses.task + 0.7 * losses.kd + 30.0 * losses.sad)
    assert losses.total.requires_grad
    assert not any(t.requires_grad for t in (losses.task, losses.kd, losses.sad))


def test_layers_in_common_with_the_teacher_go_on_training():
    shared = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    teacher, student = (nn.Sequential(shared, nn.Flatten(), nn.Linear(512, 5)) for _ in range(2))
    d = Distiller(teacher, student, [], [], goal=Classification(), beta=0.0)
    student.train()
    for _ in range(3):
        d.loss(*batch())
    assert int(shared[1].num_batches_tracked) == 3 and all(module.training for module in student.modules())
    assert not teacher[2].training and "_common" not in dict(d.named_children()) and not list(d.parameters())


def test_distiller_regression():
    def regressor(channels):
        return nn.Sequential(network(channels), nn.Linear(5, 1), nn.Flatten(0))

    taps = ["0.0.2", "0.1.2"]
    inputs, target = (torch.randn(4, 3, 8, 8),), torch.rand(4)
    d = Distiller(regressor(6), regressor(4), taps, taps, goal=Regression(), example_inputs=inputs, alpha=0.5, beta=2.0)
    losses = d.loss(inputs, target)
    output = d.student(*inputs)
    torch.testing.assert_close(losses.task, (output - target).square().mean())
    torch.testing.assert_close(losses.kd, (output - d.teacher(*inputs)).square().mean())
    torch.testing.assert_close(losses.total, losses.task + 0.5 * losses.kd + 2.0 * losses.sad)
    with pytest.raises(ValueError, match=r"got output \(4,\) and target \(4, 1\)"):
        d.loss(inputs, target[:, None])


def test_distiller_trains_student_and_sad_but_not_the_teacher():
    d = distiller(alpha=0.9, beta=10.0)
    teacher_before = copy.deepcopy(d.teacher.state_dict())
    student_before = copy.deepcopy(d.student.state_dict())
    sad_before = copy.deepcopy(d.state_dict())
    optimizer = torch.optim.SGD([*d.student.parameters(), *d.parameters()], lr=0.1)
    d.train()
    d.teacher.train()  # whoever does this: the loss puts the teacher back
    inputs, target = batch()
    d.loss(inputs, target).total.backward()
    optimizer.step()
    assert not any(m.training for m in d.teacher.modules())
    assert all(p.grad is None for p in d.teacher.parameters())
    torch.testing.assert_close(d.teacher.state_dict(), teacher_before, rtol=0, atol=0)
    assert not torch.equal(d.student.state_dict()["0.0.weight"], student_before["0.0.weight"])
    assert not torch.equal(d.state_dict()["sad.teacher_position"], sad_before["sad.teacher_position"])


def test_distiller_owns_the_sad_alone():
    d = distiller()
    assert {id(p) for p in d.parameters()} == {id(p) for p in d.sad.parameters()}
    assert set(d.state_dict()) == {f"sad.{key}" for key in d.sad.state_dict()}
    d.student.train()
    d.eval()
    assert d.student.training and not d.sad.training
    other = distiller()
    other.load_state_dict(d.state_dict())
    torch.testing.assert_close(other.state_dict(), d.state_dict())


def test_distiller_leaves_no_trace_when_made():
    student = network(4)
    student[1].eval()
    modes, before = [m.training for m in student.modules()], copy.deepcopy(student.state_dict())
    distiller(student=student)
    assert [m.training for m in student.modules()] == modes
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)


class MustNotRun(nn.Module):
    def forward(self, x):
        raise AssertionError("this network was not to run")


def test_distiller_skips_terms_of_weight_zero():
    inputs, target = batch()
    plain = Distiller(MustNotRun(), network(4), [], [], goal=Classification(), alpha=0, beta=0)
    losses = plain.loss(inputs, target)
    assert losses.total.item() == losses.task.item() and losses.kd.item() == losses.sad.item() == 0
    assert not list(plain.parameters()) and not plain.state_dict()
    losses.total.backward()

    kd_only = distiller(beta=0, alpha=1.0)
    losses = kd_only.loss(inputs, target)
    assert losses.kd > 0 and losses.sad == 0 and hooks(kd_only.student) == hooks(kd_only.teacher) == 0

    sad_only = distiller(alpha=0, beta=1.0)
    losses = sad_only.loss(inputs, target)
    assert losses.sad > 0 and losses.kd == 0
    sad_only.beta = 0
    sad_only.teacher.forward = MustNotRun().forward
    assert sad_only.loss(inputs, target).sad == 0


def test_the_task_alone_leaves_the_teacher_out_and_the_weights_as_they_are():
    d = distiller(alpha=0.7, beta=30.0)
    d.teacher.forward = MustNotRun().forward
    inputs, target = batch()
    losses = d.task_loss(inputs, target)
    torch.testing.assert_close(losses.total, nn.functional.cross_entropy(d.student(*inputs), target))
    assert losses.task == losses.total and losses.kd == losses.sad == 0
    assert losses.total.requires_grad and not losses.task.requires_grad
    assert (d.alpha, d.beta) == (0.7, 30.0)
    with pytest.raises(TypeError, match=r"task_loss: inputs must be a tuple, got Tensor"):
        d.task_loss(inputs[0], target)


def test_plain_is_a_distiller_without_a_teacher():
    student, (inputs, target) = network(4), batch()
    plain = Plain(student, Classification())
    nothing = Distiller(MustNotRun(), student, [], [], goal=Classification(), alpha=0, beta=0)
    for losses in (plain.loss(inputs, target), plain.task_loss(inputs, target)):
        for name, value in nothing.loss(inputs, target).terms().items():
            assert torch.equal(losses.terms()[name], value)
        losses.total.backward()
    assert plain.student is student and student[0][0].weight.grad.abs().sum() > 0
    assert not list(plain.parameters()) and not plain.state_dict()
    with pytest.raises(TypeError, match=r"Plain.loss: inputs must be a tuple, got Tensor; pass \(x,\)"):
        plain.loss(inputs[0], target)
    with pytest.raises(TypeError, match=r"Plain: goal must be a Goal, got str 'classification'"):
        Plain(student, "classification")


def test_terms_have_names_and_no_graph():
    losses = distiller().loss(*batch())
    terms = losses.terms()
    assert list(terms) == ["loss", "task", "kd", "sad"]
    assert terms["loss"] == losses.total and not any(term.requires_grad for term in terms.values())

    @dataclasses.dataclass(frozen=True)
    class More(Losses):
        popularity: torch.Tensor

    one = torch.tensor(1.0)
    assert More(one, one, one, one, 2 * one).terms()["popularity"] == 2


def test_a_teacher_of_clicks_and_of_rankings_is_imitated():
    x, target = torch.randn(6, 5), torch.tensor([0, 1, 1, 0, 1, 0])
    teacher, student = (nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)) for _ in range(2))
    d = Distiller(teacher, student, [], [], goal=Click(), alpha=0.5, beta=0, temperature=2.0)
    losses = d.loss((x,), target)
    torch.testing.assert_close(losses.kd, Click().imitation(student(x), teacher(x), 2.0))
    torch.testing.assert_close(losses.total, Click().loss(student(x), target) + 0.5 * losses.kd)

    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.users, self.items = nn.Embedding(4, 3), nn.Embedding(7, 3)

        def forward(self, users, items, negatives):
            user = self.users(users)
            return (user * self.items(items)).sum(1), torch.einsum("bd,bkd->bk", user, self.items(negatives))

    inputs = torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([[5, 6], [0, 4]])
    d = Distiller(Factors(), Factors(), [], [], goal=Ranking(), alpha=0.5, beta=0)
    losses = d.loss(inputs, torch.empty(2, 0))
    losses.total.backward()
    outputs = d.student(*inputs), d.teacher(*inputs)
    torch.testing.assert_close(losses.kd, Ranking().imitation(*outputs, 4.0))
    torch.testing.assert_close(losses.task, Ranking().loss(outputs[0], torch.empty(2, 0)))
    assert d.student.items.weight.grad.abs().sum() > 0 and d.teacher.items.weight.grad is None


def test_distiller_follows_a_sparsified_student():
    d = distiller(student=network(16))
    sparsify(d.student, BlockPattern(16, 1), density=0.5)
    inputs, target = batch()
    losses = d.loss(inputs, target)
    losses.total.backward()
    assert losses.sad > 0
    assert all(p.grad is not None for p in d.student.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"goal": "ranking"}, TypeError, r"goal must be a Goal, got str 'ranking'; pass sparsekd.Regression\(\)"),
        ({"alpha": -1.0}, ValueError, "alpha must be finite and >= 0, got -1.0"),
        ({"beta": math.nan}, ValueError, "beta must be finite and >= 0, got nan"),
        ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
        ({"example_inputs": None}, TypeError, "beta > 0 needs example_inputs"),
        ({"matching": "at"}, TypeError, r"matching must be a module .* got str 'at'; .* AttentionTransfer\(\)"),
        ({"example_inputs": torch.zeros(2, 3, 8, 8)}, TypeError, "got Tensor; pass one small batch"),
    ],
)
def test_distiller_refuses_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        distiller(**options)


def test_distiller_takes_a_matching_that_is_false():
    class Norms(nn.ModuleList):  # empty, so false
        def forward(self, teacher_features, student_features):
            return student_features[0].norm()

    d = distiller(matching=Norms(), beta=2.0)
    inputs, target = batch()
    torch.testing.assert_close(d.loss(inputs, target).sad, FeatureTap(d.student, TAPS)(*inputs)[1][0].norm())


def test_distiller_refuses_bad_calls():
    inputs, target = batch()
    d = distiller(beta=0)
    with pytest.raises(TypeError, match=r"inputs must be a tuple, got Tensor; pass \(x,\)"):
        d.loss(inputs[0], target)
    d.beta = 1.0
    with pytest.raises(ValueError, match="made with beta=0"):
        d.loss(inputs, target)


def test_a_network_is_not_its_own_teacher():
    d = distiller(beta=0)
    with pytest.raises(ValueError, match="teacher and student are one module"):
        Distiller(d.student, d.student, [], [], goal=d.goal, beta=0.0)
