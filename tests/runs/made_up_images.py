"""Runs on made-up pictures: tiny networks, tiny parts."""

import torch

from sparsekd import models
from sparsekd.data import cifar100
from sparsekd.methods import METHODS
from sparsekd.runs import RunConfig
from sparsekd.runs.plans import images

from ..cifar import PER_CLASS


class Tiny(models.Classifier):
    """A stem, one block with a tap, a head: trains in no time and is pruned like the others."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, width, 3, 2, 1)
        self.block = models.BasicBlock(width, 2 * width, 2)
        self.head = torch.nn.Linear(2 * width, 100)

    @property
    def tap_names(self):
        return ("block.relu1", "block.relu2")

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def few(monkeypatch):
    """The reader takes our few pictures for the official files."""
    monkeypatch.setattr(cifar100, "IMAGES", {part: 100 * count for part, count in PER_CLASS.items()})


def shrink(monkeypatch):
    few(monkeypatch)
    monkeypatch.setitem(models.CLASSIFIERS, "wrn-40-2", lambda classes: Tiny(32))
    monkeypatch.setitem(models.CLASSIFIERS, "wrn-16-2", lambda classes: Tiny())
    monkeypatch.setattr(images, "QUICK", {"images": 200, "validation": 200, "test": 100, "pixels": 8})


def config(folder, out, **fields) -> RunConfig:
    fields = {"methods": ("kd", "at", *METHODS, "random", "magnitude"), "densities": (0.6, 0.3), **fields}
    return RunConfig("cifar100", str(folder), quick=True, out=str(out), measure=False, device="cpu", **fields)
