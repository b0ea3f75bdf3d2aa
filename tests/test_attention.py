"""feature_stats, match_maps and kd: against hand-written loops in float64, then the kernels against float64 torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from sparsekd import backends
from sparsekd.ops.attention import (
    feature_stats,
    feature_stats_grad_reference,
    feature_stats_reference,
    kd,
    kd_reference,
    layer_stats,
    match_maps,
    match_maps_reference,
)

from .cases import torch_threads

HALF = [torch.float16, torch.bfloat16]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
native = backends.cpu.native
ISAS = native.isas() if native else []


@pytest.fixture
def isa(request):
    """The compiled kernels of one instruction set."""
    if native is None:
        pytest.skip(backends.cpu.missing)
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


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


# Tapped layers of one network: small maps, tails of channels and pixels, one image in several pieces, one pixel.
SHAPES = [(4, 4, 4), (33, 7, 7), (1, 5, 3), (20, 33, 32), (130, 1, 1), (3, 47, 47), (16, 8, 8)]


def features_of(shapes, batch=2, dtype=torch.float32, layout=torch.contiguous_format):
    return [torch.randn(batch, *shape).to(dtype).contiguous(memory_format=layout) for shape in shapes]


def unwritten(*args, **kwargs):
    return torch.full(args, float("nan"), **kwargs)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_of_every_isa(isa, layout, dtype, monkeypatch):
    """float32 within rounding of float64; half types exactly as the float32 result rounded once."""
    monkeypatch.setattr(torch, "empty", unwritten)
    features = features_of(SHAPES, dtype=dtype, layout=LAYOUTS[layout])
    exact = [f.double() for f in features]
    got, want = torch.ops.sparsekd.feature_stats(features), feature_stats_reference(exact)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=2e-6, atol=1e-6)
    grads = [torch.randn_like(stat) for stat in got]
    got = torch.ops.sparsekd.feature_stats_grad(features, *grads)
    want = feature_stats_grad_reference(exact, *(grad.double() for grad in grads))
    for ours, reference, f in zip(got, want, features, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous(memory_format=LAYOUTS[layout])
        error, peer = ((x.double() - reference).abs().max() for x in (ours, reference.to(dtype)))
        assert error <= max(2 * peer, 1e-6 * reference.abs().max()), f.shape


@every_isa
@pytest.mark.parametrize("dtype", HALF)
def test_half_types_are_rounded_as_torch_rounds(isa, dtype):
    """Every bit pattern in and, scaled by one, out again; then scaled to subnormals, ties and overflow."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(dtype).view(1, 2, 2**8, 2**7)
    energy = torch.ones(1, 2**15)  # 2 * features * 1 / 2 channels
    (got,) = torch.ops.sparsekd.feature_stats_grad([x], torch.zeros(1, 2), energy)
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.nan_to_num(), x.nan_to_num())
    scale = torch.rand(1, 2**15) * 2.0 ** torch.randint(-30, 20, (1, 2**15))
    (got,) = torch.ops.sparsekd.feature_stats_grad([x], torch.zeros(1, 2), scale)
    want = (x.float() * scale.view(1, 1, 2**8, 2**7)).to(dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_layers_need_not_be_alike():
    """Formats, dtypes and strides differ from layer to layer, and each has its gradient in its own."""
    nchw, last, half = features_of([(6, 5, 7), (32, 8, 8), (16, 4, 4)])
    last, half = last.contiguous(memory_format=torch.channels_last), half.bfloat16()
    strided = torch.randn(4, 6, 5, 7)[::2, 1::2, :, ::3]
    layers = [f.requires_grad_() for f in (nchw, last, half, strided)]
    means, energy = layer_stats(layers)
    for f, mean, pixels in zip(
        layers, means.split([f.shape[1] for f in layers], 1), energy.split([35, 64, 16, 15], 1), strict=True
    ):
        torch.testing.assert_close(mean, f.float().mean((2, 3)))
        torch.testing.assert_close(pixels, f.float().square().mean(1).flatten(1))
        (got,) = torch.autograd.grad(mean.sum() + pixels.sum(), f, retain_graph=True)
        want = 1 / pixels.shape[1] + 2 * f.detach().float() / f.shape[1]
        torch.testing.assert_close(got, want.to(f.dtype))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty_features_are_as_in_torch(shape):
    features = torch.zeros(shape, requires_grad=True)
    means, energy = feature_stats(features)
    torch.testing.assert_close(means, features.mean((2, 3)), equal_nan=True)
    torch.testing.assert_close(energy, features.square().mean(1).flatten(1), equal_nan=True)
    (grad,) = torch.autograd.grad(means.sum() + energy.sum(), features)
    assert grad.shape == shape


def test_layers_refuse_other_batches():
    with pytest.raises(ValueError, match=r"one batch size and device, got 2 on cpu and 3 on cpu"):
        layer_stats([torch.zeros(2, 1, 1, 1), torch.zeros(3, 1, 1, 1)])
    with pytest.raises(ValueError, match="expected one or more layers"):
        layer_stats([])


def test_any_number_of_threads_gives_the_same_bits():
    features = features_of([(20, 60, 60), (64, 8, 8)], batch=3)
    logits = torch.randn(2, 33, 10)
    teacher, sizes = torch.rand(3, 3600 + 64), [(60, 60), (8, 8)]
    attention = torch.rand(3, 2, 2).softmax(2)
    runs = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            means, energy = layer_stats(features)
            flat = [side for size in sizes for side in size]
            matched = torch.ops.sparsekd.match_maps(attention, teacher, energy, flat, flat)
            runs.append([means, energy, *matched, *torch.ops.sparsekd.kd(*logits, 4.0)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


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


def sizes_of(maps):
    return [tuple(m.shape[1:]) for m in maps]


def matched(attention, teacher_maps, student_maps):
    flat = [torch.cat([m.flatten(1) for m in maps], 1) for maps in (teacher_maps, student_maps)]
    return match_maps(attention, *flat, sizes_of(teacher_maps), sizes_of(student_maps))


def _maps(*sizes, dtype=torch.float64):
    return [torch.rand(2, *size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


# Teacher sizes repeat, differ in shape at equal area, and are smaller, equal and larger than the student's.
TEACHER_SIZES = [(4, 4), (2, 3), (4, 4), (3, 2), (1, 1), (20, 17)]
STUDENT_SIZES = [(4, 4), (5, 3), (2, 2), (20, 17)]


def test_match_maps_equals_the_loops():
    teacher, student = _maps(*TEACHER_SIZES), _maps(*STUDENT_SIZES)
    attention = torch.rand(2, 6, 4, dtype=torch.float64, requires_grad=True)
    got, want = (f(attention, teacher, student) for f in (matched, loop_match))
    torch.testing.assert_close(got, want)
    inputs = [attention, *student]
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_match_maps_without_attention_equals_the_loops_on_the_diagonal():
    teacher, student = _maps((4, 4), (2, 3), (4, 4)), _maps((4, 4), (5, 3), (8, 8))
    got, want = matched(None, teacher, student), loop_match(torch.eye(3).double().expand(2, -1, -1), teacher, student)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


def test_match_maps_gradcheck():
    teacher, student = torch.rand(2, 20, dtype=torch.float64), torch.rand(2, 13, dtype=torch.float64)
    attention = torch.rand(2, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(attention, student):
        return match_maps(attention, teacher, student, [(4, 4), (2, 2)], [(3, 3), (2, 2)])

    assert gradcheck(call, (attention, student.requires_grad_()))
    assert gradgradcheck(call, (attention, student))


@every_isa
@pytest.mark.parametrize("attended", [True, False])
def test_match_maps_kernel(isa, attended, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))
    count_t, count_s = (6, 4) if attended else (4, 4)
    attention = torch.rand(2, count_t, count_s).softmax(2) if attended else None
    sizes_t, sizes_s = TEACHER_SIZES[-count_t:], STUDENT_SIZES[:count_s]
    teacher, student = (torch.rand(2, sum(h * w for h, w in sizes)) for sizes in (sizes_t, sizes_s))
    flat = [[side for size in sizes for side in size] for sizes in (sizes_t, sizes_s)]
    got = torch.ops.sparsekd.match_maps(attention, teacher, student, *flat)
    double = [None if x is None else x.double() for x in (attention, teacher, student)]
    for ours, want in zip(got, match_maps_reference(*double, *flat), strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-7)


def test_match_maps_leaves_the_teacher_alone():
    teacher, student = _maps((3, 3)), _maps((3, 3))
    matched(torch.ones(2, 1, 1, dtype=torch.float64), teacher, student).backward()
    assert teacher[0].grad is None
    assert student[0].grad.abs().sum() > 0


def test_match_maps_of_equal_maps_is_zero_with_zero_gradient():
    student = torch.rand(3, 7, 7, requires_grad=True)
    loss = matched(torch.ones(3, 1, 1), [student.detach().clone()], [student])
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize(("teacher_scale", "student_scale"), [(0, 1), (1, 0), (0, 0)])
def test_zero_features_make_no_nan(teacher_scale, student_scale):
    teacher = teacher_scale * torch.rand(2, 3, 4, 4)
    student = (student_scale * torch.rand(2, 3, 4, 4)).requires_grad_()
    energy = [feature_stats(f)[1] for f in (teacher, student)]
    loss = match_maps(torch.ones(2, 1, 1), *energy, [(4, 4)], [(4, 4)])
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(float(teacher_scale != student_scale) / 16))
    assert student.grad.isfinite().all()


def test_match_maps_refuses_other_shapes():
    maps, size = torch.ones(2, 9), [(3, 3)]
    with pytest.raises(ValueError, match=r"must be \[B, T, S\] = \(2, 1, 1\) in torch.float32, got \(2, 1, 3\)"):
        match_maps(torch.ones(2, 1, 3), maps, maps, size, size)
    with pytest.raises(ValueError, match=r"teacher must be \[B, sum of H\*W\] = \(2, 8\), got \(2, 9\)"):
        match_maps(torch.ones(2, 1, 1), maps, maps, [(4, 2)], size)
    with pytest.raises(ValueError, match="without attention T and S must be equal, got 1 and 2"):
        match_maps(None, maps, torch.ones(2, 18), size, size * 2)
    with pytest.raises(TypeError, match=r"one dtype, got torch.float64 and torch.float32"):
        match_maps(None, maps.double(), maps, size, size)
    with pytest.raises(ValueError, match=r"student maps .* of one or more pixels each, got .* \[\(3, 3\), \(0, 8\)\]"):
        match_maps(torch.ones(2, 1, 2), maps, maps, size, [*size, (0, 8)])
    with pytest.raises(ValueError, match=r"teacher maps must be one or more"):
        match_maps(torch.ones(2, 0, 1), maps[:, :0], maps, [], size)


@pytest.mark.parametrize("attended", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_loss_of_no_images_is_nan_as_in_torch(attended, dtype):
    student = torch.rand(0, 20, dtype=dtype, requires_grad=True)
    attention = torch.rand(0, 1, 2, dtype=dtype) if attended else None
    teacher_sizes = [(3, 3)] if attended else [(3, 3), (2, 2)]
    teacher = torch.rand(0, 9 if attended else 13, dtype=dtype)
    loss = match_maps(attention, teacher, student, teacher_sizes, [(4, 4), (2, 2)])
    assert loss.isnan() and kd(torch.rand(0, 5), torch.rand(0, 5), 4.0).isnan()
    assert torch.autograd.grad(loss, student)[0].shape == (0, 20)


@pytest.mark.parametrize("classes", [1, 10, 100, 1000])
@every_isa
def test_kd_kernel(isa, classes):
    student, teacher = 5 * torch.randn(2, 3, classes)
    got, want = torch.ops.sparsekd.kd(student, teacher, 4.0), kd_reference(student.double(), teacher.double(), 4.0)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-6)
    loss, grad = torch.ops.sparsekd.kd(student, student, 1.0)
    assert loss == 0 and not grad.any()
    ruled_out = teacher.clone().index_fill_(1, torch.tensor([0]), float("-inf")) if classes > 1 else teacher
    for both in (False, True):
        says = student.clone().index_fill_(1, torch.tensor([0]), float("-inf")) if both and classes > 1 else student
        got = torch.ops.sparsekd.kd(says, ruled_out, 4.0)
        want = kd_reference(says.double(), ruled_out.double(), 4.0)
        assert torch.isfinite(got[0])
        for ours, reference in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-6)
    assert torch.ops.sparsekd.kd(student, teacher.fill_(float("nan")), 4.0)[0].isnan()


def test_kd_gradcheck():
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64)
    assert gradcheck(lambda x: kd(x, teacher, 2.0), student)
    assert gradgradcheck(lambda x: kd(x, teacher, 2.0), student)
    torch.testing.assert_close(
        kd(student, teacher, 2.0),
        4 * F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean"),
    )


def operands(op):
    features = [f.requires_grad_() for f in features_of([(3, 4, 4), (16, 2, 3)])]
    features[1] = features[1].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    student, attention = torch.rand(2, 13, requires_grad=True), torch.rand(2, 1, 2, requires_grad=True)
    return {
        "feature_stats": (features,),
        "feature_stats_grad": (features, torch.randn(2, 19, requires_grad=True), torch.randn(2, 22)),
        "match_maps": (attention, torch.rand(2, 16), student, [4, 4], [3, 3, 2, 2]),
        "kd": (torch.randn(3, 5, requires_grad=True), torch.randn(3, 5), 4.0),
    }[op]


@pytest.mark.parametrize("op", ["feature_stats", "feature_stats_grad", "match_maps", "kd"])
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.sparsekd, op).default, operands(op))


