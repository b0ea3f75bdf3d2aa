"""Norms and layers however a model spells them: folded, or named in the plan."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekd
from sparsekd.freeze import load_frozen

from .networks import assert_frozen_equals, calls, quick


class MyNorm(nn.BatchNorm2d):
    pass


class NormAct(nn.BatchNorm2d):
    """As timm's: the activation inside, and a check of the shape in front."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4D input")
        numbers = (self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(F.batch_norm(x, *numbers))


class FrozenNorm(nn.Module):
    """As torchvision's."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


class FunctionalNorm(FrozenNorm):
    """The same by torch's functions."""

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        shift = self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale
        return torch.add(torch.mul(x, scale), shift)


class MyConv(nn.Conv2d):
    pass


class Standardised(nn.Conv2d):
    """Its weight is computed from a Parameter at every call."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def trained(model):
    for module in model.modules():
        if hasattr(module, "running_var"):
            with torch.no_grad():
                for name in ("weight", "bias", "running_mean"):
                    getattr(module, name).normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("conv", [nn.Conv2d, MyConv, Standardised])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, MyNorm, NormAct, FrozenNorm, FunctionalNorm, nn.SyncBatchNorm])
def test_norms_of_images(norm, conv, tmp_path):
    torch.manual_seed(0)

    def build():
        return nn.Sequential(conv(3, 32, 3, bias=False), norm(32), conv(32, 16, 3), norm(16))

    model, x = trained(sparsekd.sparsify(build(), density=0.5)), torch.randn(2, 3, 9, 9)
    frozen = quick(model, x)
    assert set(calls(frozen)) == {"frozen"}
    assert not any(note.startswith("batch norms") for note in frozen.plan.notes)
    assert_frozen_equals(model, frozen, x)
    assert_frozen_equals(model, frozen, torch.randn(3, 3, 12, 7))
    frozen.save(tmp_path / "frozen")
    assert torch.equal(load_frozen(tmp_path / "frozen", build())(x), frozen(x))


def test_a_norm_that_no_layer_takes_in_is_named():
    model = trained(nn.Sequential(nn.Conv3d(4, 8, 3), nn.BatchNorm3d(8), nn.Flatten(), nn.Linear(64, 4)))
    x = torch.randn(2, 4, 4, 4, 4)
    frozen = quick(model, x)
    assert "batch norms that no layer takes in: 1" in frozen.plan.notes
    assert_frozen_equals(model, frozen, x)


def test_a_tapped_student_is_fused_as_an_untapped_one():
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()), torch.randn(2, 3, 8, 8)
    tap = sparsekd.FeatureTap(model, ["2"])
    tap(x)
    frozen = quick(model, x)
    assert "bn+relu" in str(frozen.plan) and not any("hooks" in note for note in frozen.plan.notes)
    assert len(tap(x)[1]) == 1, "the model's own tap still listens"


def test_a_layer_with_a_hook_is_left_and_named():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    model[0].register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(3, 16)
    frozen = quick(model, x)
    assert [one.name for one in frozen.plan] == ["2"]
    assert any(note.startswith("hooks of 0") for note in frozen.plan.notes)
    assert_frozen_equals(model, frozen, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: torch.nn.utils.weight_norm(layer),
        lambda layer: torch.nn.utils.spectral_norm(layer),
        lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
        lambda layer: torch.nn.utils.parametrizations.spectral_norm(layer),
    ],
    ids=["prune", "weight_norm", "spectral_norm", "parametrized weight_norm", "parametrized spectral_norm"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_is_computed_is_the_current_one(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    change(model[0])
    optimizer, x = torch.optim.SGD(model.parameters(), 0.5), torch.randn(3, 16)
    model(x).square().sum().backward()
    optimizer.step()
    model.train()(x).sum().backward()  # torch's hooks leave a weight with a graph behind
    model.eval()
    frozen = quick(model, x)
    assert [one.name for one in frozen.plan] == ["0", "2"]
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(model[0]._forward_pre_hooks) + hasattr(model[0], "parametrizations") == 1  # the model keeps its own


@pytest.mark.parametrize("groups", [1, 16])
def test_blocks_of_one_channel(groups):
    channels = 1 if groups == 1 else 16
    model = nn.Sequential(nn.Conv2d(channels, channels, 3, groups=groups))
    model = sparsekd.sparsify(model, sparsekd.BlockPattern(1, 1), 0.5, include=["0"])
    x = torch.randn(2, channels, 8, 8)
    assert_frozen_equals(model, quick(model, x), x)


def test_models_built_in_inference_mode_or_scripted():
    def build():
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval()

    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        served = build()
    for model in (served, torch.jit.script(build()), torch.jit.trace(build(), x)):
        with torch.inference_mode():
            want = copy.deepcopy(model)(x) if not isinstance(model, torch.jit.ScriptModule) else model(x)
        torch.testing.assert_close(quick(model, x)(x), want.clone(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 9)])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_before_any_layer_is_a_scale_and_a_shift(tmp_path, shape, affine):
    """It stands behind a log here, as numbers of a click model do, so that nothing can take it in."""

    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(6, affine=affine), nn.Linear(shape[-1], 16)

        def forward(self, x):
            return self.layer(self.norm(x.abs().log1p()))

    torch.manual_seed(0)
    model, x = Numbers(), torch.randn(shape)
    model.train()(x)
    model = sparsekd.sparsify(trained(model) if affine else model.eval(), density=0.5)
    frozen = sparsekd.freeze(model, x, min_gain=0.0)
    assert not any(type(module) is nn.BatchNorm1d for module in frozen.network.modules())
    assert "norm" in str(frozen.plan)  # which says that no layer takes it in
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-6)
    frozen.save(tmp_path / "frozen")
    fresh = sparsekd.sparsify(Numbers().eval(), density=0.5)  # with other weights and statistics
    assert torch.equal(sparsekd.load_frozen(tmp_path / "frozen", fresh)(x), frozen(x))
    frozen.export(tmp_path / "network.skd")
    torch.testing.assert_close(sparsekd.load_frozen(tmp_path / "network.skd")(x), frozen(x), rtol=1e-5, atol=1e-6)
