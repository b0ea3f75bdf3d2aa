"""What is pruned runs as torch's own layers until the first block goes."""

import copy

import pytest
import torch
from torch import nn

from sparsekd import BlockPattern, ops, sparsify
from sparsekd.pruning import Pruner

CASES = {
    "linear": (lambda: nn.Linear(20, 40), (6, 20)),
    "conv2d": (lambda: nn.Conv2d(5, 20, 3, stride=2, padding=1), (3, 5, 9, 8)),
    "1x1": (lambda: nn.Conv2d(16, 16, 1, bias=False), (3, 16, 5, 4)),
    "grouped": (lambda: nn.Conv2d(8, 32, 3, groups=2, padding="same"), (3, 8, 6, 6)),
    "circular": (lambda: nn.Conv2d(4, 16, 3, padding=1, padding_mode="circular"), (3, 4, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 16, 3, padding=2), (3, 6, 11)),
    "conv3d": (lambda: nn.Conv3d(6, 16, 1, padding=1), (2, 6, 3, 4, 5)),
}


def results(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])


LAYOUTS = [(name, last) for name, (_, shape) in CASES.items() for last in (False, True) if not last or len(shape) == 4]


@pytest.mark.parametrize(("name", "channels_last"), LAYOUTS)
def test_a_full_layer_computes_what_its_kernels_would(name, channels_last):
    make, shape = CASES[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    by_kernels = sparsify(copy.deepcopy(model), BlockPattern(16, 1))[0]
    assert not by_kernels.computes_densely  # whoever converts a model gets the kernels
    Pruner(model, pattern=BlockPattern(16, 1))
    assert model[0].computes_densely
    torch.testing.assert_close(results(model[0], x), results(by_kernels, x), rtol=1e-4, atol=1e-4)
    if model[0].weight.dim() == 4 and model[0].groups == 1:  # of grouped ones torch decides
        assert model[0](x).stride() == by_kernels(x).stride()


def test_the_kernels_come_with_the_first_prune_and_go_with_the_last_block_back(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Flatten(), nn.Linear(128, 16)), torch.randn(2, 4, 4, 4)
    pruner = Pruner(model, pattern=BlockPattern(16, 1), scope="layer")
    called = []
    for name in ("conv2d", "linear"):
        op = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *args, op=op, name=name, **options: called.append(name) or op(*args, **options)
        )
    model(x)
    assert called == []
    pruner.prune_to(0.3)
    want = sparsify(copy.deepcopy(model), BlockPattern(16, 1))(x)
    called.clear()
    torch.testing.assert_close(model(x), want)
    assert sorted(called) == ["conv2d", "linear"]
    pruner.grow_to(0.0)
    called.clear()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)  # what comes back is zero
    assert called == []


def test_full_layers_compile_into_one_graph():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(64, 16)), torch.randn(2, 4, 4, 4)
    Pruner(model, pattern=BlockPattern(16, 1))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
