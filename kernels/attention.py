"""Kernels of the distillation losses: statistics of all tapped layers in one launch, matching, logits.

A layer is passed by address inside a tuple, so that one launch walks layers of different sizes and nothing is copied to
the device first. Every sum has a fixed order: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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
LARGEST_MAP = 16384  # pixels that the registers of one program hold
LARGEST_ROW = 65536  # classes, likewise
# Of tl.sum and tl.max, which the interpreter knows only where triton itself was imported under it.
_ADD, _MAX = tl.standard._sum_combine, tl.standard._elementwise_max


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
def _cdiv(a, b):
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
    pieces = _cdiv(pixels, PIXELS)
    place = program - _pick(first, layer, COUNT)
    return layer, place // pieces, place % pieces, inside, channels, pixels


@triton.jit
def _stats_kernel(
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
            squares += tl.reduce(x * x, 1, _ADD)
            sums = tl.reduce(x, 0, _ADD)
        else:
            mask = (c < channels)[:, None] & (p < pixels)[None, :]
            x = tl.load(x_ptr + c[:, None] * inside + p[None, :], mask=mask, other=0.0).to(tl.float32)  # [C, P]
            squares += tl.reduce(x * x, 0, _ADD)
            sums = tl.reduce(x, 1, _ADD)
        tl.store(partial_ptr + c, sums, mask=c < channels)
    energy_ptr += image.to(tl.int64) * energy_columns + _pick(energy_at, layer, COUNT)
    tl.store(energy_ptr + p, squares / channels, mask=p < pixels)


@triton.jit
def _means_kernel(
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
    for piece in range(_cdiv(pixels, PIXELS)):
        total += tl.load(partial_ptr + piece * channels + c, mask=mask, other=0.0)
    tl.store(means_ptr + image * means_columns + _pick(means_at, layer, COUNT) + c, total / pixels, mask=mask)


@triton.jit
def _stats_grad_kernel(
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
    _stats_kernel[(layers.programs,)](
        layers.tensors, *layers.geometry, partial, energy, partial.shape[1], energy.shape[1],
        COUNT=count, LAST=layers.channels_last, ALIGNED=layers.aligned, num_warps=layers.warps,
    )  # fmt: skip
    block = 128
    _means_kernel[(triton.cdiv(max(layers.channels), block), batch, count)](
        layers.channels, layers.pixels, layers.means, layers.partial, partial, means, partial.shape[1], means.shape[1],
        COUNT=count, BLOCK=block, num_warps=4,
    )  # fmt: skip


def feature_stats_grad(layers: Layers, grads: Sequence[Tensor], grad_means: Tensor, grad_energy: Tensor) -> None:
    """Fill ``grads``, one for each of these layers and in its format."""
    _stats_grad_kernel[(layers.programs,)](
        layers.tensors, tuple(grads), *layers.geometry[:-1], grad_means, grad_energy,
        grad_means.shape[1], grad_energy.shape[1],
        COUNT=len(layers.tensors), LAST=layers.channels_last, ALIGNED=layers.aligned, num_warps=layers.warps,
    )  # fmt: skip


@triton.jit
def _window_mean(map_ptr, y, x, inside, in_h, in_w, out_h, out_w, reach_h, reach_w):
    """Adaptive average pooling: output pixel y covers rows floor(y * in / out) to ceil((y + 1) * in / out)."""
    top, left = y * in_h // out_h, x * in_w // out_w
    rows, columns = _cdiv((y + 1) * in_h, out_h) - top, _cdiv((x + 1) * in_w, out_w) - left
    total = tl.full(y.shape, 0.0, tl.float32)
    for i in range(reach_h):
        for j in range(reach_w):
            mask = inside & (i < rows) & (j < columns)
            total += tl.load(map_ptr + (top + i) * in_w + left + j, mask=mask, other=0.0)
    return total / (rows * columns)


@triton.jit
def _unit(values, EPS: tl.constexpr):
    """(values / max(norm, eps), the divisor)."""
    divisor = tl.maximum(tl.sqrt(tl.reduce(values * values, 0, _ADD)), EPS)
    return values / divisor, divisor


@triton.jit
def _pairs_kernel(
    attention_ptr,  # [batch, teachers, students] or None
    teacher_ptr,  # [batch, teacher_columns]
    student_ptr,  # [batch, student_columns]
    distance_ptr,  # [batch, teachers, students]
    grad_ptr,  # [batch, students, pooled_columns] gradients of the pooled maps of each distinct size
    teacher_of,  # [teachers, 4] height, width, first column, number of its size
    student_of,  # [students, 4]
    size_of,  # [sizes, 4] height, width, first column, 0
    teachers,
    students,
    teacher_columns,
    student_columns,
    pooled_columns,
    per_image,  # 1 / batch
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    """One student map at one distinct teacher size, against all teacher maps of that size."""
    image, s, size = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    height, width, column = (
        tl.load(size_of + size * 4),
        tl.load(size_of + size * 4 + 1),
        tl.load(size_of + size * 4 + 2),
    )
    area = height * width
    p = tl.arange(0, BLOCK)
    inside = p < area
    in_h, in_w = tl.load(student_of + s * 4), tl.load(student_of + s * 4 + 1)
    map_ptr = student_ptr + image * student_columns + tl.load(student_of + s * 4 + 2)
    reach_h, reach_w = (in_h + height - 2) // height + 1, (in_w + width - 2) // width + 1
    pooled = _window_mean(map_ptr, p // width, p % width, inside, in_h, in_w, height, width, reach_h, reach_w)
    unit, divisor = _unit(tl.where(inside, pooled, 0.0), EPS)
    grad = tl.full((BLOCK,), 0.0, tl.float32)
    for t in range(teachers):
        pair = (image * teachers + t) * students + s
        if tl.load(teacher_of + t * 4 + 3) == size:
            values = tl.load(
                teacher_ptr + image * teacher_columns + tl.load(teacher_of + t * 4 + 2) + p, mask=inside, other=0.0
            )
            teacher, _ = _unit(values, EPS)
            difference = unit - teacher
            weight = (s == t).to(tl.float32) if attention_ptr is None else tl.load(attention_ptr + pair)
            tl.store(distance_ptr + pair, tl.reduce(difference * difference, 0, _ADD) / area * per_image)
            grad += difference * (2.0 * weight / area * per_image)
    along = tl.where(divisor > EPS, tl.reduce(unit * grad, 0, _ADD), 0.0)
    grad = (grad - unit * along) / divisor
    tl.store(grad_ptr + (image * students + s) * pooled_columns + column + p, grad, mask=inside)


@triton.jit
def _unpool_kernel(
    grad_ptr,  # [batch, students, pooled_columns]
    out_ptr,  # [batch, student_columns]
    student_of,
    size_of,
    students,
    sizes,
    pooled_columns,
    student_columns,
    BLOCK: tl.constexpr,
):
    """The gradient of a student map: the transpose of its poolings, summed over the distinct sizes.

    Input row y lies in the windows of rows floor(y * out / in) to ceil((y + 1) * out / in): the same formula, turned.
    """
    image, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    height, width = tl.load(student_of + s * 4), tl.load(student_of + s * 4 + 1)
    p = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = p < height * width
    y, x = p // width, p % width
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for size in range(sizes):
        out_h, out_w = tl.load(size_of + size * 4), tl.load(size_of + size * 4 + 1)
        pooled_ptr = grad_ptr + (image * students + s) * pooled_columns + tl.load(size_of + size * 4 + 2)
        top, left = y * out_h // height, x * out_w // width
        rows, columns = _cdiv((y + 1) * out_h, height) - top, _cdiv((x + 1) * out_w, width) - left
        for i in range((out_h + height - 2) // height + 1):
            for j in range((out_w + width - 2) // width + 1):
                mask = inside & (i < rows) & (j < columns)
                row, col = top + i, left + j
                covered = _cdiv((row + 1) * height, out_h) - row * height // out_h
                covered *= _cdiv((col + 1) * width, out_w) - col * width // out_w
                grad = tl.load(pooled_ptr + row * out_w + col, mask=mask, other=0.0)
                total += tl.where(mask, grad / tl.maximum(covered, 1), 0.0)
    tl.store(out_ptr + image * student_columns + tl.load(student_of + s * 4 + 2) + p, total, mask=inside)


class MapTables(NamedTuple):
    """What the matching knows of the maps' sizes, as int32 tables of four columns: [T, 4], [S, 4], [sizes, 4]."""

    teacher: Tensor
    student: Tensor
    sizes: Tensor
    largest: int  # pixels of the largest teacher map
    largest_student: int
    pooled_columns: int


