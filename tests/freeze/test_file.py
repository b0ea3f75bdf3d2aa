"""Files of frozen networks."""

import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import sparsekd
from sparsekd import BlockPattern, checkpoint
from sparsekd.freeze import freeze, load_frozen
from sparsekd.nn import SparseConv2d, SparseLinear

from .networks import (
    IMAGE,
    PreActivation,
    ResNet,
    gains,
    needs_kernels,
    quick,
    trained,
)


class Allocations(TorchFunctionMode):
    """Notes the device that each torch.empty asks for."""

    def __init__(self):
        super().__init__()
        self.devices = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "empty":
            self.devices.append((kwargs or {}).get("device"))
        return func(*args, **(kwargs or {}))


@needs_kernels
def test_kernels_write_to_the_cpu_whatever_the_default_device():
    """Under `torch.device("meta")` an output without a device has address 0."""
    model, x = (
        nn.Sequential(SparseConv2d(3, 16, 3), nn.Flatten(), SparseLinear(16 * 36, 4)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    frozen = quick(model, x)
    with Allocations() as seen:
        frozen(x)
    assert seen.devices == ["cpu", "cpu"]


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 8, 6, 6))
        self.of_place, self.of_image = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.of_place(self.place) + self.of_image(x)


def test_a_layer_of_a_parameter_is_not_fused_with_one_of_the_batch():
    model, x = Embedded().eval(), torch.randn(3, 8, 6, 6)
    frozen = quick(model, x[:1])  # where both have a batch of 1
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)


class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 64, 10)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = x.view(x.size(0), -1)
        return self.linear(x) + x.sum(1, keepdim=True)


@pytest.mark.parametrize("memory_format", [None, "contiguous", "channels_last"])
def test_a_view_of_a_map_works_in_any_memory_format(memory_format):
    model, x = Viewed().eval(), torch.randn(2, 3, 8, 8)
    frozen = freeze(model, x, layer_ms=1.0, memory_format=memory_format)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)


@gains
@pytest.mark.parametrize("fresh", ["dense", "sparse"])
def test_save_and_load(fresh, min_gain, tmp_path):
    model = sparsekd.sparsify(trained(ResNet()), BlockPattern(8, 2), density=0.3)
    x = torch.randn(IMAGE)
    frozen = quick(model, x, min_gain=min_gain)
    frozen.save(tmp_path / "student.frozen")
    structure = ResNet() if fresh == "dense" else sparsekd.sparsify(ResNet(), density=0.9)
    loaded = load_frozen(tmp_path / "student.frozen", structure)
    assert loaded.plan == frozen.plan
    assert torch.equal(loaded(x), frozen(x))
    assert [path.name for path in tmp_path.iterdir()] == ["student.frozen"]
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "student.frozen").read_bytes()


@gains
def test_a_file_holds_blocks_whatever_was_chosen(min_gain, tmp_path):
    model = nn.Sequential(SparseConv2d(64, 64, 3, density=0.1), nn.ReLU())
    quick(model, torch.randn(1, 64, 5, 5), min_gain=min_gain).save(tmp_path / "frozen")
    assert (tmp_path / "frozen").stat().st_size < 0.25 * 64 * 64 * 9 * 4


def test_what_is_not_frozen_is_in_the_file_too(tmp_path):
    model = trained(nn.Sequential(PreActivation(16, 16, 1), nn.PReLU(16), nn.ConvTranspose2d(16, 4, 2)))
    x = torch.randn(1, 16, 6, 6)
    frozen = quick(model, x)
    frozen.save(tmp_path / "frozen")
    fresh = nn.Sequential(PreActivation(16, 16, 1), nn.PReLU(16), nn.ConvTranspose2d(16, 4, 2))
    before = copy.deepcopy(fresh.state_dict())
    assert torch.equal(load_frozen(tmp_path / "frozen", fresh)(x), frozen(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_files_of_other_models_are_refused(tmp_path):
    quick(ResNet(), torch.randn(IMAGE)).save(tmp_path / "frozen")
    with pytest.raises(ValueError, match=r"another model: tensor stem\.0\.weight is \[16, 3, 3, 3\] in the file"):
        load_frozen(tmp_path / "frozen", ResNet(32))
    reordered = ResNet()
    reordered.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.ReLU())
    with pytest.raises(ValueError, match="belongs to another model: traced nodes"):
        load_frozen(tmp_path / "frozen", reordered)
    strided = ResNet()
    strided.stem[0].stride = (2, 2)
    with pytest.raises(ValueError, match=r"belongs to another model: layer stem\.0 is .*'stride': \(1, 1\)"):
        load_frozen(tmp_path / "frozen", strided)
    state = checkpoint.load_state(tmp_path / "frozen")
    state["layers"]["stem.0"]["bias"] = torch.zeros(3)
    checkpoint.save_state(state, tmp_path / "other")
    with pytest.raises(ValueError, match=r"the tensors of stem\.0 do not fit 16x3x3x3"):
        load_frozen(tmp_path / "other", ResNet())
    checkpoint.save_state({"kind": "other"}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no frozen network"):
        load_frozen(tmp_path / "other", ResNet())
    (tmp_path / "cut").write_bytes((tmp_path / "frozen").read_bytes()[:-100])
    with pytest.raises(ValueError, match="corrupt or cut short"):
        load_frozen(tmp_path / "cut", ResNet())
    with pytest.raises(FileNotFoundError):
        load_frozen(tmp_path / "missing", ResNet())


@needs_kernels
def test_a_sparse_file_loads_without_the_compiled_module(tmp_path, take_kernels_away):
    model = sparsekd.sparsify(trained(ResNet()), density=0.3)
    x = torch.randn(IMAGE)
    frozen = quick(model, x)
    frozen.save(tmp_path / "frozen")
    take_kernels_away()
    loaded = load_frozen(tmp_path / "frozen", ResNet())
    assert {layer.chosen for layer in loaded.plan} == {"dense"}
    assert "here is sparsekd._C is not there; freeze again on this machine" in loaded.plan.notes[-1]
    torch.testing.assert_close(loaded(x), frozen(x), rtol=1e-4, atol=1e-4)


class Channels(nn.Module):
    """Layers that freezing leaves as they are: a hook hangs on one."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(32, 32), nn.Linear(32, 8)
        self.mix.register_forward_hook(lambda module, inputs, y: y * 2)

    def forward(self, x):
        return self.head(self.mix(x).relu())


@pytest.mark.parametrize("saved", ["sparse", "dense"])
@pytest.mark.parametrize("given", ["sparse", "dense"])
def test_a_layer_that_freezing_leaves_is_read_into_a_dense_or_block_sparse_model(tmp_path, saved, given):
    """Its blocks were compared with the tensors of a dense layer: "belongs to another model"."""
    torch.manual_seed(0)
    model, x = Channels().eval(), torch.randn(3, 32)
    if saved == "sparse":
        sparsekd.sparsify(model, density=0.4)
    frozen = quick(model, x)
    assert "mix" not in [one.name for one in frozen.plan]
    frozen.save(tmp_path / "frozen")
    other = sparsekd.sparsify(Channels(), BlockPattern(8, 2), density=0.6) if given == "sparse" else Channels()
    before = {name: x.clone() for name, x in other.state_dict().items()}
    again = load_frozen(tmp_path / "frozen", other)
    assert torch.equal(again(x), frozen(x))
    assert again.plan == frozen.plan
    assert all(torch.equal(before[name], x) for name, x in other.state_dict().items())
