"""Which blocks of a layer go together, so that a kernel can walk what is left in wide tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import BlockSparse


@dataclass(frozen=True)
class Grouping:
    """Blocks that stay or go as one unit, for ``Pruner(grouping=)``.

    Args:
        rows: output channels that share one set of kept (tap, input block) columns. A tile of that many channels then
            multiplies no zeros: it is a dense product over gathered inputs. 0: every row block for itself.
        cols: input channels that do, which gives the gradient of the input the same. 0: every column block for itself.
        taps: all taps of a kernel stay or go together.
        equal: every group of rows keeps the same number of columns: programs of a grid end together.

    The coarser the units, the fewer masks there are to choose from, which costs accuracy
    (benchmarks/results/gpu_patterns.json). Kept blocks stay ordinary blocks: the layer runs wherever its pattern runs.
    """

    rows: int = 0
    cols: int = 0
    taps: bool = False
    equal: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "cols"):
            if getattr(self, name) < 0:
                raise ValueError(f"Grouping: {name} must be channels, 0 for single blocks, got {getattr(self, name)}")

    @classmethod
    def for_device(cls, device: str | torch.device) -> Grouping:
        """What the kernels of a device like: single blocks on a CPU, columns of 256 outputs and equal rows on a GPU.

        256 is the widest tile (kernels/tiles.py): by the cost model 1.8x dense at density 0.5, where 128 gives 1.4x
        (benchmarks/results/gpu_model.json, masks "wide" and "square"). ``cols=256`` gives both gradients the same.
        """
        return cls(rows=256, equal=True) if torch.device(device).type == "cuda" else cls()

    def units(self, blocks: BlockSparse, worth: Tensor) -> Tensor:
        """``[nnzb]`` int64 on the CPU: the unit of each block, numbered from 0 without gaps.

        ``worth [nnzb]`` says what a block adds to its unit; only ``equal`` looks at it.
        """
        grid, pattern = blocks.pattern.grid(blocks.shape), blocks.pattern
        if self == Grouping():
            return torch.arange(blocks.col_idx.shape[0])
        tall, wide = (_whole(self, *of) for of in (("rows", pattern.bh), ("cols", pattern.bw)))
        column = blocks.col_idx.cpu().long()
        group = blocks.row_block().cpu() // tall
        tap = torch.zeros_like(column) if self.taps else column // grid[1]
        per_tap = math.ceil(grid[1] / wide)
        columns = per_tap * math.prod(grid[2:])
        places = group * columns + tap * per_tap + column % grid[1] // wide
        kept, unit = torch.unique(places, return_inverse=True)
        return _ranks(blocks, unit, kept // columns, worth)[unit] if self.equal else unit


def _whole(grouping: Grouping, name: str, block: int) -> int:
    """Blocks of a group in one direction."""
    channels = getattr(grouping, name)
    if channels > block and channels % block:
        raise ValueError(f"Grouping: {name} must be a multiple of the block's {block} channels, got {channels}")
    return max(channels // block, 1)


def _ranks(blocks: BlockSparse, unit: Tensor, group: Tensor, worth: Tensor) -> Tensor:
    """``[units]``: place of each unit in its group of rows, weakest last. What is alike in place goes together."""
    sums = torch.zeros(2, group.shape[0], dtype=torch.float64)
    sums.index_add_(1, unit, torch.stack((worth.double(), blocks.block_sizes().cpu().double())))
    strongest_first = (sums[0] / sums[1]).argsort(descending=True, stable=True)
    order = strongest_first[group[strongest_first].argsort(stable=True)]
    places = torch.arange(group.shape[0])
    first = torch.searchsorted(group[order].contiguous(), group[order].contiguous())
    ranks = torch.empty_like(places)
    ranks[order] = places - first
    return ranks
