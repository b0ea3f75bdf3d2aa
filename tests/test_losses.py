"""Distillation losses against hand-written formulas."""

import copy
import doctest
import math

import pytest
import torch
from torch import nn

from sparsekd import losses
from sparsekd.losses import SAD, attention_transfer_loss, kd_loss, kd_regression_loss

from .tapped import BACKEND

HALF = [torch.float16, torch.bfloat16]


def features(channels_and_sizes, batch=3, dtype=torch.float64):
    return [torch.randn(batch, *shape, dtype=dtype).relu().requires_grad_() for shape in channels_and_sizes]


def means_of(layers):
    return torch.cat([f.mean((2, 3)) for f in layers], 1)


TEACHER = [(4, 4, 4), (5, 4, 4), (6, 2, 3)]
STUDENT = [(2, 4, 4), (3, 3, 2)]


# SAD: the formulas of the paper, one image and one pair of layers at a time


def loop_batch_norm(rows, weight, bias, eps):
    """[N][q] rows of scalars, normalised over N with the biased variance."""
    count, out = len(rows), []
    for j in range(len(rows[0])):
        column = [row[j] for row in rows]
        mean = sum(column) / count
        variance = sum((x - mean) ** 2 for x in column) / count
        out.append([(x - mean) / (variance + eps).sqrt() * weight[j] + bias[j] for x in column])
    return [[column[n] for column in out] for n in range(count)]


def loop_linear(rows, weight, bias):
    out_features, in_features = weight.shape
    return [
        [sum(weight[o, i] * row[i] for i in range(in_features)) + bias[o] for o in range(out_features)] for row in rows
    ]


def loop_layers(together, features):
    """Linear and batch norm of each layer's means: [layers][B][q]."""
    weights = [weight for run in together.weights for weight in run]
    out, q = [], weights[0].shape[1]
    for layer, (weight, feature) in enumerate(zip(weights, features, strict=True)):
        means = [[feature[b, c].mean() for c in range(feature.shape[1])] for b in range(feature.shape[0])]
        part = slice(layer * q, (layer + 1) * q)
        rows = loop_linear(means, weight.T, together.bias[layer, 0])
        out.append(loop_batch_norm(rows, together.norm.weight[part], together.norm.bias[part], together.norm.eps))
    return out


def loop_attention(sad, teacher, student):
    batch, layers_t, layers_s, q = teacher[0].shape[0], len(teacher), len(student), sad.dim
    query, key = loop_layers(sad.queries, teacher), loop_layers(sad.keys, student)
    rows = [[x.clamp_min(0) for x in key[s][b]] for b in range(batch) for s in range(layers_s)]
    linear, norm = sad.bilinear
    bilinear = loop_batch_norm(loop_linear(rows, linear.weight, linear.bias), norm.weight, norm.bias, norm.eps)
    attention = {}
    for b in range(batch):
        for t in range(layers_t):
            logits = []
            for s in range(layers_s):
                slice_t = bilinear[b * layers_s + s][t * q : (t + 1) * q]
                content = sum(k * x for k, x in zip(slice_t, query[t][b], strict=True))
                position = sum(sad.teacher_position[t] * sad.student_position[s])
                logits.append(((content + position) / math.sqrt(q)).exp())
            for s in range(layers_s):
                attention[b, t, s] = logits[s] / sum(logits)
    return attention


def loop_sad(sad, teacher, student):
    teacher = [f.detach() for f in teacher]
    attention = loop_attention(sad, teacher, student)
    batch, loss = teacher[0].shape[0], 0.0
    for t, feature_t in enumerate(teacher):
        for s, feature_s in enumerate(student):
            for b in range(batch):
                value_t = (feature_t[b] ** 2).mean(0)
                value_s = nn.functional.adaptive_avg_pool2d((feature_s[b] ** 2).mean(0)[None], value_t.shape)[0]
                value_t = value_t / (value_t**2).sum().sqrt()
                value_s = value_s / (value_s**2).sum().sqrt()
                loss = loss + attention[b, t, s] * ((value_s - value_t) ** 2).mean() / batch
    return loss


