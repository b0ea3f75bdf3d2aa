"""Results of every kind: infinite, complex and whole numbers, objects and what is opaque."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.freeze import outputs

from .networks import quick


class Net(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.fc, self.after = nn.Linear(16, 32), after

    def forward(self, x):
        return self.after(self.fc(x))


@dataclasses.dataclass
class Named:
    logits: torch.Tensor
    name: str = "a"


class Box:
    def __init__(self, y):
        self.logits = y


class Opaque:
    __slots__ = ()


def sparse(after) -> nn.Module:
    torch.manual_seed(0)
    return sparsekd.sparsify(Net(after), density=0.5).eval()


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y.masked_fill(torch.arange(32) % 7 == 0, -math.inf),
        lambda y: torch.log(torch.relu(y)),
        torch.fft.rfft,
        lambda y: y.argmax(1),
        lambda y: y > 0,
        lambda y: (y, y.topk(3, dim=1)),
        lambda y: {"y": y, "n": 3, "inf": math.inf, "nan": math.nan},
    ],
)
def test_numbers_of_every_kind(after):
    model, x = sparse(after), torch.randn(4, 16)
    frozen = quick(model, x)
    with torch.no_grad():
        assert outputs.deviation(frozen(x), model(x), None) <= 1.0


@pytest.mark.parametrize("after", [Named, Box, lambda y: {"logits": y, "cache": Opaque()}])
def test_objects(after):
    model, x = sparse(after), torch.randn(4, 16)
    got, want = quick(model, x)(x), model(x)
    assert type(got) is type(want)
    logits = (lambda y: y["logits"]) if isinstance(got, dict) else (lambda y: y.logits)
    torch.testing.assert_close(logits(got), logits(want).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_positions_may_differ_where_a_tolerance_was_given(dtype):
    model, x = sparse(lambda y: torch.topk(y, 8, dim=1)), torch.randn(16, 16)
    frozen = quick(model, x, dtype=dtype, tolerance=0.3)
    values, positions = frozen(x)
    assert positions.dtype == torch.int64
    torch.testing.assert_close(values, model(x)[0].detach(), rtol=0.3, atol=0.3)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, -math.inf])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.inf])),
        (torch.tensor([math.nan]), torch.tensor([1.0])),
        (torch.tensor([1.0]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.0]), torch.tensor([1.0]).double()),
        (torch.tensor([1.0 + 1j]), torch.tensor([1.0 - 1j])),
        (torch.tensor([1]), torch.tensor([2])),
        (Named(torch.ones(1), "a"), Named(torch.ones(1), "b")),
        (Box(torch.zeros(1)), Box(torch.ones(1))),
        (np.ones(2), np.zeros(2)),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)]),
        ({"n": 3}, {"n": 4}),
    ],
)
def test_what_differs_is_seen(got, want):
    assert outputs.deviation(got, want, None) > 1.0
    assert outputs.deviation(want, want, None) == 0.0


def test_an_object_that_refers_to_itself():
    box = Box(torch.ones(2))
    box.me = box
    assert outputs.deviation(box, box, None) == 0.0
