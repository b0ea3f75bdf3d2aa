"""Pooling: every spelling that is ours to compute, those that are not, and the kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.backends import cpu
from sparsekd.freeze import measure
from sparsekd.freeze.packed import cpu_layer
from sparsekd.freeze.sites import Site

from ..test_isa import KNOWN_ISAS, isa_restored  # noqa: F401
from .networks import assert_frozen_equals, quick

IMAGE = (2, 5, 9, 8)
OURS = {
    "MaxPool2d": nn.MaxPool2d(3, 2, 1),
    "MaxPool2d, dilated": nn.MaxPool2d((2, 3), padding=(0, 1), dilation=2),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "AvgPool2d": nn.AvgPool2d(2, padding=1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, (2, 3), stride=(1, 2)),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d((1, 1)),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "flatten": lambda x: F.adaptive_avg_pool2d(x, output_size=1).flatten(1),
    "torch.flatten": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), start_dim=1),
    "Flatten": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "mean": lambda x: x.mean((2, 3)),
    "mean, kept": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True),
}
NOT_OURS = {
    "ceil": nn.MaxPool2d(2, ceil_mode=True),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "without padding": nn.AvgPool2d(2, padding=1, count_include_pad=False),
    "another divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "several outputs": nn.AdaptiveAvgPool2d(2),
    "rows": lambda x: x.mean(2),
    "in double": lambda x: x.mean((2, 3), dtype=torch.float64).float(),
    "of everything": lambda x: x.mean().expand(2),
}


class Pooled(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return self.pool(x)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [*OURS, *NOT_OURS])
def test_every_spelling(name, memory_format):
    model = Pooled({**OURS, **NOT_OURS}[name])
    frozen = quick(model, torch.randn(IMAGE), memory_format=memory_format)
    assert [layer.geometry.kind for layer in frozen.plan] == (
        [] if name in NOT_OURS else ["max" if "max" in name.lower() else "mean"]
    )
    assert_frozen_equals(model, frozen, torch.randn(IMAGE))


def test_a_map_that_is_read_before_it_is_flattened_stays_a_map():
    class Both(nn.Module):
        def forward(self, x):
            y = F.adaptive_avg_pool2d(x, 1)
            return x * y, y.flatten(1)

    frozen = quick(Both(), torch.randn(IMAGE))
    for got, want in zip(frozen(torch.ones(IMAGE)), Both()(torch.ones(IMAGE)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
@pytest.mark.parametrize("isa", [] if cpu.native is None else cpu.native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 16, 70, 131])
@pytest.mark.parametrize("name", ["MaxPool2d", "MaxPool2d, dilated", "AvgPool2d", "mean"])
def test_kernels_compute_what_torch_does(name, channels, dtype, isa):
    windows = {
        "MaxPool2d": ("max", (3, 3, 2, 2, 1, 1, 1, 1)),
        "MaxPool2d, dilated": ("max", (2, 3, 2, 3, 0, 1, 2, 2)),
        "AvgPool2d": ("mean", (2, 2, 2, 2, 1, 1, 1, 1)),
        "mean": ("mean", (9, 8, 1, 1, 0, 0, 1, 1)),
    }
    kind, window = windows[name]
    site = Site("pool", "", (2, channels, 9, 8), pool=(kind, window, str(dtype).removeprefix("torch."), name == "mean"))
    geometry, (weight, bias) = measure.geometry_of(site, None), measure.fold(site, None, None)
    before = cpu.native.isa()
    cpu.native.use_isa(isa)
    try:
        layer = cpu_layer(geometry, weight, bias, chosen="native", memory_format="channels_last", threads=2)
    finally:
        cpu.native.use_isa(before)
    for batch in (1, 3):
        x = torch.randn(batch, channels, 9, 8).to(dtype)
        want = OURS[name](x.double())
        got = layer(x)
        assert got.dtype == dtype
        error = {torch.float32: 1e-6, torch.bfloat16: 0 if kind == "max" else 2**-8}[dtype]
        torch.testing.assert_close(got.double(), want, rtol=error, atol=error)


@pytest.mark.parametrize("channels", [5, 16, 70])
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_nan_in_a_window_is_nan_of_it(isa, channels, isa_restored):  # noqa: F811
    """In every place of the window, as in torch."""
    if cpu.native is None or isa not in cpu.native.isas():
        pytest.skip(f"no kernels of {isa} here")
    cpu.native.use_isa(isa)
    x = torch.randn(9, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    for place in range(9):
        x[place, place % channels, place // 3, place % 3] = math.nan
    site = Site("pool", "pool", tuple(x.shape), pool=("max", (3, 3, 3, 3, 0, 0, 1, 1), "float32", False))
    layer = cpu_layer(measure.geometry_of(site, None), torch.empty(0), None, chosen="native",
                      memory_format="channels_last", threads=1)  # fmt: skip
    torch.testing.assert_close(layer(x), F.max_pool2d(x, 3), equal_nan=True, rtol=0, atol=0)
