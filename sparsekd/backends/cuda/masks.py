"""Everything derived from a block mask: built on the device when the mask is first seen, kept while it is in use."""

from __future__ import annotations

import math
from functools import cached_property
from threading import RLock
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.kernels import index as tables
from sparsekd.kernels.index import StepTable, Weight

from ...ops.conv2d import Geometry
from .device import build_to_keep, is_capturing
from .recent import Recent

MASKS_KEPT = 1024
SIZES_KEPT = 256  # of operands that a mask keeps what is known of: sequences may come in thousands of lengths
ONE_PIXEL = Geometry((1, 1))
TALL = 128  # channels of a wide tile


class Channels(NamedTuple):
    """The output and input channels that some kept block touches; without conv groups."""

    outputs: Tensor
    inputs: Tensor


class Mask:
    """One block mask. Holds the index tensors it was found by, so that their memory cannot be used again."""

    def __init__(self, row_ptr: Tensor, col_idx: Tensor, weight: Weight) -> None:
        self.given = row_ptr, col_idx
        self.row_ptr, self.col_idx, self.weight = _to_keep(row_ptr), _to_keep(col_idx), weight
        self.tables: dict[tuple[str, int, int], StepTable] = {}
        self.choices = Recent(SIZES_KEPT)  # of choose.py, by problem
        self.ready = Recent(SIZES_KEPT)  # of ops.py, by operands
        self.captured = False
        self.asked = 0  # when it was last asked for, in questions to ``Masks``

    @property
    def density(self) -> float:
        return self.col_idx.shape[0] / max(self._rows * self._columns * math.prod(self.weight.kernel), 1)

    def table(self, direction: str, tile: Any) -> StepTable:
        """The walk of a direction for a tile (kernels/index.py), built when first asked for."""
        key = (direction, tile.bn, tile.bk)
        if key not in self.tables:
            build = tables.transposed_table if direction == "grad_input" else tables.forward_table
            deepest = self.weight.bh if direction == "grad_input" else self.weight.bw
            one_slot = tables.power_of_two_part(deepest, tile.bk)
            step = tile.bk if direction == "grad_values" else one_slot
            self.tables[key] = build_to_keep(
                lambda: build(self.row_ptr, self.col_idx, self.weight, tile.bn, step), self.col_idx
            )
        return self.tables[key]

    @cached_property
    def fill(self) -> tuple[float, float]:
        """The share of kept blocks among those that a tile multiplies: of ``TALL`` output channels, and of as many
        input channels. It tells masks apart that agree in density."""
        return build_to_keep(lambda: (self._fill(inputs=False), self._fill(inputs=True)), self.col_idx)

    def _fill(self, inputs: bool) -> float:
        kept, taps = self._position(), math.prod(self.weight.kernel)
        row, column = kept // (taps * self._columns), kept % (taps * self._columns)
        tap, channel = column // self._columns, column % self._columns
        together = max(TALL // (self.weight.bw if inputs else self.weight.bh), 1)
        if inputs:
            walked = (channel // together * taps + tap) * self._rows + row
        else:
            walked = row // together * taps * self._columns + column
        tall = min(together, self._columns if inputs else self._rows)
        return kept.shape[0] / max(walked.unique().shape[0] * tall, 1)

    @cached_property
    def position(self) -> Tensor:
        """``[nnzb]`` place of each kept block among all blocks, row-major and tap-major."""
        return build_to_keep(self._position, self.col_idx)

    def _position(self) -> Tensor:
        block = torch.arange(self.col_idx.shape[0], device=self.col_idx.device)
        row = torch.searchsorted(self.row_ptr.long(), block, right=True) - 1
        return row * (math.prod(self.weight.kernel) * self._columns) + self.col_idx.long()

    @cached_property
    def channels(self) -> Channels:
        return build_to_keep(self._channels, self.col_idx)

    def _channels(self) -> Channels:
        rows = torch.zeros(self._rows, dtype=torch.bool, device=self.col_idx.device)
        cols = torch.zeros(self._columns, dtype=torch.bool, device=self.col_idx.device)
        rows[self._position() // (math.prod(self.weight.kernel) * self._columns)] = True
        cols[self.col_idx.long() % self._columns] = True
        outputs = rows.repeat_interleave(self.weight.bh)[: self.weight.rows]
        inputs = cols.repeat_interleave(self.weight.bw)[: self.weight.cols]
        return Channels(outputs.nonzero()[:, 0], inputs.nonzero()[:, 0])

    def dense(self, values: Tensor) -> Tensor:
        """``[K, C / groups, R, S]``, channels_last, without a synchronisation."""
        w, (r, s) = self.weight, self.weight.kernel
        blocks = values.new_zeros(self._rows * r * s * self._columns, w.bh, w.bw)
        blocks.index_copy_(0, self.position, values)
        blocks = blocks.view(self._rows, r, s, self._columns, w.bh, w.bw).permute(0, 4, 1, 2, 3, 5)
        last = blocks.reshape(self._rows * w.bh, r, s, self._columns * w.bw)[: w.rows, :, :, : w.cols]
        return last.contiguous().permute(0, 3, 1, 2)

    def pick(self, dense: Tensor) -> Tensor:
        """``[nnzb, bh, bw]``: the kept blocks of a dense ``[K, C / groups, R, S]``."""
        w, (r, s) = self.weight, self.weight.kernel
        last = dense.permute(0, 2, 3, 1)
        pad = (0, self._columns * w.bw - w.cols, 0, 0, 0, 0, 0, self._rows * w.bh - w.rows)
        blocks = F.pad(last, pad).reshape(self._rows, w.bh, r, s, self._columns, w.bw)
        return blocks.permute(0, 2, 3, 4, 1, 5).reshape(-1, w.bh, w.bw).index_select(0, self.position)

    @cached_property
    def _rows(self) -> int:
        return math.ceil(self.weight.rows / self.weight.bh)

    @cached_property
    def _columns(self) -> int:
        return math.ceil(self.weight.cols / self.weight.bw)


def _to_keep(index: Tensor) -> Tensor:
    return index if index.is_contiguous() else build_to_keep(index.contiguous, index)


class Masks:
    """The masks in use, by address, stride and version of their index tensors: autograd hands out other objects for
    them."""

    def __init__(self) -> None:
        self._found: dict[tuple, Mask] = {}
        self._asked = 0
        self._lock = RLock()

    def of(
        self, row_ptr: Tensor, col_idx: Tensor, rows: int, cols: int, values: Tensor, geometry: Geometry = ONE_PIXEL
    ) -> Mask:
        """The mask of a weight ``[rows, cols, *kernel]`` whose blocks have the size of ``values``."""
        key = (
            *(row_ptr.data_ptr(), 0 if row_ptr.is_inference() else row_ptr._version, row_ptr.stride()),
            *(col_idx.data_ptr(), 0 if col_idx.is_inference() else col_idx._version, col_idx.stride()),
            *(rows, cols, values.shape, geometry, col_idx.device),
        )
        mask = self._found.get(key)
        if mask is None or is_capturing(col_idx):
            mask = self._make(key, row_ptr, col_idx, Weight(rows, cols, *values.shape[1:], *geometry))
        self._asked = mask.asked = self._asked + 1
        return mask

    def _make(self, key: tuple, row_ptr: Tensor, col_idx: Tensor, weight: Weight) -> Mask:
        """The mask of a key, made if need be, and kept for good if a graph is being captured."""
        capturing = is_capturing(col_idx)
        with self._lock:
            mask = self._found.get(key)
            if mask is None:
                self._make_room(capturing)
                mask = self._found[key] = Mask(row_ptr, col_idx, weight)
                mask.asked = self._asked
            mask.captured |= capturing
        return mask

    def _make_room(self, capturing: bool) -> None:
        """Forget the masks used longest ago, but none that a CUDA graph reads. No stream may still read them."""
        surplus = len(self._found) + 1 - MASKS_KEPT
        if surplus <= 0 or capturing:
            return
        free = [key for key, mask in self._found.items() if not mask.captured]
        oldest = sorted(free, key=lambda key: self._found[key].asked)[:surplus]
        for device in {self._found[key].col_idx.device for key in oldest}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        for key in oldest:
            del self._found[key]

    def forget_choices(self) -> None:
        with self._lock:
            for mask in self._found.values():
                mask.choices.clear()
                mask.ready.clear()

    def clear(self) -> None:
        self._found.clear()

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, mask: Mask) -> bool:
        return any(mask is one for one in self._found.values())


masks = Masks()
