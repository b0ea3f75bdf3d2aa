"""The distillation ops on CUDA: ``sparsekd.kernels.attention`` (Triton). Operands were checked in ``sparsekd/ops``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...ops.attention import (
    feature_stats_grad_reference,
    feature_stats_reference,
    kd_reference,
    match_maps_reference,
)
from ...ops.conv2d import memory_format
from .device import build_to_keep, on

OPS = ("feature_stats", "feature_stats_grad", "match_maps", "kd")
_MAP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def describe(op: str) -> str:
    """What runs one of ``OPS`` on CUDA devices, and why."""
    if find_spec("triton") is None:
        return "pure-torch reference: triton is not importable; pip install sparsekd[gpu]"
    dtypes = "float16, bfloat16 and float32" if op.startswith("feature_stats") else "float32"
    return f"sparsekd.kernels (Triton) for {dtypes}; pure-torch reference otherwise"


def register() -> None:
    if find_spec("triton") is None:
        return
    for op in (feature_stats, feature_stats_grad, match_maps, kd):
        torch.library.impl(f"sparsekd::{op.__name__}", "cuda", op)


def feature_stats(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if not _fits(features):
        return feature_stats_reference(features)
    from sparsekd.kernels import attention as kernel

    features, last = _dense(features)
    columns = (sum(f.shape[1] for f in features), sum(f.shape[2] * f.shape[3] for f in features))
    means, energy = (features[0].new_empty(features[0].shape[0], n, dtype=torch.float32) for n in columns)
    with on(features[0].device):
        for _, layers in kernel.arrange(features, last):
            kernel.feature_stats(layers, means, energy)
    return means, energy


def feature_stats_grad(features: Sequence[Tensor], grad_means: Tensor, grad_energy: Tensor) -> list[Tensor]:
    if not _fits(features):
        return feature_stats_grad_reference(features, grad_means, grad_energy)
    from sparsekd.kernels import attention as kernel

    features, last = _dense(features)
    grads = [torch.empty_like(f) for f in features]
    grad_means, grad_energy = grad_means.contiguous(), grad_energy.contiguous()
    with on(features[0].device):
        for places, layers in kernel.arrange(features, last):
            kernel.feature_stats_grad(layers, [grads[place] for place in places], grad_means, grad_energy)
    return grads


def match_maps(
    attention: Tensor | None,
    teacher: Tensor,
    student: Tensor,
    teacher_sizes: Sequence[int],
    student_sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    from sparsekd.kernels import attention_match as kernel

    largest = max(h * w for h, w in zip(teacher_sizes[::2], teacher_sizes[1::2], strict=True))
    if student.dtype != torch.float32 or not student.numel() or not 0 < largest <= kernel.LARGEST_MAP:
        return match_maps_reference(attention, teacher, student, teacher_sizes, student_sizes)
    teacher, student = teacher.contiguous(), student.contiguous()
    weights = None if attention is None else attention.contiguous()
    with on(student.device):
        tables = _map_tables(tuple(teacher_sizes), tuple(student_sizes), student.device)
        distance = student.new_empty(student.shape[0], len(teacher_sizes) // 2, len(student_sizes) // 2)
        grad_student = torch.empty_like(student)
        kernel.match_maps(weights, teacher, student, tables, distance, grad_student)
    if weights is None:
        return distance.diagonal(dim1=1, dim2=2).sum(), student.new_empty(0), grad_student
    return (weights * distance).sum(), distance, grad_student


def kd(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    from sparsekd.kernels import attention_kd as kernel

    if student.dtype != torch.float32 or not student.numel() or student.shape[1] > kernel.LARGEST_ROW:
        return kd_reference(student, teacher, temperature)
    student, teacher = student.contiguous(), teacher.contiguous()
    losses, grad = student.new_empty(student.shape[0]), torch.empty_like(student)
    with on(student.device):
        kernel.kd(student, teacher, temperature, losses, grad)
    return losses.sum(), grad


@lru_cache(maxsize=64)
def _map_tables(teacher_sizes: tuple[int, ...], student_sizes: tuple[int, ...], device: torch.device) -> Any:
    from sparsekd.kernels import attention_match as kernel

    like = torch.empty((0,), device=device)
    return build_to_keep(lambda: kernel.map_tables(teacher_sizes, student_sizes, device), like)


def _fits(features: Sequence[Tensor]) -> bool:
    return all(f.dtype in _MAP_DTYPES and f.numel() for f in features)


def _dense(features: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
    """The layers without gaps, and which of them are channels_last."""
    formats = [memory_format(f) for f in features]
    dense = [f.contiguous(memory_format=layout) for f, layout in zip(features, formats, strict=True)]
    return dense, [layout == torch.channels_last for layout in formats]
