"""int8 layers equal integer arithmetic done by hand, on every instruction set; scales cover what was observed."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
from sparsekd import _C, BlockPattern, BlockSparse
from sparsekd.freeze import quantize

from ..cases import CONVS, LINEARS, activations64, random_weight
from ..test_isa import guarded, isa_restored  # noqa: F401

CASES = [case for case in CONVS if case.id != "depthwise"]


def by_hand(case, weight, bias, x, scale, residual, activation):
    """The layer in double over the very integers that the kernel is given."""
    values, row_scale = quantize.quantize_weight(weight)
    integers = BlockSparse(values.double(), weight.row_ptr, weight.col_idx, weight.shape, weight.pattern).to_dense()
    real = (x.double() - scale.zero) * scale.scale
    dense = integers * row_scale.double().reshape(-1, *[1] * (len(weight.shape) - 1))
    if len(weight.shape) == 4:
        y = F.conv2d(real, dense, bias.double(), **case.geometry)
    else:
        y = F.linear(real, dense, bias.double())
    y = y if residual is None else y + residual.double()
    return activations64(y)[activation]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_conv2d_is_exact_integer_arithmetic(case, channels_last, isa_restored):  # noqa: F811
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight, _ = random_weight(case, torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(256, (case.n, case.c, *case.image), dtype=torch.uint8, generator=generator)
    x, bias, scale = (
        x.contiguous(memory_format=layout),
        torch.randn(case.k, generator=generator),
        quantize.ByteScale(0.02, 77),
    )
    y_scale = quantize.ByteScale(0.25, 100)
    for isa in _C.isas():
        _C.use_isa(isa)
        options = {"image": case.image, **case.geometry}
        want = by_hand(case, weight, bias, x, scale, None, "none")
        residual = torch.randn(want.shape, generator=generator).contiguous(memory_format=layout)
        for activation in ("silu", "gelu"):
            y = quantize.quantize_layer(weight, bias, scale, activation=activation, **options)(x, residual)
            exact = by_hand(case, weight, bias, x, scale, residual, activation)
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-5)
        y = quantize.quantize_layer(weight, bias, scale, y=y_scale, activation="relu6", **options)(x)
        steps = want.clamp(0, 6) / y_scale.scale + y_scale.zero
        assert y.dtype == torch.uint8
        assert not y.numel() or (y.double() - steps.clamp(0, 255)).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("case", LINEARS, ids=lambda case: case.id)
def test_linear_is_exact_integer_arithmetic(case, isa_restored):  # noqa: F811
    weight, _ = random_weight(case, torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(256, (*case.batch, case.inputs), dtype=torch.uint8, generator=generator)
    bias, scale = torch.randn(case.outputs, generator=generator), quantize.ByteScale(0.02, 31)
    for isa in _C.isas():
        _C.use_isa(isa)
        y = quantize.quantize_layer(weight, bias, scale, activation="relu")(x)
        torch.testing.assert_close(
            y.double(), by_hand(case, weight, bias, x, scale, None, "relu"), rtol=1e-5, atol=2e-5
        )


def test_long_sums_do_not_saturate(isa_restored):  # noqa: F811
    """255 * 127 for 4 x 8192 inputs: beyond 16 bits by far, and beyond the 24 bits of a float."""
    weight = BlockSparse.from_dense(torch.ones(16, 32768), BlockPattern(16, 4))
    scale = quantize.ByteScale(1.0, 0)
    for isa in _C.isas():
        _C.use_isa(isa)
        y = quantize.quantize_layer(weight, None, scale)(torch.full((1, 32768), 255, dtype=torch.uint8))
        torch.testing.assert_close(y, torch.full((1, 16), 255.0 * 32768), rtol=1e-6, atol=0)


@pytest.mark.parametrize("image", [(), (3, 2)], ids=["linear", "conv2d"])
def test_bytes_out_take_no_residual(image):
    weight = BlockSparse.from_dense(torch.ones(16, 8, *(1 for _ in image)), BlockPattern(16, 4))
    scale = quantize.ByteScale(1.0, 0)
    layer = quantize.quantize_layer(weight, None, scale, y=scale, image=image or None)
    assert layer(torch.ones(2, 8, *image)).eq(8).all()
    with pytest.raises(ValueError, match="takes no residual"):
        layer(torch.ones(2, 8, *image), torch.ones(2, 16, *image))


def test_float_input_is_quantised_as_written(isa_restored):  # noqa: F811
    scale = quantize.ByteScale.of_range(-1.0, 3.0)
    x = torch.cat([torch.linspace(-2, 4, 999), torch.tensor([float("inf"), -float("inf"), 0.0])])
    want = (x.double() / scale.scale).round().add(scale.zero).clamp(0, 255)
    for isa in _C.isas():
        _C.use_isa(isa)
        got = scale.quantize(x)
        assert (got.double() - want).abs().max() <= 1  # the two divisions may round a tie apart
        assert (got.double() != want).float().mean() < 0.01
        assert scale.quantize(torch.tensor([float("nan")])).item() == 0
    inside = x[(x >= -1) & (x <= 3)]
    assert (scale.dequantize(scale.quantize(inside)) - inside).abs().max() <= scale.scale * 0.5001 + 1e-6
    assert scale.dequantize(scale.quantize(torch.zeros(1))).item() == 0


def test_weights_are_off_by_half_a_step_at_most():
    for case in (CASES[0], CASES[-1], LINEARS[7]):
        weight, dense = random_weight(case, torch.float32)
        values, scale = quantize.quantize_weight(weight)
        back = BlockSparse(values.float(), weight.row_ptr, weight.col_idx, weight.shape, weight.pattern).to_dense()
        error = (back.flatten(1) * scale[:, None] - dense.flatten(1)).abs()
        assert (error <= dense.flatten(1).abs().amax(1, keepdim=True) / 254 * 1.001).all()


def test_observer():
    calibrate = quantize.Observer()
    for batch in (torch.tensor([1.0, 2.0]), torch.tensor([-0.5]), torch.empty(0)):
        calibrate(batch)
    assert (calibrate.low, calibrate.high) == (-0.5, 2.0)
    assert quantize.Observer().scale() == quantize.ByteScale(1.0, 0)  # nothing seen
    trimmed = quantize.Observer(99.0)
    trimmed(torch.cat([torch.rand(100_000), torch.tensor([1e6])]))
    assert 0.98 < trimmed.high < 1.0
    with pytest.raises(ValueError, match="percentile"):
        quantize.Observer(3)


def test_errors_name_what_is_wrong():
    weight, _ = random_weight(CASES[0], torch.float32)
    scale = quantize.ByteScale(1.0, 0)
    with pytest.raises(ValueError, match="image="):
        quantize.quantize_layer(weight, None, scale)
    with pytest.raises(ValueError, match="tanh"):
        quantize.quantize_layer(weight, None, scale, activation="tanh", image=(8, 8))
    run = quantize.quantize_layer(weight, None, scale, image=(8, 8), padding=(1, 1), y=scale)
    with pytest.raises(ValueError, match="expected"):
        run(torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="float32"):
        run(torch.zeros(1, 16, 8, 8).half())


def test_nothing_is_read_beyond_the_input(isa_restored):  # noqa: F811
    """Odd channels between NaNs: as bytes, 127 and 192, which would move the sums."""
    weight = BlockSparse.from_dense(torch.randn(16, 5, 3, 3), BlockPattern(16, 4))
    scale = quantize.ByteScale(0.01, 3)
    x = torch.randint(256, (1, 5, 6, 6), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    run = quantize.quantize_layer(weight, None, scale, image=(6, 6))
    storage = torch.full((x.numel() + 128,), 255, dtype=torch.uint8)
    inner = storage[64 : 64 + x.numel()].as_strided(x.shape, x.stride(), 64)
    inner.copy_(x)
    assert torch.equal(run(x), run(inner))