def randomized_sad(teacher_shapes, student_shapes, dim):
    """A float64 SAD whose batch-norm weights are not the trivial 1 and 0."""
    sad = SAD([s[0] for s in teacher_shapes], [s[0] for s in student_shapes], dim).double()
    with torch.no_grad():
        for parameter in sad.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return sad


def test_sad_equals_the_formulas_with_every_gradient():
    sad = randomized_sad(TEACHER, STUDENT, dim=4)
    teacher, student = features(TEACHER), features(STUDENT)
    got, want = sad(teacher, student), loop_sad(sad, teacher, student)
    torch.testing.assert_close(got, want)
    inputs = [*student, *sad.parameters()]
    assert (
        len(inputs) == 2 + (3 + 3) + (2 + 3) + 4 + 2
    )  # weights of each width and three more a side, bilinear, positions
    grads = torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)
    torch.testing.assert_close(*grads)
    # A bias before a batch norm cancels, and so does what the bilinear adds to every student layer alike: the
    # softmax does not see it. Everything else must really be reached.
    names = ["student.0", "student.1", *dict(sad.named_parameters())]
    reached = {name for name, grad in zip(names, grads[0], strict=True) if grad.abs().max() > 1e-9}
    assert reached == set(names) - {"queries.bias", "keys.bias", "bilinear.0.bias", "bilinear.1.bias"}


@pytest.mark.parametrize("teacher", [TEACHER, [(4, 2, 2), (4, 2, 2), (3, 2, 2), (4, 1, 1)]], ids=["", "equal widths"])
def test_sad_attention_equals_the_formulas_and_sums_to_one(teacher):
    sad = randomized_sad(teacher, STUDENT, dim=4)
    teacher, student = features(teacher), features(STUDENT)
    got = sad.attention(means_of(teacher), means_of(student))
    want = loop_attention(sad, teacher, student)
    assert got.shape == (3, len(teacher), 2)
    torch.testing.assert_close(got.sum(2), torch.ones(3, len(teacher), dtype=torch.float64))
    for index, value in want.items():
        torch.testing.assert_close(got[index], value)


NORMS = [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}]


@pytest.mark.parametrize("options", NORMS, ids=str)
def test_sad_projects_queries_as_its_modules_would(options):
    class Norm(nn.BatchNorm1d):  # any type but the one that SAD knows: its modules are called then
        pass

    sad = randomized_sad(TEACHER, STUDENT, dim=4)
    plain = copy.deepcopy(sad)
    for module, kind in ((sad, nn.BatchNorm1d), (plain, Norm)):
        module.bilinear[1] = kind(module.bilinear[1].num_features, **options).double()
        for parameter in module.bilinear[1].parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    teacher, student = features(TEACHER), features(STUDENT)
    for training in (True, False):
        results = []
        for module in (sad.train(training), plain.train(training)):
            means = means_of(student)
            attention = module.attention(means_of(teacher), means)
            results.append((attention, torch.autograd.grad(attention[..., 0].sum(), [means, *module.parameters()])))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(sad.state_dict(), plain.state_dict())
    assert sad.bilinear[1].num_batches_tracked == (1 if sad.bilinear[1].track_running_stats else None)


def test_sad_has_the_published_number_of_parameters():
    """WRN-40-2 to WRN-16-2 with q = 128: 543,488 by the layer shapes of the paper's code."""
    sad = SAD([32] * 6 + [64] * 6 + [128] * 6, [32] * 2 + [64] * 2 + [128] * 2)
    assert sum(p.numel() for p in sad.parameters()) == 543_488


def test_sad_gives_the_teacher_no_gradient():
    teacher, student = features(TEACHER), features(STUDENT)
    randomized_sad(TEACHER, STUDENT, 4)(teacher, student).backward()
    assert all(f.grad is None for f in teacher)
    assert all(f.grad.abs().sum() > 0 for f in student)


def test_sad_from_features():
    teacher, student = features(TEACHER), features(STUDENT)
    sad = SAD.from_features(teacher, student, dim=8)
    assert (sad.teacher_channels, sad.student_channels, sad.dim) == ((4, 5, 6), (2, 3), 8)
    assert sad(teacher, student).shape == ()


