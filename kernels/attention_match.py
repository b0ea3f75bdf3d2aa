"""Matching the attention maps of teacher and student: every pair at the teacher's size, distances and gradients.

Every sum has a fixed order: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import ADD, ceil_div

LARGEST_MAP = 16384  # pixels that the registers of one program hold


@triton.jit
def _window_mean(map_ptr, y, x, inside, in_h, in_w, out_h, out_w, reach_h, reach_w):
    """Adaptive average pooling: output pixel y covers rows floor(y * in / out) to ceil((y + 1) * in / out)."""
    top, left = y * in_h // out_h, x * in_w // out_w
    rows, columns = ceil_div((y + 1) * in_h, out_h) - top, ceil_div((x + 1) * in_w, out_w) - left
    total = tl.full(y.shape, 0.0, tl.float32)
    for i in range(reach_h):
        for j in range(reach_w):
            mask = inside & (i < rows) & (j < columns)
            total += tl.load(map_ptr + (top + i) * in_w + left + j, mask=mask, other=0.0)
    return total / (rows * columns)


@triton.jit
def _unit(values, EPS: tl.constexpr):
    """(values / max(norm, eps), the divisor)."""
    divisor = tl.maximum(tl.sqrt(tl.reduce(values * values, 0, ADD)), EPS)
    return values / divisor, divisor


@triton.jit
def pairs_kernel(
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
            tl.store(distance_ptr + pair, tl.reduce(difference * difference, 0, ADD) / area * per_image)
            grad += difference * (2.0 * weight / area * per_image)
    along = tl.where(divisor > EPS, tl.reduce(unit * grad, 0, ADD), 0.0)
    grad = (grad - unit * along) / divisor
    tl.store(grad_ptr + (image * students + s) * pooled_columns + column + p, grad, mask=inside)


@triton.jit
def unpool_kernel(
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
        rows, columns = ceil_div((y + 1) * out_h, height) - top, ceil_div((x + 1) * out_w, width) - left
        for i in range((out_h + height - 2) // height + 1):
            for j in range((out_w + width - 2) // width + 1):
                mask = inside & (i < rows) & (j < columns)
                row, col = top + i, left + j
                covered = ceil_div((row + 1) * height, out_h) - row * height // out_h
                covered *= ceil_div((col + 1) * width, out_w) - col * width // out_w
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


def map_tables(teacher_sizes: tuple[int, ...], student_sizes: tuple[int, ...], device: torch.device) -> MapTables:
    """Built on the host and copied; for keeping."""
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
    pairs_kernel[(batch, students, sizes)](
        attention, teacher, student, distance, pooled, tables.teacher, tables.student, tables.sizes,
        teachers, students, teacher.shape[1], student.shape[1], pooled.shape[2], 1 / batch,
        BLOCK=block, EPS=1e-12, num_warps=min(max(block // 256, 1), 16),
    )  # fmt: skip
    block = min(triton.next_power_of_2(tables.largest_student), 1024)
    unpool_kernel[(batch, students, triton.cdiv(tables.largest_student, block))](
        pooled, grad_student, tables.student, tables.sizes, students, sizes, pooled.shape[2], student.shape[1],
        BLOCK=block, num_warps=4,
    )  # fmt: skip
