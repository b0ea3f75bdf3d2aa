"""freeze(..., dtype="int8"): close to float32, measured per layer, calibrated, and only where there are blocks."""

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import BlockPattern
from sparsekd.backends import cpu
from sparsekd.freeze import quantize
from sparsekd.nn import SparseLinear

pytestmark = pytest.mark.skipif(cpu.native is None, reason="the compiled module is not built")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.one, self.two = (
            nn.Conv2d(32, 32, 3, padding=1),
            nn.Conv2d(32, 32, 3, padding="same", padding_mode="reflect"),
        )
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (self.two(torch.nn.functional.silu(self.one(x))) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = Residual().eval()
    sparsekd.sparsify(network, density=0.5, pattern=BlockPattern(16, 4), exclude=["stem"])
    return network


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_int8_is_close_and_takes_any_batch(model, memory_format, tmp_path):
    x = torch.randn(4, 3, 12, 12)
    frozen = sparsekd.freeze(model, x, dtype="int8", min_gain=0, layer_ms=2, memory_format=memory_format)
    kept = [layer.why for layer in frozen.plan if layer.why.endswith("int8")]
    assert len(kept) == 3 and "calibration" in str(frozen.plan)
    for batch in (x, x[:1], torch.randn(7, 3, 12, 12)):
        with torch.no_grad():
            want = model(batch)
        got = frozen(batch)
        assert not torch.equal(got, want)  # bytes did run
        assert (got - want).abs().max() <= 0.05 * want.abs().max()
    frozen.save(tmp_path / "int8")
    loaded = sparsekd.load_frozen(tmp_path / "int8", model)
    assert loaded.plan == frozen.plan
    assert torch.equal(loaded(x), frozen(x))
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "int8").read_bytes()


def test_a_layer_that_gets_no_faster_stays_float(model):
    x = torch.randn(2, 3, 12, 12)
    frozen = sparsekd.freeze(model, x, dtype="int8", min_gain=float("inf"), layer_ms=2)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)


def test_calibration_sets_the_range(model):
    x = torch.randn(2, 3, 12, 12)
    with pytest.raises(RuntimeError, match="calibrate"):
        sparsekd.freeze(model, x, dtype="int8", min_gain=0, layer_ms=1, calibration=[x * 1e-3])
    sparsekd.freeze(model, x, dtype="int8", min_gain=0, layer_ms=1, calibration=[(x,), x * 0.5])


def test_other_dtypes_are_refused(model):
    with pytest.raises(ValueError, match="int4"):
        sparsekd.freeze(model, torch.randn(1, 3, 8, 8), dtype="int4")


def test_a_row_whose_sum_may_leave_32_bits_stays_float():
    """66,312 products of 255 and 127 are one too many; calibrated on small inputs, nothing else would notice."""
    dense = nn.Linear(66_320, 16, bias=False)
    nn.init.ones_(dense.weight)
    model, x = nn.Sequential(SparseLinear.from_dense(dense)), torch.ones(1, 66_320)
    frozen = sparsekd.freeze(model, x, dtype="int8", min_gain=0, layer_ms=1)
    assert not any(layer.why.endswith("int8") for layer in frozen.plan)
    torch.testing.assert_close(frozen(x), model(x))
    with pytest.raises(ValueError, match="32 bits"):
        quantize.quantize_layer(model[0].blocks, None, quantize.ByteScale.of_range(0.0, 1.0))


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        ([], "has no batch"),
        (lambda x: x, "must be several batches, got Tensor"),
        (
            lambda x: [x, (x, torch.zeros(4))],
            "batch 1 must be inputs like example_inputs, without labels: .*expected 1 input tensors, got 2",
        ),
        (lambda x: [x.double()], "batch 0 must be inputs like example_inputs, float32 .* got float64"),
        ([{"y": torch.zeros(4)}], "batch 0 must be inputs like example_inputs, without labels: "),
        (5, "must be several batches, got int"),
    ],
)
def test_calibration_of_something_else_is_refused(model, calibration, says):
    x = torch.randn(2, 3, 12, 12)
    batches = calibration(x) if callable(calibration) else calibration
    with pytest.raises(ValueError, match=says):
        sparsekd.freeze(model, x, dtype="int8", layer_ms=1, calibration=batches)
    with pytest.raises(ValueError, match="calibration is for dtype='int8'"):
        sparsekd.freeze(model, x, layer_ms=1, calibration=[x])
