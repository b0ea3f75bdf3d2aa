"""Attention maps of convolutional features: their statistics, their matching; and the distance of logits.

B images, C channels, H x W pixels, T teacher layers, S student layers.

Feature maps are the bulk of what a distillation loss touches, so each op reads its operands once: `layer_stats` all
tapped layers of a network in one call, `match_maps` the energy maps that come out of it, `kd` logits. The latter two
compute their gradients along with the loss; the backward pass only scales them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._schema import define, sum_dtype
from .conv2d import memory_format

_EPS = 1e-12  # of the L2 norm, as in the published code of both AFD and AT

Sizes = Sequence[tuple[int, int]]


def feature_stats(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over pixels and energy map of a feature tensor: everything SAD and AT need to know about it.

    features: [B, C, H, W], floating point, contiguous or channels_last (others are copied).
    Returns means [B, C] and energy [B, H*W]; both in float32 for half types, otherwise in the dtype of `features`.
    The energy is the attention map of Zagoruyko & Komodakis (arXiv 1612.03928), as a mean over channels.

    Equivalent to:

        means = features.mean((2, 3))
        energy = features.square().mean(1).flatten(1)

    Raises ValueError for a tensor that is not 4-D and TypeError for one that is not floating point.
    """
    return layer_stats([features])


def layer_stats(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`feature_stats` of several layers in one call, side by side: means [B, sum of C], energy [B, sum of H*W].

    `match_maps` reads the energy as it is. float64 if any layer is.
    """
    features = list(features)
    _check_features(features)
    means, energy = torch.ops.sparsekd.feature_stats(features)
    return means, energy


def feature_stats_reference(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    dtype = sum_dtype(*features)
    means = [f.to(dtype).mean((2, 3)) for f in features]
    energy = [f.to(dtype).square().mean(1).flatten(1) for f in features]
    return torch.cat(means, 1), torch.cat(energy, 1)


def feature_stats_grad_reference(features: Sequence[Tensor], grad_means: Tensor, grad_energy: Tensor) -> list[Tensor]:
    """d features = d means / (H*W) + 2 * features * d energy / C, in the dtype and format of each layer."""
    grads = []
    for f, per_channel, per_pixel in _with_grads(features, grad_means, grad_energy):
        scaled = torch.addcmul(
            per_channel / max(f.shape[2] * f.shape[3], 1),
            f.to(per_pixel.dtype),
            per_pixel,
            value=2 / max(f.shape[1], 1),
        )
        grads.append(scaled.to(f.dtype).contiguous(memory_format=memory_format(f)))
    return grads


def match_maps(
    attention: Tensor | None, teacher: Tensor, student: Tensor, teacher_sizes: Sizes, student_sizes: Sizes
) -> Tensor:
    """Attention-weighted squared distance between every teacher map and every student map.

    attention: [B, T, S], the weight of each pair; None pairs teacher t with student t alone, with weight 1.
    teacher, student: energy maps side by side, as `layer_stats` returns them, of these (H, W) each. A student map is
    average-pooled to the size of the teacher map it meets, then both are L2-normalised; a map of zeros stays zero.
    Returns the scalar of AFD's loss (arXiv 2102.02973), in the dtype of `student`:

        sum_t mean_b sum_s attention[b, t, s] * mean_hw (student[b, s -> t] - teacher[b, t])^2

    The teacher maps get no gradient.

    Raises ValueError for maps that are not of these sizes, or of no pixels, and TypeError for two dtypes.
    """
    flat = [[side for size in sizes for side in size] for sizes in (teacher_sizes, student_sizes)]
    _check_maps(attention, teacher, student, *flat)
    loss, _, _ = torch.ops.sparsekd.match_maps(attention, teacher.detach(), student, *flat)
    return loss


def match_maps_reference(
    attention: Tensor | None,
    teacher: Tensor,
    student: Tensor,
    teacher_sizes: Sequence[int],
    student_sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient to attention, its gradient to student), all of them differentiable."""
    teachers, students = _split_maps(teacher, teacher_sizes), _split_maps(student, student_sizes)
    batch, images = student.shape[0], max(student.shape[0], 1)
    weights = torch.eye(len(teachers)).to(student).expand(batch, -1, -1) if attention is None else attention
    loss = student.new_full((), 0.0 if batch else math.nan)  # the mean of no images, as in `kd`
    grads = [torch.zeros_like(maps) for maps in students]
    distances = [student.new_empty(0)] * len(teachers)
    for size in dict.fromkeys((maps.shape[1], maps.shape[2]) for maps in teachers):
        # Once for each distinct size. Differences are formed: |a|^2 + |b|^2 - 2ab is not 0 for equal maps.
        pooled = torch.stack([F.adaptive_avg_pool2d(maps, size).flatten(1) for maps in students], 1)  # [B, S, HW]
        norm = torch.linalg.vector_norm(pooled, dim=2, keepdim=True)
        divisor = norm.clamp_min(_EPS)
        unit, grad = pooled / divisor, torch.zeros_like(pooled)
        for t in (t for t, maps in enumerate(teachers) if maps.shape[1:] == size):
            difference = unit - F.normalize(teachers[t].flatten(1), eps=_EPS)[:, None]
            distances[t] = difference.square().mean(2) / images
            loss = loss + (weights[:, t] * distances[t]).sum()
            grad = grad + difference * weights[:, t, :, None] * (2 / (images * unit.shape[2]))
        along = (unit * grad).sum(2, keepdim=True) * (norm > _EPS)
        grad = ((grad - unit * along) / divisor).unflatten(2, size)
        grads = [total + _unpool(grad[:, s], maps) for s, (total, maps) in enumerate(zip(grads, students, strict=True))]
    grad_attention = student.new_empty(0) if attention is None else torch.stack(distances, 1)
    return loss, grad_attention, torch.cat([grad.flatten(1) for grad in grads], 1)


def _unpool(grad: Tensor, maps: Tensor) -> Tensor:
    """The gradient of adaptive_avg_pool2d to its input ``maps``."""
    return grad if grad.shape == maps.shape else torch.ops.aten._adaptive_avg_pool2d_backward(grad, maps)


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature)), the mean over B.

    student, teacher: logits [B, classes] of one shape and dtype, float32 or float64. The teacher gets no gradient.
    """
    return torch.ops.sparsekd.kd(student, teacher.detach(), temperature)[0]


def kd_reference(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(loss, its gradient to student), both of them differentiable."""
    log_q, log_p = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    p = log_p.exp()
    # A class that the teacher rules out (-inf) adds nothing, whatever the student says of it.
    terms = p * (log_p.masked_fill(p == 0, 0) - log_q.masked_fill(p == 0, 0))
    loss = terms.sum() / student.shape[0] * temperature**2  # of no rows NaN, as every mean in torch
    return loss, (log_q.exp() - p) * (temperature / max(student.shape[0], 1))


