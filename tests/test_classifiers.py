"""The image networks: sizes that the papers give, taps, tracing, pruning and freezing as the rating networks."""

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import models

SMALL = ("wrn-16-2", "mobilenet-v2-half")  # the large ones are the same code
TAPS = {"wrn-40-2": 18, "wrn-16-2": 6, "resnet-34": 16, "resnet-18": 8, "mobilenet-v2": 6, "mobilenet-v2-half": 6}


def features(model, size=32):
    tap = sparsekd.FeatureTap(model.eval(), model.tap_names)
    with torch.no_grad():
        return tap(torch.randn(2, 3, size, size))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # WRN: arXiv 2401.10484 and 1605.07146; ResNet: torchvision's 11,689,512 and 21,797,672 for 1000 classes and a 7x7
    # stem, less 900 x 513 in the head and 64 x 3 x (49 - 9) in the stem.
    [("wrn-40-2", 2_255_156), ("wrn-16-2", 703_284), ("resnet-18", 11_220_132), ("resnet-34", 21_328_292)],
)
def test_parameters(name, parameters):
    assert sum(p.numel() for p in models.classifier(name).parameters()) == parameters


@pytest.mark.parametrize("name", models.CLASSIFIERS)
def test_taps_are_post_activation_maps_from_shallow_to_deep(name):
    logits, maps = features(models.classifier(name, classes=7), size=16)
    assert logits.shape == (2, 7)
    assert len(maps) == TAPS[name]
    sizes = [one.shape[-1] for one in maps]
    assert sizes == sorted(sizes, reverse=True)
    assert all(one.min() == 0 and one.max() > 0 for one in maps)


def test_taps_of_wrn_see_every_block():
    _, maps = features(models.classifier("wrn-40-2"))
    assert [tuple(one.shape[1:]) for one in maps] == [(32, 32, 32)] * 6 + [(64, 16, 16)] * 6 + [(128, 8, 8)] * 6


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name):
    model = models.classifier(name, classes=5)
    nn.functional.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.arange(8) % 5).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", SMALL)
def test_prunes_and_freezes(name):
    model = sparsekd.sparsify(models.classifier(name, classes=5), density=0.4, exclude=["head"]).eval()
    x = torch.randn(2, 3, 16, 16)
    frozen = sparsekd.freeze(model, x, layer_ms=1.0)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-3, atol=1e-4)
    assert not any("could not" in note or "fails" in note for note in frozen.plan.notes)


def test_other_names_and_depths_are_refused():
    with pytest.raises(ValueError, match="must be one of wrn-40-2"):
        models.classifier("vgg")
    with pytest.raises(ValueError, match="6 n \\+ 4"):
        models.WideResNet(18, 2)
