"""What the tests of taps and of distillation share: a network with names to tap, and who listens to it."""

import shutil

from torch import nn

BACKEND = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"


def network(channels=4, inputs=3):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()),
        nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, 2, 1), nn.BatchNorm2d(2 * channels), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(0),
        nn.Unflatten(0, (-1, 2 * channels)),
        nn.Linear(2 * channels, 5),
    )


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())
