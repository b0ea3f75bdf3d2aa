"""The layers that are measured, by network: `benchmarks.conv2d` and the suites take them from here."""

from __future__ import annotations

from dataclasses import dataclass


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

    def __str__(self) -> str:
        return f"linear {self.inputs}->{self.outputs}"


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
