"""The dense peer whose inner channels are really gone."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.lib.models import wrn_16_2
from benchmarks.suites.compact import compact, count_weights
from benchmarks.suites.networks import randomised
from sparsekd.models import STUDENT, RatingCNN


@pytest.mark.parametrize("density", [0.5, 0.2])
def test_compacting_cuts_inner_channels_and_computes_the_same(density):
    sizes = {"user_features": 5, "item_features": 6}
    for model, inputs in [
        (RatingCNN(sizes, STUDENT), (torch.rand(3, 5), torch.rand(3, 6), torch.rand(3))),
        (wrn_16_2(), (torch.rand(2, 3, 32, 32),)),
        (nn.Sequential(nn.Conv2d(3, 9, 3, bias=True), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 8, 1), nn.Flatten(),
                       nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 2)), (torch.rand(2, 3, 3, 3),)),
    ]:  # fmt: skip
        model = randomised(model).eval()
        before = copy.deepcopy(model.state_dict())
        zeroed, smaller = compact(model, density)
        torch.testing.assert_close(smaller(*inputs), zeroed(*inputs), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(smaller(*inputs), model(*inputs))
        assert count_weights(smaller) < count_weights(model) == count_weights(zeroed)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_compacting_reaches_the_share_that_is_asked_for():
    _, smaller = compact(wrn_16_2().eval(), 0.5)
    assert 0.47 < count_weights(smaller) / count_weights(wrn_16_2()) <= 0.5


def test_what_cannot_be_compacted_says_so():
    with pytest.raises(ValueError, match="no layer feeds exactly one other"):
        compact(nn.Sequential(nn.Linear(3, 4)), 0.5)

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch\.fx cannot trace"):
        compact(Branches(), 0.5)
