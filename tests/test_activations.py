"""Activations behind a layer: what they mean in float64, on every instruction set, and as torch computes them."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
from sparsekd import _C

from .cases import activations64
from .test_isa import KNOWN_ISAS, Blocks, isa_restored, unwritten  # noqa: F401

# Relative bounds of the exact value, down to where floats end. Those of the GELUs are of their tails: an exponent of
# -85 is rounded to 4e-6.
ACTIVATION_BOUNDS = {
    **dict.fromkeys(("none", "relu", "relu6"), 0.0),
    **dict.fromkeys(("silu", "sigmoid", "hardswish", "hardsigmoid"), 3e-7),
    **dict.fromkeys(("gelu", "gelu_tanh"), 3e-5),
}


@pytest.mark.parametrize("block", [(16, 1), (1, 2)], ids=["16x1", "filters"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_activations(isa, channels_last, block, isa_restored):  # noqa: F811
    """Zero weights leave the residual alone in front of the activation, on full, ragged and scattered strips."""
    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    _C.use_isa(isa)
    blocks = Blocks(40, 2, 1, 1, *block, 1.0, seed=6, dead_rows=block == (1, 2))
    blocks.values.zero_()
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, -0.0, 6.0, inf, -inf, nan, -87.5, -88.5, -104, -1e30, 88.8, 1e30, 1e-30, -1e-30, 6.5])
    random = 40 * torch.randn(40 * 77 - len(special), generator=torch.Generator().manual_seed(0))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    residual = torch.cat([special, random]).reshape(1, 40, 7, 11).contiguous(memory_format=layout)
    shape = _C.Conv2dShape((1, 2, 7, 11), 40, (1, 1), block=block)
    x = torch.zeros(1, 2, 7, 11)
    for name, want in activations64(residual.double()).items():
        y = unwritten(*residual.shape, channels_last=channels_last)
        _C.conv2d_f32(shape, x.data_ptr(), channels_last, *blocks.pointers, 0, residual.data_ptr(), y.data_ptr(),
                      channels_last, _C.ACTIVATIONS[name], 1)  # fmt: skip
        bound = ACTIVATION_BOUNDS[name]
        atol = 1e-35 if bound else 0.0
        torch.testing.assert_close(y.double(), want, equal_nan=True, rtol=bound, atol=atol)


IN_TORCH = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_activations_behind_a_linear_layer_are_as_torch_computes_them(isa, dtype, isa_restored):  # noqa: F811
    """To 4e-7 of input or output in float32, where torch itself is 2e-7 off; in bf16 rounded once."""
    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    _C.use_isa(isa)
    blocks = Blocks(40, 2, 1, 1, 16, 2, 1.0, seed=6)
    blocks.values = blocks.values.zero_().to(dtype)
    x = torch.zeros(50, 2, dtype=dtype)
    residual = torch.linspace(-14, 14, 2000).reshape(50, 40).to(dtype)
    assert set(IN_TORCH) == set(_C.ACTIVATIONS) - {"none", "relu", "relu6"}
    for name, theirs in IN_TORCH.items():
        y = unwritten(50, 40).to(dtype)
        kind = _C.PackedLinear if dtype is torch.float32 else _C.PackedLinearBf16
        kind(2, 40, 16, 2, *blocks.pointers, 0, _C.ACTIVATIONS[name]).run(
            x.data_ptr(), 50, residual.data_ptr(), y.data_ptr(), 1
        )
        want = theirs(residual.float())
        scale = torch.maximum(residual.float().abs(), want.abs())
        bound = (4e-7 if dtype is torch.float32 else 2**-8) * scale
        assert ((y.float() - want).abs() <= bound).all(), name
