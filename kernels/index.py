"""Which kept blocks a tile of the output walks, as flat int32 tables: built on the device, once per mask.

A *tile* is ``rows`` neighbouring output channels. It is cut into *lanes* of ``lane`` channels, and the reduction into
*slots*: ``slot`` neighbouring channels of one tap. A tile's slots are the union of what its lanes keep, in tap-major
order, so the gathered activations are loaded once for all lanes; a lane that does not keep the slot multiplies zeros.
``slots_per_step`` slots make a *step*, one trip of the K loop (forward, gradient of the input) or one program (gradient
of the values); the last step of a tile is filled with slots that lie outside every image.

A gradient of the input is the same walk over the transposed weight. A stride of s splits its pixels into s*s *phases*
that see different taps; each phase has its own tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

OUTSIDE = -(1 << 20)  # a row of pixels no image has: what a filling slot gathers is masked to zero
MISSING = -16  # negative, and as aligned as any offset: a masked copy of 16 bytes still wants an aligned address
TILE_FIELDS = 8  # row_begin, row_end, step_begin, step_end, phase_y, phase_x, 0, 0
SLOT_FIELDS = 4  # dy, dx, first channel, channels inside the weight


class Weight(NamedTuple):
    """A block-sparse weight ``[rows, cols_per_group, *kernel]``; a linear layer is a 1x1 kernel. From ``kernel`` on,
    the fields are those of ``ops.conv2d.Geometry`` in its order."""

    rows: int
    cols: int  # per group
    bh: int
    bw: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class StepTable:
    """The walk of every tile, longest first.

    tiles      [num_tiles, 8]: row_begin, row_end (of the tile's conv group), step_begin, step_end, phase_y, phase_x
    slots      [(num_steps + 1) * slots_per_step, 4]: dy, dx, first channel, channels inside the weight (the rest is 0)
    offsets    [(num_steps + 1) * slots_per_step, lanes]: of a lane's first weight in ``values``, negative: not kept
    step_tile  [num_steps]: the tile of a step, as an index into ``tiles``
    """

    tiles: Tensor
    slots: Tensor
    offsets: Tensor
    step_tile: Tensor
    lane: int
    slot: int
    lanes: int
    slots_per_step: int
    whole: bool  # no slot lies, or reaches, beyond the last channel
    fill: float  # kept lanes / all lanes of the union: the share of the tile's multiplications that are not by zero

    @property
    def num_tiles(self) -> int:
        return self.tiles.shape[0]

    @property
    def num_steps(self) -> int:
        return self.step_tile.shape[0]


class _Pieces(NamedTuple):
    """All kept lane x slot pieces of a weight, flat."""

    tile: Tensor
    lane: Tensor
    column: Tensor  # order of the slot inside its tile
    slot: Tensor  # [pieces, 4]
    offset: Tensor


def power_of_two_part(size: int, most: int) -> int:
    """The largest power of two that divides ``size``, at most ``most``."""
    return min(size & -size, most)


def forward_table(row_ptr: Tensor, col_idx: Tensor, weight: Weight, rows: int, step: int) -> StepTable:
    """The walk whose tiles are ``rows`` output channels and whose steps are up to ``step`` gathered input channels.

    One host synchronisation, to learn the number of steps.
    """
    lane, slot = power_of_two_part(weight.bh, rows), power_of_two_part(weight.bw, step)
    lanes = rows // lane
    block, i, j, tap, row, local = _kept(row_ptr, col_idx, weight, lane, slot)
    per_group = weight.rows // weight.groups
    in_group = row // per_group if weight.groups > 1 else torch.zeros_like(row)
    quanta = weight.bh * math.ceil(weight.rows / weight.bh) // weight.groups // lane
    tiles = math.ceil(quanta / lanes)
    position = (row - in_group * per_group) // lane
    taps_y, taps_x = _taps(tap, weight)
    record = (
        taps_y - weight.padding[0],
        taps_x - weight.padding[1],
        in_group * weight.cols + local,
        (weight.cols - local).clamp(0, slot),
    )
    pieces = _Pieces(
        in_group * tiles + position // lanes,
        position % lanes,
        tap * math.ceil(weight.cols / weight.bw) * weight.bw + local,
        torch.stack(record, -1),
        (block * weight.bh + i * lane) * weight.bw + j * slot,
    )
    where = [(g, t, 0, 0) for g in range(weight.groups) for t in range(tiles)]
    shape = (per_group, weight.cols % weight.bw == 0, lane, slot, lanes, max(step // slot, 1))
    return _assemble(pieces, where, *shape)


def transposed_table(row_ptr: Tensor, col_idx: Tensor, weight: Weight, rows: int, step: int) -> StepTable:
    """As ``forward_table`` for the gradient of the input: tiles of input channels, slots of output channels."""
    lane, slot = power_of_two_part(weight.bw, rows), power_of_two_part(weight.bh, step)
    lanes = rows // lane
    block, i, j, tap, row, local = _kept(row_ptr, col_idx, weight, slot, lane)
    per_group = weight.rows // weight.groups
    in_group = row // per_group if weight.groups > 1 else torch.zeros_like(row)
    tiles = math.ceil(math.ceil(weight.cols / weight.bw) * weight.bw / lane / lanes)
    (taps_y, taps_x), (step_y, step_x) = _taps(tap, weight), weight.stride
    behind_y, behind_x = taps_y - weight.padding[0], taps_x - weight.padding[1]
    phase_y, phase_x = behind_y % step_y, behind_x % step_x
    position = local // lane
    record = (
        (phase_y - behind_y) // step_y,
        (phase_x - behind_x) // step_x,
        row,
        (weight.rows - row).clamp(0, slot),
    )
    pieces = _Pieces(
        ((phase_y * step_x + phase_x) * weight.groups + in_group) * tiles + position // lanes,
        position % lanes,
        tap * math.ceil(weight.rows / weight.bh) * weight.bh + row,
        torch.stack(record, -1),
        (block * weight.bh + i * slot) * weight.bw + j * lane,
    )
    phases = [(y, x) for y in range(step_y) for x in range(step_x)]
    where = [(g, t, y, x) for y, x in phases for g in range(weight.groups) for t in range(tiles)]
    shape = (weight.cols, weight.rows % weight.bh == 0, lane, slot, lanes, max(step // slot, 1))
    return _assemble(pieces, where, *shape)


def _kept(row_ptr: Tensor, col_idx: Tensor, weight: Weight, height: int, width: int) -> tuple[Tensor, ...]:
    """Kept blocks cut into ``height x width`` pieces: (block, piece row, piece column, tap, output row, channel)."""
    device, columns = col_idx.device, math.ceil(weight.cols / weight.bw)
    block = torch.arange(col_idx.shape[0], device=device)
    row_block = torch.searchsorted(row_ptr.long(), block, right=True) - 1
    i = torch.arange(weight.bh // height, device=device)
    j = torch.arange(weight.bw // width, device=device)
    parts: Any = torch.broadcast_tensors(block[:, None, None], i[:, None], j)
    block, i, j = (part.reshape(-1) for part in parts)
    column = col_idx.long()[block]
    tap, local = column // columns, column % columns * weight.bw + j * width
    return block, i, j, tap, row_block[block] * weight.bh + i * height, local


def _taps(tap: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    """Displacement of a tap in pixels, (y, x)."""
    return tap // weight.kernel[1] * weight.dilation[0], tap % weight.kernel[1] * weight.dilation[1]


def _assemble(
    pieces: _Pieces,
    where: list[tuple[int, int, int, int]],
    per_group: int,
    whole: bool,
    lane: int,
    slot: int,
    lanes: int,
    slots_per_step: int,
) -> StepTable:
    """Union the pieces of each tile into slots, fill up to whole steps, order tiles longest first."""
    device, num_tiles = pieces.tile.device, len(where)
    span = 2**40
    key, slot_of = torch.unique(pieces.tile * span + pieces.column, return_inverse=True)
    tile_of_slot = key // span
    count = torch.zeros(num_tiles, dtype=torch.int64, device=device).index_add_(
        0, tile_of_slot, torch.ones_like(tile_of_slot)
    )
    steps = (count + slots_per_step - 1) // slots_per_step
    step_begin, slot_begin = steps.cumsum(0) - steps, count.cumsum(0) - count
    position = torch.arange(key.shape[0], device=device) - slot_begin[tile_of_slot]
    position += step_begin[tile_of_slot] * slots_per_step

    num_steps = int(steps.sum())
    places = (num_steps + 1) * slots_per_step  # one step more: the kernels read a step ahead
    filling = torch.tensor([OUTSIDE, 0, 0, 0], dtype=torch.int32, device=device)
    slots = filling.repeat(places, 1)
    slots[position[slot_of]] = pieces.slot.int()
    offsets = torch.full((places, lanes), MISSING, dtype=torch.int32, device=device)
    offsets[position[slot_of], pieces.lane] = pieces.offset.int()

    group, index, phase_y, phase_x = torch.tensor(where, dtype=torch.int64, device=device).T
    begin = group * per_group + index * lanes * lane
    none = torch.zeros_like(begin)
    fields = (begin, (group + 1) * per_group, step_begin, step_begin + steps, phase_y, phase_x, none, none)
    longest_first = steps.argsort(descending=True, stable=True)
    tiles = torch.stack(fields, -1)[longest_first].int().contiguous()
    ranks = torch.empty_like(longest_first)
    ranks[longest_first] = torch.arange(num_tiles, device=device)
    step_tile = torch.searchsorted(step_begin + steps, torch.arange(num_steps, device=device), right=True)
    fill = pieces.tile.shape[0] / max(key.shape[0] * lanes, 1)
    tile_of_step = ranks[step_tile].int().contiguous()
    return StepTable(tiles, slots, offsets, tile_of_step, lane, slot, lanes, slots_per_step, whole, fill)
