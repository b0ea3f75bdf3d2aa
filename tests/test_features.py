"""Distillation of networks that are no image classifiers: features of any rank, outputs of any form, any loss."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekd
from sparsekd import SAD, Classification, Distiller, FeatureTap, Regression, attention_transfer_loss
from sparsekd.distill import Custom, Plain
from sparsekd.features import common_depth, map_sizes, stats
from sparsekd.losses import AttentionTransfer
from sparsekd.tapped import has_channels_last

RANKS = {
    "[B, F]": (3, 8),
    "[B, C, T]": (3, 8, 6),
    "[B, C, H, W]": (3, 8, 4, 6),
    "[B, C, D, H, W]": (3, 8, 2, 4, 6),
}


def energies(feature):
    """As features.py defines them: [B, rows, columns] of mean_C F^2; of [B, F] every unit is a position."""
    if feature.dim() == 2:
        return feature.square()[:, None, :]
    energy = feature.square().mean(1)
    return energy[:, None] if feature.dim() == 3 else energy.flatten(1, 2) if feature.dim() == 5 else energy


@pytest.mark.parametrize("shape", RANKS.values(), ids=list(RANKS))
def test_means_and_energies_are_those_of_the_definition(shape):
    feature, depth = torch.randn(shape, dtype=torch.float64, requires_grad=True), shape[2] if len(shape) == 5 else 1
    means, energy = stats([feature], depth)
    torch.testing.assert_close(means, feature.flatten(2).mean(2) if len(shape) > 2 else feature)
    torch.testing.assert_close(energy, energies(feature).flatten(1))
    assert map_sizes([feature], depth) == [tuple(energies(feature).shape[1:])]
    torch.autograd.gradcheck(lambda f: stats([f], depth), (feature,))


def test_layers_of_several_ranks_lie_side_by_side():
    features = [torch.randn(shape) for shape in RANKS.values()]
    means, energy = stats(features, 1)
    assert means.shape == (3, 32) and energy.shape == (3, 8 + 6 + 24 + 24)
    alone = [stats([feature], 1) for feature in features]
    assert torch.equal(means, torch.cat([each[0] for each in alone], 1))
    assert torch.equal(energy, torch.cat([each[1] for each in alone], 1))


def test_volumes_of_different_depth_are_pooled_along_it():
    deep, shallow = torch.rand(2, 4, 6, 3, 5), torch.rand(2, 7, 2, 3, 5)
    assert common_depth([deep], [shallow]) == 2
    assert common_depth([deep], [torch.rand(2, 4, 3, 5)]) == 1
    energy = stats([deep], 2)[1].view(2, 2, 3, 5)
    torch.testing.assert_close(energy, deep.square().mean(1).view(2, 2, 3, 3, 5).mean(2))
    pooled = F.normalize(energy.flatten(1), dim=1)
    want = (F.normalize(energies(shallow).flatten(1), dim=1) - pooled).square().mean()
    torch.testing.assert_close(SAD.from_features([deep], [shallow], 8).eval()([deep], [shallow]), want)


@pytest.mark.parametrize("shape", RANKS.values(), ids=list(RANKS))
def test_a_student_is_pulled_to_its_teacher_whatever_the_rank(shape):
    torch.manual_seed(0)
    teacher = torch.rand(shape)
    student = torch.rand(shape).requires_grad_()
    distances = [attention_transfer_loss([student], [teacher])]
    expected = [F.normalize(energies(f).flatten(1), dim=1) for f in (student, teacher)]
    torch.testing.assert_close(distances[0], (expected[0] - expected[1]).square().mean())
    sad = SAD.from_features([teacher], [student], 8).eval()
    torch.testing.assert_close(sad([teacher], [student]), distances[0])  # one layer each: all the attention
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        sad([teacher], [student]).backward()
        optimizer.step()
    assert float(sad([teacher], [student]).detach()) < 0.2 * float(distances[0].detach())


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2, 2, 2, 2)], ids=str)
def test_other_ranks_are_refused(shape):
    feature = torch.rand(shape)
    with pytest.raises(ValueError, match=r"student feature 0 must be \[B, F\], \[B, C, T\]"):
        SAD.from_features([torch.rand(3, 4)], [feature])
    with pytest.raises(ValueError, match=r"must be \[B, F\], \[B, C, T\]"):
        attention_transfer_loss([feature], [feature])


def blocks() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "sparse": sparsekd.nn.SparseLinear(8, 8),
            "conv": nn.Conv1d(8, 8, 1),
            "sparse_conv": sparsekd.nn.SparseConv1d(8, 8, 1),
            "norm": nn.BatchNorm1d(8),
            "pool": nn.MaxPool1d(2),
            "tokens": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU()),
            "line": nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.ReLU()),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16),
            "both": nn.Sequential(nn.Conv1d(8, 8, 1), nn.Linear(8, 8)),
            "alone": nn.ReLU(),
        }
    )


@pytest.mark.parametrize(
    ("name", "last"),
    [
        *((name, True) for name in ("linear", "sparse", "tokens", "tokens.2", "encoder")),
        *((name, False) for name in ("conv", "sparse_conv", "norm", "pool", "line", "line.2")),
        *((name, None) for name in ("both", "alone")),
    ],
)
def test_where_the_channels_are_is_told_from_the_module(name, last):
    assert has_channels_last(blocks(), name) is last


LAYERS = [
    (nn.Linear(16, 16), (4, 16)),
    (nn.Linear(16, 16), (4, 7, 16)),
    (nn.Conv1d(16, 16, 1), (4, 16, 7)),
    (nn.Conv2d(16, 16, 1), (4, 16, 3, 5)),
    (nn.Conv3d(16, 16, 1), (4, 16, 2, 3, 5)),
]


@pytest.mark.parametrize("matching", [None, "transfer"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value)[:12])
def test_a_distiller_takes_features_of_any_rank(layer, shape, matching):
    teacher = nn.Sequential(copy.deepcopy(layer), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(shape)
    teacher(x)
    student = copy.deepcopy(teacher)
    nn.init.normal_(student[0].weight)
    distiller = Distiller(
        teacher,
        student,
        ["1"],
        ["1"],
        goal=Regression(),
        example_inputs=(x,),
        dim=8,
        matching=AttentionTransfer() if matching else None,
    )
    losses = distiller.loss((x,), torch.randn(4, 3))
    assert losses.sad > 0
    losses.total.backward()
    assert student[0].weight.grad.abs().sum() > 0
    if matching is None:
        assert distiller.sad.teacher_channels == (16,)


def test_tokens_and_images_with_channels_last():
    net, x = nn.Sequential(nn.Identity(), nn.Flatten(), nn.LazyLinear(2)), torch.randn(4, 7, 16)
    net(x)
    options = {"goal": Regression(), "example_inputs": (x,), "dim": 8}
    with pytest.raises(ValueError, match=r"'0' returns \(4, 7, 16\), .* give channels_last=True"):
        Distiller(net, copy.deepcopy(net), ["0"], ["0"], **options)
    for last, channels in ((True, 16), (False, 7)):
        made = Distiller(net, copy.deepcopy(net), ["0"], ["0"], **options, channels_last=last)
        assert made.sad.student_channels == (channels,)
    image = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(4 * 5 * 6, 2))
    options["example_inputs"] = (torch.randn(4, 5, 4, 6),)
    assert Distiller(copy.deepcopy(image), image, ["0"], ["0"], **options).sad.student_channels == (5,)
    assert Distiller(copy.deepcopy(image), image, ["0"], ["0"], **options, channels_last=True).sad.student_channels == (
        6,
    )


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.c, self.fc, self.wrap = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), wrap

    def forward(self, x):
        return self.wrap(self.fc(self.c(x).mean((2, 3))))


WRAPPERS = [
    (lambda y: {"logits": y, "aux": y}, "logits"),
    (lambda y: (y, y + 1), 0),
    (lambda y: [y + 1, y], -1),
    (lambda y: Answer(y, y), "logits"),
    (lambda y: Answer(y, y), lambda answer: answer.logits),
    (lambda y: y, "logits"),
    (lambda y: y, 0),
]


@pytest.mark.parametrize(("wrap", "output"), WRAPPERS)
def test_the_part_of_an_output_that_is_named_is_learned(wrap, output):
    x, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    torch.manual_seed(0)
    teacher, student = Wrapped(wrap), Wrapped(wrap)
    plain = copy.deepcopy(teacher), copy.deepcopy(student)
    for net in plain:
        net.wrap = nn.Identity()
    options = {"goal": Classification(), "alpha": 0.5, "beta": 0.0}
    got = Distiller(teacher, student, ["c"], ["c"], **options, output=output).loss((x,), target)
    want = Distiller(*plain, ["c"], ["c"], **options).loss((x,), target)
    assert torch.equal(got.total, want.total)
    assert torch.equal(Plain(student, Classification(), output=output).loss((x,), target).total, want.task)


@pytest.mark.parametrize(
    ("wrap", "output", "error", "says"),
    [
        (lambda y: {"out": y}, None, TypeError, r"returns a dict of 'out'; say which part .* with output="),
        (lambda y: (y, y), None, TypeError, "returns a tuple of 2: Tensor, Tensor"),
        (lambda y: {"out": y}, "logits", ValueError, "output='logits' is not in the model's output, a dict of 'out'"),
        (lambda y: (y,), 1, ValueError, "output=1 is not in the model's output, a tuple of 1"),
        (lambda y: Answer(y, y), "x", ValueError, "a Answer"),
        (lambda y: {"out": None}, "out", TypeError, "returns a NoneType"),
    ],
)
def test_other_outputs_are_named(wrap, output, error, says):
    distiller = Distiller(
        Wrapped(wrap), Wrapped(wrap), ["c"], ["c"], goal=Classification(), alpha=0.5, beta=0.0, output=output
    )
    with pytest.raises(error, match=says):
        distiller.loss((torch.randn(2, 3, 8, 8),), torch.tensor([0, 1]))


def test_any_loss_is_a_goal():
    x, target = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    teacher, student = Wrapped(nn.Identity()), Wrapped(nn.Identity())
    distiller = Distiller(teacher, student, ["c"], ["c"], goal=F.l1_loss, alpha=0, example_inputs=(x,), dim=8)
    losses = distiller.loss((x,), target)
    assert torch.equal(losses.task, F.l1_loss(student(x), target).detach())
    goal = Custom(nn.HuberLoss(), lambda student, teacher: (student - teacher).abs().sum())
    both = Distiller(teacher, student, ["c"], ["c"], goal=goal, alpha=2.0, beta=0).loss((x,), target)
    torch.testing.assert_close(both.kd, (student(x) - teacher(x)).abs().sum().detach())
    torch.testing.assert_close(both.total, both.task + 2 * both.kd)
    assert [metric.name for metric in goal.metrics] == ["loss"]

    class Part:
        def batches(self, size):
            return ((((x[i : i + size],), target[i : i + size])) for i in range(0, 4, size))

    scores = goal.scores(student, Part(), batch_size=3)
    assert scores["loss"] == pytest.approx(float(F.huber_loss(student(x), target)), rel=1e-5)
    with pytest.raises(ValueError, match=r"alpha = 0.9 needs a goal .*Custom\(loss, imitate\), or alpha=0"):
        Distiller(teacher, student, ["c"], ["c"], goal=F.l1_loss, example_inputs=(x,))
    with pytest.raises(TypeError, match="goal must be a Goal, got str"):
        Plain(student, "regression")


class Checkpointed(nn.Module):
    def __init__(self, reentrant=None, no_grad=False):
        super().__init__()
        self.reentrant, self.no_grad = reentrant, no_grad
        self.c, self.b = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        h = self.c(x)
        if self.no_grad:
            with torch.no_grad():
                h = self.b(h)
        else:
            h = self.b(h) if self.reentrant is None else checkpoint(self.b, h, use_reentrant=self.reentrant)
        return self.fc(h.mean((2, 3)))


@pytest.mark.parametrize("options", [{}, {"reentrant": False}], ids=str)
def test_features_inside_a_checkpoint_train_the_student(options):
    x, net = torch.randn(4, 3, 8, 8), Checkpointed(**options)
    _, features = FeatureTap(net, ["b.1"])(x)
    SAD.from_features(features, features, 8)([torch.rand(4, 8, 4, 4)], features).backward()
    assert net.b[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{"reentrant": True}, {"no_grad": True}], ids=str)
def test_features_without_a_graph_are_refused(options):
    x, net = torch.randn(4, 3, 8, 8), Checkpointed(**options)
    tap = FeatureTap(net, ["c", "b.1"])
    with pytest.raises(RuntimeError, match=r"'b.1' ran under no_grad .* use_reentrant=False"):
        tap(x)
    with torch.no_grad():
        assert len(tap(x)[1]) == 2
    assert len(FeatureTap(net.requires_grad_(False), ["b.1"])(x)[1]) == 1  # nothing to train: nothing is lost


def test_a_student_that_sad_cannot_reach_is_refused():
    class Detached(Checkpointed):
        def forward(self, x):
            return self.fc(self.b(self.c(x)).mean((2, 3)).detach())

    x = torch.randn(4, 3, 8, 8)
    net = Detached()
    net.c.requires_grad_(False)
    net.b.requires_grad_(False)
    distiller = Distiller(
        Checkpointed(), net, ["b.1"], ["b.1"], goal=Classification(), example_inputs=(x,), beta=1.0, dim=8
    )
    with pytest.raises(ValueError, match="no tapped feature of the student carries a graph"):
        distiller.loss((x,), torch.arange(4))
    with torch.no_grad():
        assert distiller.loss((x,), torch.arange(4)).sad > 0