@pytest.mark.parametrize("zero", ["teacher", "student", "both"])
def test_sad_of_zero_features_is_finite(zero):
    teacher, student = features(TEACHER, dtype=torch.float32), features(STUDENT, dtype=torch.float32)
    for side, tensors in (("teacher", teacher), ("student", student)):
        if zero in (side, "both"):
            for tensor in tensors:
                tensor.data.zero_()
    sad = SAD([4, 5, 6], [2, 3], 8)
    loss = sad(teacher, student)
    loss.backward()
    assert loss.isfinite()
    assert all(t.grad.isfinite().all() for t in [*student, *sad.parameters()])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("autocast", [False, True])
def test_sad_of_half_features_equals_float32_on_the_same_numbers(dtype, autocast):
    sad = SAD([4, 5, 6], [2, 3], 8)
    teacher = [f.detach().to(dtype) for f in features(TEACHER)]
    student = [f.detach().to(dtype).requires_grad_() for f in features(STUDENT)]
    exact = [f.detach().float().requires_grad_() for f in student]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = sad(teacher, student)
    want = sad([f.float() for f in teacher], exact)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want)
    grads = torch.autograd.grad(loss, student)
    assert all(grad.dtype == dtype for grad in grads)
    torch.testing.assert_close(grads, tuple(g.to(dtype) for g in torch.autograd.grad(want, exact)))


def test_sad_of_channels_last_features():
    sad = SAD([4, 5, 6], [2, 3], 8)
    teacher, student = features(TEACHER, dtype=torch.float32), features(STUDENT, dtype=torch.float32)
    laid_out = [f.detach().to(memory_format=torch.channels_last).requires_grad_() for f in student]
    got, want = sad([f.to(memory_format=torch.channels_last) for f in teacher], laid_out), sad(teacher, student)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, laid_out), torch.autograd.grad(want, student))


def test_sad_compiles_in_one_graph(fresh_compiler):
    sad = SAD([4, 6], [2], 8)
    compiled = torch.compile(copy.deepcopy(sad), fullgraph=True, backend=BACKEND)
    teacher, student = features(TEACHER[::2], dtype=torch.float32), features(STUDENT[:1], dtype=torch.float32)
    results = []
    for module in (sad, compiled):
        loss = module(teacher, student)
        results.append((loss, torch.autograd.grad(loss, [*student, *module.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sad.state_dict(), compiled._orig_mod.state_dict())  # running statistics


def test_sad_batch_of_one():
    sad = SAD([4, 5, 6], [2, 3], 8).double()
    teacher, student = features(TEACHER, batch=1), features(STUDENT, batch=1)
    with pytest.raises(ValueError, match=r"batch of at least 2 \(batch norm\), got 1; drop the last"):
        sad(teacher, student)
    assert sad.eval()(teacher, student).isfinite()


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (TEACHER[:2], STUDENT, "expected 3 teacher features, got 2"),
        (TEACHER, [*STUDENT, STUDENT[0]], "expected 2 student features, got 3"),
        (STUDENT, TEACHER, "expected 3 teacher features, got 2"),
        ([*TEACHER[:2], (7, 2, 3)], STUDENT, r"teacher feature 2 must have 6 channels, got 7 in \(3, 7, 2, 3\)"),
        (TEACHER, [(3, 4, 4), (2, 3, 2)], "student feature 0 must have 2 channels, got 3"),
        (TEACHER, [(2, 4, 4), ()], r"student feature 1 must be \[B, F\], .* \[B, C, D, H, W\], got \(3,\)"),
    ],
)
def test_sad_refuses_other_features(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        SAD([4, 5, 6], [2, 3], 8).double()(features(teacher), features(student))


def test_sad_refuses_different_batches():
    with pytest.raises(ValueError, match=r"same batch size, got \[3, 4\]"):
        SAD([4, 5, 6], [2, 3], 8).double()(features(TEACHER), features(STUDENT, batch=4))


def test_sad_refuses_bad_arguments():
    with pytest.raises(ValueError, match="teacher_channels must be one positive channel count"):
        SAD([], [3])
    with pytest.raises(ValueError, match=r"student_channels .* got \[3, 0\]"):
        SAD([3], [3, 0])
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        SAD([3], [3], dim=0)
    with pytest.raises(TypeError, match=r"must be float32 or float64, got torch.bfloat16; call .float"):
        SAD([4, 5, 6], [2, 3], 8).bfloat16()(features(TEACHER), features(STUDENT))
    with pytest.raises(ValueError, match=r"teacher feature 0 must be \[B, F\]"):
        SAD.from_features([torch.zeros(2)], features(STUDENT))


# Losses on outputs and on single layers


def test_kd_loss_equals_the_formula():
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    temperature, want = 2.5, 0.0
    for b in range(3):
        p = [math.exp(x / temperature) for x in teacher[b].tolist()]
        q = [(x / temperature).exp() for x in student[b]]
        want = want + sum(x / sum(p) * (math.log(x / sum(p)) - (y / sum(q)).log()) for x, y in zip(p, q, strict=True))
    want = want * temperature**2 / 3
    got = kd_loss(student, teacher, temperature)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))
    kd_loss(student, teacher).backward()
    assert teacher.grad is None
    torch.testing.assert_close(kd_loss(student, teacher), kd_loss(student, teacher, 4.0))