def _with_grads(features: Sequence[Tensor], grad_means: Tensor, grad_energy: Tensor) -> list[tuple[Tensor, ...]]:
    """(features, grad of means [B, C, 1, 1], grad of energy [B, 1, H, W]) of each layer."""
    per_channel = grad_means.split([f.shape[1] for f in features], 1)
    per_pixel = grad_energy.split([f.shape[2] * f.shape[3] for f in features], 1)
    return [
        (f, c[:, :, None, None], p.unflatten(1, f.shape[2:])[:, None])
        for f, c, p in zip(features, per_channel, per_pixel, strict=True)
    ]


def _split_maps(energy: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views [B, H, W] of energy maps that lie side by side."""
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    parts = energy.split([height * width for height, width in pairs], 1)
    return [part.unflatten(1, pair) for part, pair in zip(parts, pairs, strict=True)]


def _check_features(features: Sequence[Tensor]) -> None:
    if not features:
        raise ValueError("sparsekd.feature_stats: expected one or more layers, got none; tap a layer")
    for f in features:
        if f.dim() != 4:
            raise ValueError(
                f"sparsekd.feature_stats: features must be [B, C, H, W], got {tuple(f.shape)}; "
                "add unit dimensions for H or W, or tap another layer"
            )
        if not f.is_floating_point():
            raise TypeError(
                f"sparsekd.feature_stats: features must be floating point, got {f.dtype}; tap another layer"
            )
        if f.shape[0] != features[0].shape[0] or f.device != features[0].device:
            raise ValueError(
                "sparsekd.feature_stats: layers must have one batch size and device, got "
                f"{features[0].shape[0]} on {features[0].device} and {f.shape[0]} on {f.device}"
            )


def _check_maps(
    attention: Tensor | None,
    teacher: Tensor,
    student: Tensor,
    teacher_sizes: Sequence[int],
    student_sizes: Sequence[int],
) -> None:
    count_t, count_s = len(teacher_sizes) // 2, len(student_sizes) // 2
    for side, maps, sizes in (("teacher", teacher, teacher_sizes), ("student", student, student_sizes)):
        if min(sizes, default=0) < 1:
            raise ValueError(
                f"sparsekd.match_maps: {side} maps must be one or more, of one or more pixels each, got (H, W) "
                f"{list(zip(sizes[::2], sizes[1::2], strict=True))}; tap a layer whose output is not empty"
            )
        pixels = sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
        if maps.shape != (student.shape[0], pixels):
            raise ValueError(
                f"sparsekd.match_maps: {side} must be [B, sum of H*W] = {(student.shape[0], pixels)}, "
                f"got {tuple(maps.shape)}; pass the energy of layer_stats and the (H, W) of its layers"
            )
        if maps.dtype != student.dtype:
            raise TypeError(
                f"sparsekd.match_maps: teacher and student must have one dtype, got {teacher.dtype} and {student.dtype}"
            )
    if attention is None:
        if count_t != count_s:
            raise ValueError(
                f"sparsekd.match_maps: without attention T and S must be equal, got {count_t} and {count_s}"
            )
    elif attention.shape != (student.shape[0], count_t, count_s) or attention.dtype != student.dtype:
        raise ValueError(
            f"sparsekd.match_maps: attention must be [B, T, S] = {(student.shape[0], count_t, count_s)} in "
            f"{student.dtype}, got {tuple(attention.shape)} in {attention.dtype}"
        )


def _fake_stats(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    first, dtype = features[0], sum_dtype(*features)
    channels, pixels = sum(f.shape[1] for f in features), sum(f.shape[2] * f.shape[3] for f in features)
    return (
        first.new_empty(first.shape[0], channels, dtype=dtype),
        first.new_empty(first.shape[0], pixels, dtype=dtype),
    )


def _fake_stats_grad(features: Sequence[Tensor], grad_means: Tensor, grad_energy: Tensor) -> list[Tensor]:
    return [torch.empty(f.shape, dtype=f.dtype, device=f.device, memory_format=memory_format(f)) for f in features]


def _fake_match(
    attention: Tensor | None,
    teacher: Tensor,
    student: Tensor,
    teacher_sizes: Sequence[int],
    student_sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_attention = student.new_empty(0) if attention is None else torch.empty_like(attention)
    return student.new_empty(()), grad_attention, torch.empty_like(student)


def _fake_kd(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return student.new_empty(()), torch.empty_like(student)


def _save_stats(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[0])


def _backward_stats(ctx: Any, grad_means: Tensor, grad_energy: Tensor) -> list[Tensor]:
    return torch.ops.sparsekd.feature_stats_grad(ctx.saved_tensors, grad_means, grad_energy)


def _save_stats_grad(ctx: Any, inputs: tuple, output: list) -> None:
    ctx.save_for_backward(*inputs[0], *inputs[1:])


def _backward_stats_grad(ctx: Any, grads: list[Tensor | None]) -> tuple:
    """Of grad = per_channel / HW + 2 features per_pixel / C, for whoever differentiates twice."""
    *features, grad_means, grad_energy = ctx.saved_tensors
    to_features, to_means, to_energy = [], [], []
    for (f, _, per_pixel), grad in zip(_with_grads(features, grad_means, grad_energy), grads, strict=True):
        grad = torch.zeros_like(f) if grad is None else grad
        wide = grad.to(per_pixel.dtype)
        to_features.append((wide * per_pixel * (2 / f.shape[1])).to(f.dtype))
        to_means.append(wide.mean((2, 3)))
        to_energy.append(2 * (wide * f).mean(1).flatten(1))
    return to_features, torch.cat(to_means, 1), torch.cat(to_energy, 1)


def _save_match(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.sizes = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *grads)


def _backward_match(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    attention, teacher, student, grad_attention, grad_student = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: what the kernel saved knows nothing of its inputs
        grad_attention, grad_student = match_maps_reference(attention, teacher, student, *ctx.sizes)[1:]
    return None if attention is None else grad * grad_attention, None, grad * grad_student, None, None


def _save_kd(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.temperature = inputs[2]
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward_kd(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    student, teacher, known = ctx.saved_tensors
    if torch.is_grad_enabled():
        known = kd_reference(student, teacher, ctx.temperature)[1]
    return grad * known, None, None


define("feature_stats", "(Tensor[] features) -> (Tensor, Tensor)", feature_stats_reference, _fake_stats)
define(
    "feature_stats_grad",
    "(Tensor[] features, Tensor grad_means, Tensor grad_energy) -> Tensor[]",
    feature_stats_grad_reference,
    _fake_stats_grad,
)
define(
    "match_maps",
    "(Tensor? attention, Tensor teacher, Tensor student, SymInt[] teacher_sizes, SymInt[] student_sizes)"
    " -> (Tensor, Tensor, Tensor)",
    match_maps_reference,
    _fake_match,
)
define("kd", "(Tensor student, Tensor teacher, float temperature) -> (Tensor, Tensor)", kd_reference, _fake_kd)
torch.library.register_autograd("sparsekd::feature_stats", _backward_stats, setup_context=_save_stats)
torch.library.register_autograd("sparsekd::feature_stats_grad", _backward_stats_grad, setup_context=_save_stats_grad)
torch.library.register_autograd("sparsekd::match_maps", _backward_match, setup_context=_save_match)
torch.library.register_autograd("sparsekd::kd", _backward_kd, setup_context=_save_kd)
