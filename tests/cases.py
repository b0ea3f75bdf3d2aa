"""The shapes, patterns and densities that tests and benchmarks share, each with an id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from sparsekd import BlockPattern, BlockSparse


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """A state as checkpoints keep it: tensors through safetensors, the rest through JSON."""
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
    rest = {key: value for key, value in state.items() if key not in tensors}
    return load(save(tensors)) | json.loads(json.dumps(rest))


@dataclass(frozen=True)
class Conv:
    """One convolution: input [n, c, *image] with k outputs."""

    id: str
    n: int = 2
    c: int = 16
    k: int = 32
    image: tuple[int, int] = (8, 8)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pattern: BlockPattern = field(default=BlockPattern(16, 1))
    density: float = 0.3

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.k, self.c // self.groups, *self.kernel)

    @property
    def geometry(self) -> dict:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }


@dataclass(frozen=True)
class Linear:
    """One linear layer: input [*batch, inputs]."""

    id: str
    batch: tuple[int, ...] = (4,)
    inputs: int = 32
    outputs: int = 48
    pattern: BlockPattern = field(default=BlockPattern(16, 1))
    density: float = 0.3

    @property
    def weight_shape(self) -> tuple[int, int]:
        return (self.outputs, self.inputs)


def _convs(suite: str) -> list[Conv]:
    """Those of conv2d_cases.txt that belong to a suite."""
    cases = []
    for line in (Path(__file__).parent / "conv2d_cases.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, suites, *sizes, density = line.split()
        n, c, h, w, k, r, s, *pairs, groups, bh, bw = map(int, sizes)
        if suite in suites.split(","):
            stride, padding, dilation = zip(pairs[::2], pairs[1::2], strict=True)
            steps = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
            cases.append(
                Conv(name, n, c, k, (h, w), (r, s), **steps, pattern=BlockPattern(bh, bw), density=float(density))
            )
    return cases


CONVS = _convs("ops")
ISA_CONVS = _convs("isa")

LINEARS = [
    Linear("plain"),
    Linear("dense", density=1.0),
    Linear("no-blocks", density=0.0),
    Linear("batch-1", batch=(1,)),
    Linear("batch-0", batch=(0,)),
    Linear("vector", batch=()),
    Linear("batch-3x5", batch=(3, 5)),
    Linear("batch-67", batch=(67,), inputs=100, outputs=130),
    Linear("one-output", outputs=1),
    Linear("one-input", inputs=1),
    Linear("16x2", pattern=BlockPattern(16, 2), inputs=33),
    Linear("16x4", pattern=BlockPattern(16, 4)),
    Linear("64x32", pattern=BlockPattern(64, 32), inputs=80, outputs=100),
    Linear("8x8", pattern=BlockPattern(8, 8)),
    Linear("1x32", pattern=BlockPattern(1, 32)),
]


def _eights(size: int, groups: int = 1) -> int:
    return -(-size // (8 * groups)) * 8 * groups


def tensor_core_case(case: Conv | Linear) -> Conv | Linear:
    """The same geometry with blocks and channels that tensor cores take."""
    bh, bw = (-(-size // 16) * 16 for size in (case.pattern.bh, case.pattern.bw))
    if isinstance(case, Linear):
        sizes = {"inputs": _eights(case.inputs), "outputs": _eights(case.outputs)}
    else:
        sizes = {"c": _eights(case.c, case.groups), "k": -(-case.k // (bh * case.groups)) * bh * case.groups}
        sizes["k"] = sizes["k"] if case.groups > 1 else _eights(case.k)
    return replace(case, **sizes, pattern=BlockPattern(bh, bw))


def random_mask(case: Conv | Linear, generator: torch.Generator) -> torch.Tensor:
    """A block mask of about the case's density in which, from three row blocks up, the first row block is empty."""
    mask = torch.rand(case.pattern.grid(case.weight_shape), generator=generator) < case.density
    if 0 < case.density < 1 and mask.shape[0] >= 3:
        mask[0] = False
    if case.density and not mask.any():
        mask.view(-1)[-1] = True
    return mask


def random_weight(case: Conv | Linear, dtype: torch.dtype = torch.float64) -> tuple[BlockSparse, torch.Tensor]:
    """A seeded block-sparse weight of the case and the same weight dense."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(case.weight_shape, generator=generator, dtype=dtype)
    blocks = BlockSparse.from_dense(dense, case.pattern, mask=random_mask(case, generator))
    return blocks, blocks.to_dense()


def activations64(v):
    """What `_C.ACTIVATIONS` mean, in fp64; by erfc, since 1 + erf loses all digits far below zero."""
    steps = (v + 3).clamp(0, 6)
    return {
        "none": v,
        "relu": v.relu(),
        "relu6": v.clamp(0, 6),
        "silu": v / (1 + (-v).exp()),
        "hardswish": v * steps / 6,
        "hardsigmoid": steps / 6,
        "sigmoid": 1 / (1 + (-v).exp()),
        "gelu": v * torch.special.erfc(-v / 2**0.5) / 2,
        "gelu_tanh": v / (1 + (-((8 / torch.pi) ** 0.5) * (v + 0.044715 * v**3)).exp()),
    }
