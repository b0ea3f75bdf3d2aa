"""Statistics of feature maps, for the distillation losses: all tapped layers in one launch.

A layer is passed by address inside a tuple, so that one launch walks layers of different sizes and nothing is copied to
the device first. Every sum has a fixed order: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program takes 64 pixels of all channels, 64 at a time: rows of 128 bytes in half types whatever the format, 8 KiB in
# flight, and partial means that cost 3 % of what is read.
PIXELS = tl.constexpr(64)
CHANNELS = tl.constexpr(64)
# Of tl.sum and tl.max, which the interpreter knows only where triton itself was imported under it.
ADD, MAX = tl.standard._sum_combine, tl.standard._elementwise_max


class Layers(NamedTuple):
    """Layers of one dtype and format, as the kernels take them; ``first`` counts programs."""

    tensors: tuple[Tensor, ...]
    first: tuple[int, ...]
    channels: tuple[int, ...]
    pixels: tuple[int, ...]
    means: tuple[int, ...]  # first column in means
    energy: tuple[int, ...]  # first column in energy
    partial: tuple[int, ...]  # first column in the partial means
    channels_last: bool

    @property
    def programs(self) -> int:
        return self.tensors[0].shape[0] * sum(_pieces(pixels) for pixels in self.pixels)

    @property
    def partial_columns(self) -> int:
        return sum(c * _pieces(p) for c, p in zip(self.channels, self.pixels, strict=True))

    @property
    def geometry(self) -> tuple[tuple[int, ...], ...]:
        """(programs before, inner size in eights or single elements, outer size, means, energy, partial)."""
        inner, outer = (self.channels, self.pixels) if self.channels_last else (self.pixels, self.channels)
        inner = tuple(size // 8 for size in inner) if self.aligned else inner
        return self.first, inner, outer, self.means, self.energy, self.partial

    @property
    def warps(self) -> int:
        return 4 if self.aligned else 8  # single elements need twice the registers

    @property
    def aligned(self) -> bool:
        """Whether 16 bytes can be read at once."""
        inner = self.channels if self.channels_last else self.pixels
        return all(size % 8 == 0 for size in inner) and all(t.data_ptr() % 16 == 0 for t in self.tensors)


def arrange(features: Sequence[Tensor], channels_last: Sequence[bool]) -> list[tuple[list[int], Layers]]:
    """(places in the list, Layers) of each dtype and format."""
    sizes = [(f.shape[1], f.shape[2] * f.shape[3]) for f in features]
    means, energy = ([0, *accumulate(size[axis] for size in sizes)] for axis in (0, 1))
    groups: dict[tuple, list[int]] = {}
    for place, (f, last) in enumerate(zip(features, channels_last, strict=True)):
        groups.setdefault((f.dtype, last), []).append(place)
    found = []
    for (_, last), places in groups.items():
        channels, pixels = (tuple(sizes[place][axis] for place in places) for axis in (0, 1))
        first = accumulate([0, *(features[0].shape[0] * _pieces(p) for p in pixels[:-1])])
        partial = accumulate([0, *(c * _pieces(p) for c, p in zip(channels[:-1], pixels[:-1], strict=True))])
        columns = (tuple(of[place] for place in places) for of in (means, energy))
        tensors = tuple(features[place] for place in places)
        found.append((places, Layers(tensors, tuple(first), channels, pixels, *columns, tuple(partial), last)))
    return found


def _pieces(pixels: int) -> int:
    return triton.cdiv(pixels, PIXELS.value)


@triton.jit
def ceil_div(a, b):
    return (a + b - 1) // b


@triton.jit
def _pick(values, chosen, COUNT: tl.constexpr):
    """values[chosen] of a tuple of numbers."""
    found = values[0] + 0
    for i in tl.static_range(1, COUNT):
        found = tl.where(chosen == i, values[i], found)
    return found


@triton.jit
def _pick_pointer(tensors, chosen, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    found = tensors[0].to(tl.int64)
    for i in tl.static_range(1, COUNT):
        found = tl.where(chosen == i, tensors[i].to(tl.int64), found)
    pointer = found.to(tensors[0].dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, [16])
    return pointer


@triton.jit
def _find(first, inner, outer, COUNT: tl.constexpr, LAST: tl.constexpr, ALIGNED: tl.constexpr):
    """(layer, image, piece, inner size, channels, pixels) of this program."""
    program = tl.program_id(0)
    layer = 0
    for i in tl.static_range(1, COUNT):
        layer += (program >= first[i]).to(tl.int32)
    inside = _pick(inner, layer, COUNT)
    if ALIGNED:
        inside = inside * 8  # so the compiler knows
    outside = _pick(outer, layer, COUNT)
    if LAST:
        channels, pixels = inside, outside
    else:
        channels, pixels = outside, inside
    pieces = ceil_div(pixels, PIXELS)
    place = program - _pick(first, layer, COUNT)
    return layer, place // pieces, place % pieces, inside, channels, pixels


@triton.jit
def stats_kernel(
    tensors,
    first,
    inner,
    outer,
    means_at,
    energy_at,
    partial_at,
    partial_ptr,  # float32 [batch, partial_columns]
    energy_ptr,  # float32 [batch, energy_columns]
    partial_columns,
    energy_columns,
    COUNT: tl.constexpr,
    LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    layer, image, piece, inside, channels, pixels = _find(first, inner, outer, COUNT, LAST, ALIGNED)
    x_ptr = _pick_pointer(tensors, layer, COUNT, ALIGNED) + image.to(tl.int64) * channels * pixels
    p = piece * PIXELS + tl.arange(0, PIXELS)
    squares = tl.full((PIXELS,), 0.0, tl.float32)
    partial_ptr += image.to(tl.int64) * partial_columns + _pick(partial_at, layer, COUNT) + piece * channels
    for begin in range(0, channels, CHANNELS):
        c = begin + tl.arange(0, CHANNELS)
        if LAST:
            mask = (p < pixels)[:, None] & (c < channels)[None, :]
            x = tl.load(x_ptr + p[:, None] * inside + c[None, :], mask=mask, other=0.0).to(tl.float32)  # [P, C]
            squares += tl.reduce(x * x, 1, ADD)
            sums = tl.reduce(x, 0, ADD)
        else:
            mask = (c < channels)[:, None] & (p < pixels)[None, :]
            x = tl.load(x_ptr + c[:, None] * inside + p[None, :], mask=mask, other=0.0).to(tl.float32)  # [C, P]
            squares += tl.reduce(x * x, 0, ADD)
            sums = tl.reduce(x, 1, ADD)
        tl.store(partial_ptr + c, sums, mask=c < channels)
    energy_ptr += image.to(tl.int64) * energy_columns + _pick(energy_at, layer, COUNT)
    tl.store(energy_ptr + p, squares / channels, mask=p < pixels)


@triton.jit
def means_kernel(
    channels_of,
    pixels_of,
    means_at,
    partial_at,
    partial_ptr,  # float32 [batch, partial_columns]
    means_ptr,  # float32 [batch, means_columns]
    partial_columns,
    means_columns,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The pieces of an image added up, in order, and divided."""
    image, layer = tl.program_id(1).to(tl.int64), tl.program_id(2)
    channels, pixels = _pick(channels_of, layer, COUNT), _pick(pixels_of, layer, COUNT)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    partial_ptr += image * partial_columns + _pick(partial_at, layer, COUNT)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for piece in range(ceil_div(pixels, PIXELS)):
        total += tl.load(partial_ptr + piece * channels + c, mask=mask, other=0.0)
    tl.store(means_ptr + image * means_columns + _pick(means_at, layer, COUNT) + c, total / pixels, mask=mask)