@lru_cache(maxsize=64)
def map_tables(teacher_sizes: tuple[int, ...], student_sizes: tuple[int, ...], device: torch.device) -> MapTables:
    """Built on the host and copied once for each network."""
    teacher, student = (list(zip(s[::2], s[1::2], strict=True)) for s in (teacher_sizes, student_sizes))
    distinct = list(dict.fromkeys(teacher))
    rows = [
        [[h, w, column, number(h, w)] for (h, w), column in zip(sizes, _columns(sizes), strict=False)]
        for sizes, number in (
            (teacher, lambda h, w: distinct.index((h, w))),
            (student, lambda h, w: 0),
            (distinct, lambda h, w: 0),
        )
    ]
    tables = [torch.tensor(table, dtype=torch.int32).to(device) for table in rows]
    largest, largest_student = (max(h * w for h, w in sizes) for sizes in (teacher, student))
    return MapTables(*tables, largest, largest_student, _columns(distinct)[-1])


def _columns(sizes: Sequence[tuple[int, int]]) -> list[int]:
    return [0, *accumulate(height * width for height, width in sizes)]


def match_maps(
    attention: Tensor | None,
    teacher: Tensor,
    student: Tensor,
    tables: MapTables,
    distance: Tensor,
    grad_student: Tensor,
) -> None:
    """Fill ``distance [B, T, S]``, divided by B, where a pair has one size to meet at, and ``grad_student``."""
    batch, teachers, students = distance.shape
    sizes = tables.sizes.shape[0]
    pooled = torch.empty((batch, students, tables.pooled_columns), dtype=torch.float32, device=student.device)
    block = triton.next_power_of_2(tables.largest)
    _pairs_kernel[(batch, students, sizes)](
        attention, teacher, student, distance, pooled, tables.teacher, tables.student, tables.sizes,
        teachers, students, teacher.shape[1], student.shape[1], pooled.shape[2], 1 / batch,
        BLOCK=block, EPS=1e-12, num_warps=min(max(block // 256, 1), 16),
    )  # fmt: skip
    block = min(triton.next_power_of_2(tables.largest_student), 1024)
    _unpool_kernel[(batch, students, triton.cdiv(tables.largest_student, block))](
        pooled, grad_student, tables.student, tables.sizes, students, sizes, pooled.shape[2], student.shape[1],
        BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def _kd_kernel(
    student_ptr,  # [batch, classes]
    teacher_ptr,
    loss_ptr,  # [batch]
    grad_ptr,  # [batch, classes]
    classes,
    temperature,
    per_image,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * classes
    c = tl.arange(0, BLOCK)
    mask = c < classes
    x = tl.load(student_ptr + row + c, mask=mask, other=-float("inf"))
    y = tl.load(teacher_ptr + row + c, mask=mask, other=-float("inf"))
    x = tl.where(mask, (x - tl.reduce(x, 0, _MAX)) / temperature, 0.0)
    y = tl.where(mask, (y - tl.reduce(y, 0, _MAX)) / temperature, 0.0)
    q, p = tl.where(mask, tl.exp(x), 0.0), tl.where(mask, tl.exp(y), 0.0)
    sum_q, sum_p = tl.reduce(q, 0, _ADD), tl.reduce(p, 0, _ADD)
    divergence = tl.reduce(p * (y - x), 0, _ADD) / sum_p + tl.log(sum_q) - tl.log(sum_p)
    tl.store(loss_ptr + tl.program_id(0), divergence * temperature * temperature * per_image)
    tl.store(grad_ptr + row + c, (q / sum_q - p / sum_p) * (temperature * per_image), mask=mask)


def kd(student: Tensor, teacher: Tensor, temperature: float, losses: Tensor, grad: Tensor) -> None:
    """Fill ``losses [B]``, whose sum is the loss, and ``grad``."""
    batch, classes = student.shape
    block = triton.next_power_of_2(classes)
    _kd_kernel[(batch,)](
        student, teacher, losses, grad, classes, temperature, 1 / batch,
        BLOCK=block, num_warps=min(max(block // 256, 1), 16),
    )  # fmt: skip
