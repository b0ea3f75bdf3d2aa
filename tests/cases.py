"""The shapes, patterns and densities that tests and benchmarks share, each with an id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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


CONVS = [
    Conv("3x3"),
    Conv("dense", density=1.0),
    Conv("no-blocks", density=0.0),
    Conv("one-block", density=1e-9),
    Conv("ragged-channels", c=13, k=37),
    Conv("fewer-outputs-than-a-block", k=5),
    Conv("stride-2", stride=(2, 2), image=(9, 7)),
    Conv("stride-3x1-odd", stride=(3, 1), image=(11, 5)),
    Conv("1x1", kernel=(1, 1), padding=(0, 0)),
    Conv("1x1-stride-2", kernel=(1, 1), padding=(0, 0), stride=(2, 2), image=(7, 7)),
    Conv("7x7-image", image=(7, 7), c=24, k=64),
    Conv("4x4-image", image=(4, 4), n=5),
    Conv("wide-image", image=(3, 61)),
    Conv("1x1-image", image=(1, 1)),
    Conv("dilation-2", dilation=(2, 2), padding=(2, 2)),
    Conv("dilation-stride", dilation=(2, 1), padding=(3, 0), stride=(2, 3), image=(12, 13)),
    Conv("5x3-kernel", kernel=(5, 3), padding=(2, 1)),
    Conv("kernel-larger-than-image", kernel=(5, 5), padding=(2, 2), image=(3, 3)),
    Conv("much-padding", padding=(4, 3)),
    Conv("no-padding", padding=(0, 0)),
    Conv("groups-2", groups=2),
    Conv("groups-4-ragged-inputs", groups=4, c=12, k=64),
    Conv("depthwise", groups=16, k=16, pattern=BlockPattern(1, 1)),
    Conv("batch-0", n=0),
    Conv("batch-1", n=1),
    Conv("stem", c=3, k=32, stride=(2, 2), image=(15, 15)),
    Conv("32x1", pattern=BlockPattern(32, 1), k=64),
    Conv("48x1-ragged", pattern=BlockPattern(48, 1), k=80),
    Conv("16x2", pattern=BlockPattern(16, 2)),
    Conv("16x4-ragged", pattern=BlockPattern(16, 4), c=18, k=24),
    Conv("64x32", pattern=BlockPattern(64, 32), c=48, k=100, density=0.5),
    Conv("8x1", pattern=BlockPattern(8, 1)),
    Conv("4x4", pattern=BlockPattern(4, 4)),
    Conv("1x1-block", pattern=BlockPattern(1, 1)),
    Conv("filters", pattern=BlockPattern(1, 16)),
    Conv("5x3-ragged", pattern=BlockPattern(5, 3), c=17, k=33),
]

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