@triton.jit
def stats_grad_kernel(
    tensors,
    grads,  # like tensors
    first,
    inner,
    outer,
    means_at,
    energy_at,
    grad_means_ptr,  # float32 [batch, means_columns]
    grad_energy_ptr,  # float32 [batch, energy_columns]
    means_columns,
    energy_columns,
    COUNT: tl.constexpr,
    LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    layer, image, piece, inside, channels, pixels = _find(first, inner, outer, COUNT, LAST, ALIGNED)
    start = image.to(tl.int64) * channels * pixels
    x_ptr = _pick_pointer(tensors, layer, COUNT, ALIGNED) + start
    out_ptr = _pick_pointer(grads, layer, COUNT, ALIGNED) + start
    p = piece * PIXELS + tl.arange(0, PIXELS)
    grad_energy_ptr += image.to(tl.int64) * energy_columns + _pick(energy_at, layer, COUNT)
    grad_means_ptr += image.to(tl.int64) * means_columns + _pick(means_at, layer, COUNT)
    scale = tl.load(grad_energy_ptr + p, mask=p < pixels, other=0.0) * (2.0 / channels)
    for begin in range(0, channels, CHANNELS):
        c = begin + tl.arange(0, CHANNELS)
        shift = tl.load(grad_means_ptr + c, mask=c < channels, other=0.0) / pixels
        if LAST:
            mask = (p < pixels)[:, None] & (c < channels)[None, :]
            places = p[:, None] * inside + c[None, :]
            x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
            grad = x * scale[:, None] + shift[None, :]
        else:
            mask = (c < channels)[:, None] & (p < pixels)[None, :]
            places = c[:, None] * inside + p[None, :]
            x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
            grad = x * scale[None, :] + shift[:, None]
        tl.store(out_ptr + places, grad.to(out_ptr.dtype.element_ty), mask=mask)


def feature_stats(layers: Layers, means: Tensor, energy: Tensor) -> None:
    """Fill the columns of these layers in ``means`` and ``energy``."""
    batch, count = means.shape[0], len(layers.tensors)
    partial = torch.empty((batch, layers.partial_columns), dtype=torch.float32, device=means.device)
    stats_kernel[(layers.programs,)](
        layers.tensors, *layers.geometry, partial, energy, partial.shape[1], energy.shape[1],
        COUNT=count, LAST=layers.channels_last, ALIGNED=layers.aligned, num_warps=layers.warps,
    )  # fmt: skip
    block = 128
    means_kernel[(triton.cdiv(max(layers.channels), block), batch, count)](
        layers.channels, layers.pixels, layers.means, layers.partial, partial, means, partial.shape[1], means.shape[1],
        COUNT=count, BLOCK=block, num_warps=4,
    )  # fmt: skip


def feature_stats_grad(layers: Layers, grads: Sequence[Tensor], grad_means: Tensor, grad_energy: Tensor) -> None:
    """Fill ``grads``, one for each of these layers and in its format."""
    stats_grad_kernel[(layers.programs,)](
        layers.tensors, tuple(grads), *layers.geometry[:-1], grad_means, grad_energy,
        grad_means.shape[1], grad_energy.shape[1],
        COUNT=len(layers.tensors), LAST=layers.channels_last, ALIGNED=layers.aligned, num_warps=layers.warps,
    )  # fmt: skip