def test_kd_loss_of_a_certain_teacher_is_finite():
    student = torch.zeros(2, 3, requires_grad=True)
    loss = kd_loss(student, torch.tensor([[0.0, 9999.0, 0.0]] * 2), temperature=1)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(math.log(3)))
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
def test_output_losses_of_half_types_are_float32(dtype):
    student, teacher = torch.randn(3, 4).to(dtype), torch.randn(3, 4).to(dtype)
    for loss in (kd_loss, kd_regression_loss):
        assert loss(student, teacher).dtype == torch.float32
        torch.testing.assert_close(loss(student, teacher), loss(student.float(), teacher.float()))


def test_kd_regression_loss():
    student = torch.tensor([1.0, 2.0], requires_grad=True)
    teacher = torch.tensor([3.0, 5.0], requires_grad=True)
    loss = kd_regression_loss(student, teacher)
    loss.backward()
    assert loss.item() == 6.5
    assert student.grad.tolist() == [-2.0, -3.0]
    assert teacher.grad is None


def test_output_losses_refuse_what_would_broadcast():
    with pytest.raises(ValueError, match=r"kd_regression_loss: .* same shape, got \(3,\) and \(3, 1\)"):
        kd_regression_loss(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"kd_loss: .* same shape, got \(3, 4\) and \(3, 1\)"):
        kd_loss(torch.zeros(3, 4), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"\[B, classes\], got \(3,\)"):
        kd_loss(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        kd_loss(torch.zeros(3, 4), torch.zeros(3, 4), 0)


def test_attention_transfer_equals_the_formula():
    student, teacher = features([(2, 4, 4), (3, 2, 3)]), features([(5, 4, 4), (3, 2, 3)])
    want = 0.0
    for f, g in zip(student, teacher, strict=True):
        for b in range(3):
            a, c = (f[b] ** 2).sum(0).flatten(), (g[b].detach() ** 2).sum(0).flatten()
            want = want + ((a / (a**2).sum().sqrt() - c / (c**2).sum().sqrt()) ** 2).sum() / (3 * a.numel())
    got = attention_transfer_loss(student, teacher)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))
    attention_transfer_loss(student, teacher).backward()
    assert all(f.grad is None for f in teacher)


def test_attention_transfer_refuses_other_features():
    with pytest.raises(ValueError, match="got 2 and 3; tap one teacher layer"):
        attention_transfer_loss(features(STUDENT), features(TEACHER))
    with pytest.raises(ValueError, match=r"pair 0 must agree in B, H and W, got student \(3, 2, 4, 4\) and teacher"):
        attention_transfer_loss(features(STUDENT[:1]), features(TEACHER[2:]))


def test_docstring_examples_run():
    result = doctest.testmod(losses)
    assert result.attempted > 0 and result.failed == 0
