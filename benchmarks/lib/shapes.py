"""Every layer that is measured anywhere: by network for sweeps, and the named ones of the suites, the gate, the GPU.

Names are what kept results call a layer, so that a new figure is held against the old one of the same layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Conv:
    """A convolution of square images, padded by half its kernel."""

    group: str
    channels: int
    size: int
    out_channels: int
    kernel: int
    stride: int = 1

    @property
    def weight(self) -> tuple[int, ...]:
        return self.out_channels, self.channels, self.kernel, self.kernel

    @property
    def input(self) -> tuple[int, ...]:
        return self.channels, self.size, self.size

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def build(self) -> nn.Conv2d:
        return nn.Conv2d(self.channels, self.out_channels, self.kernel, self.stride, self.padding)

    def __str__(self) -> str:
        kernel = f"{self.kernel}x{self.kernel}/{self.stride}"
        return f"{self.channels}->{self.out_channels} {kernel} at {self.size}x{self.size}"


@dataclass(frozen=True)
class Linear:
    group: str
    inputs: int
    outputs: int

    @property
    def weight(self) -> tuple[int, ...]:
        return self.outputs, self.inputs

    @property
    def input(self) -> tuple[int, ...]:
        return (self.inputs,)

    def build(self) -> nn.Linear:
        return nn.Linear(self.inputs, self.outputs)

    def __str__(self) -> str:
        return f"linear {self.inputs}->{self.outputs}"


Layer = Conv | Linear

CONVS = [
    *(Conv("resnet50", *sizes) for sizes in [
        (64, 56, 64, 3), (64, 56, 256, 1), (256, 56, 64, 1), (256, 56, 512, 1, 2), (128, 56, 128, 3, 2),
        (128, 28, 128, 3), (512, 28, 128, 1), (128, 28, 512, 1), (256, 14, 256, 3), (1024, 14, 256, 1),
        (256, 14, 1024, 1), (512, 7, 512, 3), (2048, 7, 512, 1), (512, 7, 2048, 1),
    ]),
    *(Conv("cifar", *sizes) for sizes in [
        (16, 32, 16, 3), (32, 32, 32, 3), (64, 32, 64, 3), (32, 16, 32, 3), (64, 16, 64, 3), (128, 16, 128, 3),
        (64, 8, 64, 3), (128, 8, 128, 3), (256, 8, 256, 3),
    ]),
    *(Conv("mobilenetv2", *sizes, 1) for sizes in [
        (16, 112, 96), (96, 56, 24), (24, 56, 144), (144, 28, 32), (32, 28, 192), (192, 14, 64), (64, 14, 384),
        (384, 14, 96), (96, 14, 576), (576, 7, 160), (160, 7, 960), (960, 7, 320), (320, 7, 1280),
    ]),
    *(Conv("recommender", *sizes) for sizes in [
        (8, 16, 32, 3), (32, 16, 32, 3), (32, 16, 64, 3, 2), (32, 16, 64, 1, 2), (64, 8, 64, 3), (64, 8, 128, 3, 2),
        (64, 8, 128, 1), (128, 4, 128, 3),
    ]),
]  # fmt: skip
LINEARS = [
    Linear("mlp", *sizes)
    for sizes in [(256, 256), (256, 1024), (1024, 256), (1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096)]
]
BATCHES = {
    "resnet50": [1, 16],
    "cifar": [1, 64],
    "mobilenetv2": [1, 16],
    "recommender": [1, 64, 512],
    "mlp": [1, 16, 64],
}

Sized = tuple[int, Layer]  # a layer and its batch size

QUICK: dict[str, Sized] = {
    "conv-64-64-8x8": (16, Conv("student", 64, 8, 64, 3)),
    "linear-256-256": (64, Linear("mlp", 256, 256)),
}
SUITE: dict[str, Sized] = {
    "student-32-32-8x8": (64, Conv("student", 32, 8, 32, 3)),
    "student-32-64-8x8-s2": (64, Conv("student", 32, 8, 64, 3, 2)),
    "student-64-64-4x4": (64, Conv("student", 64, 4, 64, 3)),
    "wrn-32-32-32x32": (16, Conv("wrn-16-2", 32, 32, 32, 3)),
    "wrn-128-128-8x8": (16, Conv("wrn-16-2", 128, 8, 128, 3)),
    "resnet-64-64-56x56": (1, Conv("resnet50", 64, 56, 64, 3)),
    "resnet-256-256-14x14": (1, Conv("resnet50", 256, 14, 256, 3)),
    "resnet-512-128-28x28-1x1": (1, Conv("resnet50", 512, 28, 128, 1)),
    "resnet-512-512-7x7": (1, Conv("resnet50", 512, 7, 512, 3)),
    "linear-512-512-n1": (1, Linear("mlp", 512, 512)),
    "linear-512-512-n64": (64, Linear("mlp", 512, 512)),
    "linear-1024-4096-n64": (64, Linear("mlp", 1024, 4096)),
}
GATE: dict[str, Sized] = {
    "conv-64-64-4x4": (64, Conv("student", 64, 4, 64, 3)),
    "conv-128-128-8x8": (8, Conv("wrn-16-2", 128, 8, 128, 3)),
    "conv-256-256-14x14": (1, Conv("resnet50", 256, 14, 256, 3)),
    "conv-256-64-14x14-1x1": (4, Conv("resnet50", 256, 14, 64, 1)),
    "linear-512-512": (64, Linear("mlp", 512, 512)),
    "linear-256-1024": (128, Linear("mlp", 256, 1024)),
}
GPU: dict[str, Conv] = {
    "resnet50-3x3-64": Conv("resnet50", 64, 56, 64, 3),
    "resnet50-3x3-128": Conv("resnet50", 128, 28, 128, 3),
    "resnet50-3x3-256": Conv("resnet50", 256, 14, 256, 3),
    "resnet50-3x3-512": Conv("resnet50", 512, 7, 512, 3),
    "resnet50-3x3-128-stride2": Conv("resnet50", 128, 56, 128, 3, 2),
    "resnet50-1x1-1024-256": Conv("resnet50", 1024, 14, 256, 1),
    "resnet50-1x1-2048-512": Conv("resnet50", 2048, 7, 512, 1),
    "wrn-28-10-160": Conv("wrn-28-10", 160, 32, 160, 3),
    "wrn-28-10-320": Conv("wrn-28-10", 320, 16, 320, 3),
    "wrn-28-10-640": Conv("wrn-28-10", 640, 8, 640, 3),
    "vgg16-256": Conv("vgg16", 256, 56, 256, 3),
    "vgg16-512": Conv("vgg16", 512, 28, 512, 3),
    "vgg16-512-14": Conv("vgg16", 512, 14, 512, 3),
}
REHEARSAL: dict[str, Conv] = {  # of the GPU's benchmarks, interpreted on a CPU
    "tiny-3x3": Conv("tiny", 16, 4, 32, 3),
    "tiny-1x1": Conv("tiny", 32, 4, 16, 1),
    "tiny-stride2": Conv("tiny", 16, 5, 16, 3, 2),
}
