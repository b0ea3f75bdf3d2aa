"""A model that was looked at is in the modes that it had, also where the look failed."""

import pytest
from torch import nn

from sparsekd.modes import evaluation_mode


def test_every_module_is_back_in_its_own_mode():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    assert before == [True, True, True, False, True]
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
