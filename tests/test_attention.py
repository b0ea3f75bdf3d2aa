"""feature_stats and match_maps against hand-written loops, gradients included."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from sparsekd.ops.attention import feature_stats, match_maps, normalize_map

HALF = [torch.float16, torch.bfloat16]


def loop_stats(features):
    """Means and energy from their definitions, one number at a time."""
    batch, channels, height, width = features.shape
    means = [[sum(features[b, c].flatten()) / (height * width) for c in range(channels)] for b in range(batch)]
    energy = [
        [
            sum(features[b, c, y, x] ** 2 for c in range(channels)) / channels
            for y in range(height)
            for x in range(width)
        ]
        for b in range(batch)
    ]
    return torch.stack([torch.stack(row) for row in means]), torch.stack([torch.stack(row) for row in energy])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_feature_stats_equals_the_definition(layout):
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    got = feature_stats(features)
    want = loop_stats(features)
    assert got[0].shape == (2, 3) and got[1].shape == (2, 20)
    torch.testing.assert_close(got, want)
    weights = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    (grad_got,) = torch.autograd.grad(sum((g * w).sum() for g, w in zip(got, weights, strict=True)), features)
    (grad_want,) = torch.autograd.grad(sum((g * w).sum() for g, w in zip(want, weights, strict=True)), features)
    torch.testing.assert_close(grad_got, grad_want)
    assert grad_got.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(2, 3, 2, 3), (1, 1, 1, 1), (3, 2, 1, 4)], ids=str)
def test_feature_stats_gradcheck(shape):
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(feature_stats, features)
    assert gradgradcheck(feature_stats, features)


def test_feature_stats_of_non_contiguous_features():
    features = torch.randn(4, 6, 5, 7)[::2, 1::2, :, ::3].requires_grad_()
    torch.testing.assert_close(feature_stats(features), feature_stats(features.contiguous()))
    means, energy = feature_stats(features)
    (got,) = torch.autograd.grad(means.sum() + energy.sum(), features)
    torch.testing.assert_close(got, 1 / 15 + 2 * features.detach() / 3)


@pytest.mark.parametrize("dtype", HALF)
def test_feature_stats_of_half_types_accumulate_in_float32(dtype):
    features = (300 * torch.rand(2, 64, 16, 16)).to(dtype).requires_grad_()  # squares overflow float16
    means, energy = feature_stats(features)
    want = features.detach().double()
    assert means.dtype == energy.dtype == torch.float32
    torch.testing.assert_close(means.double(), want.mean((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(energy.double(), want.square().mean(1).flatten(1), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(means.sum() + energy.sum(), features)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, (1 / 256 + 2 * want / 64).to(dtype))  # rounded once


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (1, 2, 3, 4, 5)], ids=str)
def test_feature_stats_refuses_other_ranks(shape):
    with pytest.raises(ValueError, match=r"must be \[B, C, H, W\], got \("):
        feature_stats(torch.zeros(shape))


def test_feature_stats_refuses_integers():
    with pytest.raises(TypeError, match=r"floating point, got torch.int64"):
        feature_stats(torch.zeros(1, 2, 3, 4, dtype=torch.int64))


def test_normalize_map_keeps_zero_rows_zero():
    maps = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(normalize_map(maps), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def loop_match(attention, teacher_maps, student_maps):
    """The loss of AFD, pair by pair and image by image."""
    batch = attention.shape[0]
    loss = torch.zeros((), dtype=attention.dtype)
    for t, teacher_map in enumerate(teacher_maps):
        height, width = teacher_map.shape[1:]
        for b in range(batch):
            teacher = teacher_map[b].reshape(-1)
            teacher = teacher / max(teacher.norm(), 1e-12)
            for s, student_map in enumerate(student_maps):
                student = torch.stack(
                    [_pooled_pixel(student_map[b], y, x, height, width) for y in range(height) for x in range(width)]
                )
                student = student / student.norm().clamp_min(1e-12)
                loss = loss + attention[b, t, s] * ((student - teacher) ** 2).mean() / batch
    return loss


def _pooled_pixel(energy_map, y, x, height, width):
    """Adaptive average pooling: output pixel y covers input rows floor(y*H/h) to ceil((y+1)*H/h)."""
    rows, columns = energy_map.shape
    top, bottom = y * rows // height, -((y + 1) * rows // -height)
    left, right = x * columns // width, -((x + 1) * columns // -width)
    return energy_map[top:bottom, left:right].mean()


def _maps(*sizes):
    return [torch.rand(2, *size, dtype=torch.float64, requires_grad=True) for size in sizes]


def test_match_maps_equals_the_loops():
    """Teacher sizes repeat, differ in shape at equal area, and are smaller, equal and larger than the student's."""
    teacher = _maps((4, 4), (2, 3), (4, 4), (3, 2), (1, 1))
    student = _maps((4, 4), (5, 3), (2, 2))
    attention = torch.rand(2, 5, 3, dtype=torch.float64, requires_grad=True)
    got, want = (f(attention, teacher, student) for f in (match_maps, loop_match))
    torch.testing.assert_close(got, want)
    inputs = [attention, *student]
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_match_maps_leaves_the_teacher_alone():
    teacher, student = _maps((3, 3)), _maps((3, 3))
    match_maps(torch.ones(2, 1, 1, dtype=torch.float64), teacher, student).backward()
    assert teacher[0].grad is None
    assert student[0].grad.abs().sum() > 0


def test_match_maps_of_equal_maps_is_zero_with_zero_gradient():
    student = torch.rand(3, 4, 4, requires_grad=True)
    loss = match_maps(torch.ones(3, 1, 1), [student.detach().clone()], [student])
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize(("teacher_scale", "student_scale"), [(0, 1), (1, 0), (0, 0)])
def test_zero_features_make_no_nan(teacher_scale, student_scale):
    teacher = teacher_scale * torch.rand(2, 3, 4, 4)
    student = (student_scale * torch.rand(2, 3, 4, 4)).requires_grad_()
    maps = [feature_stats(f)[1].unflatten(1, (4, 4)) for f in (teacher, student)]
    loss = match_maps(torch.ones(2, 1, 1), maps[:1], maps[1:])
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(float(teacher_scale != student_scale) / 16))
    assert student.grad.isfinite().all()


def test_match_maps_refuses_attention_of_another_shape():
    with pytest.raises(ValueError, match=r"must be \[B, T, S\] = \(2, 1, 1\), got \(2, 1, 3\)"):
        match_maps(torch.ones(2, 1, 3), _maps((3, 3)), _maps((3, 3)))