@pytest.mark.skipif(native is None, reason=backends.cpu.missing)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_allocates_its_gradients_and_little_else(layout):
    """Bytes that torch allocates in forward and backward: the gradients of the student's maps, and small change."""
    student, teacher = (features_of([(32, 32, 32), (64, 16, 16)], 8, layout=LAYOUTS[layout]) for _ in range(2))
    sizes = [f.shape[2:] for f in student]
    attention = torch.rand(8, 2, 2)
    student = [f.requires_grad_() for f in student]

    def step():
        energy = [layer_stats(features)[1] for features in (teacher, student)]
        return torch.autograd.grad(match_maps(attention, *energy, sizes, sizes), student)

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    maps = sum(f.numel() * f.element_size() for f in student)
    assert maps <= allocated < 1.15 * maps


def test_statistics_are_float32_whatever_the_default_dtype():
    x = torch.randn(2, 5, 7, 9)
    expected = feature_stats(x)
    torch.set_default_dtype(torch.float64)
    try:
        got = feature_stats(x)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, want in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, want)


def test_the_losses_compile_in_one_graph():
    """Forward and backward, channels_last and half types among them; the eager result is the reference."""
    first, second = features_of([(6, 5, 7), (16, 8, 8)])
    second = second.bfloat16().contiguous(memory_format=torch.channels_last)
    features = [f.requires_grad_() for f in (first, second)]
    teacher, logits = torch.rand(2, 99), torch.randn(2, 2, 10)
    student_logits = logits[0].clone().requires_grad_()

    def loss(features, student_logits):
        means, energy = layer_stats(features)
        sizes = [f.shape[2:] for f in features]
        return means.sum() + match_maps(None, teacher, energy, sizes, sizes) + kd(student_logits, logits[1], 4.0)

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(features, student_logits)
        found.append((value, *torch.autograd.grad(value, [*features, student_logits])))
    torch.testing.assert_close(*found, rtol=0, atol=0)
