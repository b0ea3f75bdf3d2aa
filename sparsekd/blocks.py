"""The storage every op shares: which blocks of a weight exist, and their values.

A weight is a matrix ``[rows, cols]``: a linear layer's ``[out, in]``, a convolution's ``[K, R*S*Cg]`` (tap-major,
channel last; ``Cg = C / groups``). It is cut into blocks of ``bh x bw``; a block that is not kept is stored nowhere.

    values  [nnzb, bh, bw]            float, zero padded where the last block of a row or column is ragged
    row_ptr [ceil(rows / bh) + 1]     int32, blocks of row block i are row_ptr[i] .. row_ptr[i + 1]
    col_idx [nnzb]                    int32, ascending inside a row block

The column index of a convolution's block is ``(r * S + s) * Cb + cb`` with ``Cb = ceil(Cg / bw)``. The same set of kept
blocks as a picture is the *block mask*: bool ``[ceil(K / bh), Cb, R, S]``, for a linear layer ``[ceil(out / bh), Cb]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockPattern:
    """The shape of one block: ``bh`` output rows by ``bw`` input columns.

    The default 16 x 1 is one AVX-512 register of outputs against one broadcast input: the fast path of the CPU kernels.
    """

    bh: int = 16
    bw: int = 1

    def __post_init__(self) -> None:
        for name, size in (("bh", self.bh), ("bw", self.bw)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(
                    f"BlockPattern: {name} must be a positive int, got {size!r}; "
                    "BlockPattern.for_device('cpu') gives one that runs fast"
                )

    def __str__(self) -> str:
        return f"{self.bh}x{self.bw}"

    @classmethod
    def parse(cls, text: str) -> BlockPattern:
        """Of ``str(pattern)``: "16x2". Raises ValueError for any other text."""
        sides = text.split("x")
        if len(sides) != 2 or not all(side.isdecimal() for side in sides):
            raise ValueError(f'BlockPattern.parse: expected outputs x inputs as in "16x1", got {text!r}')
        return cls(int(sides[0]), int(sides[1]))

    @classmethod
    def for_device(cls, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> BlockPattern:
        """The pattern whose block is the machine's own vector (design table: CPU 16x1/2/4, GPU tensor-core tiles)."""
        kind = torch.device(device).type
        if kind == "cpu":
            widths = {
                torch.float64: 1,
                torch.float32: 1,
                torch.bfloat16: 2,
                torch.float16: 2,
                torch.int8: 4,
                torch.uint8: 4,
            }
            if dtype not in widths:
                raise TypeError(f"BlockPattern.for_device: no CPU block for {dtype}; use one of {list(widths)}")
            return cls(16, widths[dtype])
        if kind == "cuda":
            return cls(64, 32)
        raise ValueError(f"BlockPattern.for_device: expected a cpu or cuda device, got {kind!r}")

    def grid(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the block mask of a weight ``[out, in]`` or ``[K, Cg, R, S]``."""
        if len(weight_shape) not in (2, 4):
            raise ValueError(
                f"BlockPattern.grid: expected a linear [out, in] or conv2d [K, C/groups, R, S] weight shape, "
                f"got {tuple(weight_shape)}"
            )
        rows, cols, *taps = weight_shape
        return (math.ceil(rows / self.bh), math.ceil(cols / self.bw), *taps)


@dataclass(frozen=True)
class BlockSparse:
    """A block-sparse weight as plain tensors (see the module docstring for the layout).

    ``shape`` is the dense shape, ``[out, in]`` or ``[K, C/groups, R, S]``.
    """

    values: Tensor
    row_ptr: Tensor
    col_idx: Tensor
    shape: tuple[int, ...]
    pattern: BlockPattern

    @classmethod
    def from_dense(
        cls, weight: Tensor, pattern: BlockPattern, *, density: float | None = None, mask: Tensor | None = None
    ) -> BlockSparse:
        """Keep some blocks of ``weight``: those of ``mask``, or the share ``density`` of largest L2 norm (default all).

        Args:
            weight: ``[out, in]`` or ``[K, C/groups, R, S]``, finite.
            density: share of blocks to keep, in (0, 1]; ties go to the lower index.
            mask: bool block mask of shape ``pattern.grid(weight.shape)``.
        """
        if density is not None and mask is not None:
            raise ValueError("BlockSparse.from_dense: give density or mask, not both")
        weight = weight.detach()
        if not torch.isfinite(weight).all():
            raise ValueError(
                "BlockSparse.from_dense: expected finite weights, got NaN or infinity; "
                "load a checkpoint from before the divergence"
            )
        if mask is None:
            mask = _largest_blocks(_cut(weight, pattern), 1.0 if density is None else density)
        else:
            mask = _check_mask(mask, pattern, weight.shape).to(weight.device)
        row_ptr, col_idx = mask_to_index(mask)
        return cls(gather_blocks(weight, pattern, mask), row_ptr, col_idx, tuple(weight.shape), pattern)

    def to_dense(self) -> Tensor:
        """The dense weight, zeros where no block is kept. Exact inverse of :meth:`from_dense` on the kept blocks."""
        grid = self.pattern.grid(self.shape)
        rows, cols, taps = grid[0], grid[1], grid[2:] or (1, 1)
        bh, bw = self.pattern.bh, self.pattern.bw
        blocks = self.values  # all of them, in this very order; or
        if len(blocks) < rows * math.prod(taps) * cols:
            blocks = self.values.new_zeros(rows * math.prod(taps) * cols, bh, bw)
            blocks[self._flat_position()] = self.values
        dense = blocks.view(rows, *taps, cols, bh, bw).permute(0, 4, 3, 5, 1, 2)  # [Rb, bh, Cb, bw, R, S]
        dense = dense.clone(memory_format=torch.contiguous_format)  # blocks of whole rows would lie as they should
        dense = dense.reshape(rows * bh, cols * bw, *taps)[: self.shape[0], : self.shape[1]]
        return dense.reshape(self.shape).contiguous()

    def repack(self, pattern: BlockPattern) -> BlockSparse:
        """The same weight in finer blocks, e.g. what was pruned for a GPU in the blocks a CPU is fast with.

        Raises ValueError unless the blocks of ``pattern`` divide those of this weight.
        """
        if self.pattern.bh % pattern.bh or self.pattern.bw % pattern.bw:
            raise ValueError(f"BlockSparse.repack: blocks of {pattern} must divide those of {self.pattern}")
        grid, mask = pattern.grid(self.shape), self.mask()
        mask = mask.repeat_interleave(self.pattern.bh // pattern.bh, 0)
        mask = mask.repeat_interleave(self.pattern.bw // pattern.bw, 1)[: grid[0], : grid[1]]
        return BlockSparse.from_dense(self.to_dense(), pattern, mask=mask)

    def mask(self) -> Tensor:
        """Bool block mask ``pattern.grid(shape)`` of the kept blocks."""
        grid = self.pattern.grid(self.shape)
        rows, cols, taps = grid[0], grid[1], grid[2:] or (1, 1)
        flat = torch.zeros(rows * math.prod(taps) * cols, dtype=torch.bool, device=self.values.device)
        flat[self._flat_position()] = True
        return flat.view(rows, *taps, cols).permute(0, 3, 1, 2).reshape(grid).contiguous()

    def row_block(self) -> Tensor:
        """``[nnzb]`` int64, the row block each kept block lies in."""
        counts = (self.row_ptr[1:] - self.row_ptr[:-1]).long()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def block_sizes(self) -> Tensor:
        """``[nnzb]`` int64, the weights really inside each kept block (a ragged last block has fewer than bh * bw)."""
        row = self.row_block()
        col = self.col_idx.long() % self.pattern.grid(self.shape)[1]
        heights = (self.shape[0] - row * self.pattern.bh).clamp(max=self.pattern.bh)
        widths = (self.shape[1] - col * self.pattern.bw).clamp(max=self.pattern.bw)
        return heights * widths

    def validate(self) -> None:
        """Raise ValueError unless the three tensors describe a weight of this shape and pattern."""
        grid = self.pattern.grid(self.shape)
        cols = math.prod(grid[1:])
        nnzb = self.values.shape[0]
        expected = {
            "values": (tuple(self.values.shape), (nnzb, self.pattern.bh, self.pattern.bw)),
            "row_ptr": (tuple(self.row_ptr.shape), (grid[0] + 1,)),
            "col_idx": (tuple(self.col_idx.shape), (nnzb,)),
        }
        for name, (got, want) in expected.items():
            if got != want:
                raise ValueError(
                    f"BlockSparse: {name} of a {self.pattern} weight {self.shape} must have shape {want}, got {got}"
                )
        for name, index in (("row_ptr", self.row_ptr), ("col_idx", self.col_idx)):
            if index.dtype != torch.int32:
                raise TypeError(f"BlockSparse: {name} must be int32, got {index.dtype}")
        counts = self.row_ptr[1:] - self.row_ptr[:-1]
        if int(self.row_ptr[0]) != 0 or int(self.row_ptr[-1]) != nnzb or bool((counts < 0).any()):
            raise ValueError(f"BlockSparse: row_ptr must rise from 0 to nnzb = {nnzb}, got {self.row_ptr.tolist()}")
        position = self._flat_position()
        if nnzb and (int(self.col_idx.min()) < 0 or int(self.col_idx.max()) >= cols):
            raise ValueError(f"BlockSparse: col_idx must lie in [0, {cols}), got a value outside")
        if bool((position[1:] <= position[:-1]).any()):
            raise ValueError("BlockSparse: col_idx must ascend inside each row block, without repeats")

    def _flat_position(self) -> Tensor:
        """``[nnzb]`` int64, position of each kept block in the row-major, tap-major picture of all blocks."""
        return self.row_block() * math.prod(self.pattern.grid(self.shape)[1:]) + self.col_idx.long()


def mask_to_index(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``(row_ptr, col_idx)`` of a block mask ``[Rb, Cb]`` or ``[Rb, Cb, R, S]``."""
    flat = tap_major(mask).flatten(1)
    row_ptr = torch.zeros(flat.shape[0] + 1, dtype=torch.int32, device=mask.device)
    row_ptr[1:] = flat.sum(1).cumsum(0)
    return row_ptr, flat.nonzero()[:, 1].to(torch.int32)


def gather_blocks(dense: Tensor, pattern: BlockPattern, mask: Tensor) -> Tensor:
    """``values [nnzb, bh, bw]``: the blocks of ``dense`` that the block mask names, in storage order."""
    return _cut(dense, pattern)[tap_major(mask)].contiguous()


def spread(values: Tensor, survives: Tensor) -> Tensor:
    """``values [old, ...]`` at the places that ``survives [new]`` (bool) names, in order; zeros at the others."""
    wide = values.new_zeros(len(survives), *values.shape[1:])
    wide[survives] = values
    return wide


def tap_major(mask: Tensor) -> Tensor:
    """``[Rb, Cb, R, S] -> [Rb, R, S, Cb]`` (a linear mask gets R = S = 1): a view in the order of storage."""
    return mask.reshape(*mask.shape[:2], *(mask.shape[2:] or (1, 1))).permute(0, 2, 3, 1)


def _cut(weight: Tensor, pattern: BlockPattern) -> Tensor:
    """All blocks of a dense weight, ``[Rb, R, S, Cb, bh, bw]``, zero padded to whole blocks."""
    rows, cols, *_ = pattern.grid(weight.shape)
    taps = tuple(weight.shape[2:]) or (1, 1)
    padded = weight.new_zeros(rows * pattern.bh, cols * pattern.bw, *taps)
    padded[: weight.shape[0], : weight.shape[1]] = weight.reshape(*weight.shape[:2], *taps)
    return padded.view(rows, pattern.bh, cols, pattern.bw, *taps).permute(0, 4, 5, 2, 1, 3)


def _largest_blocks(blocks: Tensor, density: float) -> Tensor:
    """Block mask keeping ``round(density * blocks)``, at least one, of largest L2 norm."""
    check_density("BlockSparse.from_dense", density)
    norms = blocks.float().square().sum((-2, -1)).permute(0, 3, 1, 2)  # [Rb, Cb, R, S]
    keep = max(1, round(density * norms.numel())) if norms.numel() else 0
    mask = torch.zeros(norms.numel(), dtype=torch.bool, device=norms.device)
    mask[norms.flatten().argsort(descending=True, stable=True)[:keep]] = True
    return mask.view(norms.shape)


def check_density(caller: str, density: float) -> None:
    """Raise ValueError unless density lies in (0, 1]."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"{caller}: density must lie in (0, 1], got {density}; 0.3 keeps 30 % of the blocks")


def _check_mask(mask: Tensor, pattern: BlockPattern, weight_shape: Sequence[int]) -> Tensor:
    want = pattern.grid(weight_shape)
    if mask.dtype != torch.bool:
        raise TypeError(f"BlockSparse.from_dense: mask must be bool, got {mask.dtype}; use mask.bool()")
    if tuple(mask.shape) != want:
        raise ValueError(
            f"BlockSparse.from_dense: the block mask of a {tuple(weight_shape)} weight under {pattern} must have shape "
            f"{want}, got {tuple(mask.shape)}"
        )
    return mask
