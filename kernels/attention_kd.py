"""The distillation loss on logits, and its gradient, in one pass over each row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention import ADD, MAX

LARGEST_ROW = 65536  # classes that the registers of one program hold


@triton.jit
def kd_kernel(
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
    x = tl.where(mask, (x - tl.reduce(x, 0, MAX)) / temperature, 0.0)
    y = tl.where(mask, (y - tl.reduce(y, 0, MAX)) / temperature, 0.0)
    q, p = tl.where(mask, tl.exp(x), 0.0), tl.where(mask, tl.exp(y), 0.0)
    sum_q, sum_p = tl.reduce(q, 0, ADD), tl.reduce(p, 0, ADD)
    # A class that the teacher rules out (-inf) adds nothing, whatever the student says of it; NaN stays.
    divergence = tl.reduce(tl.where(p == 0, 0.0, p * (y - x)), 0, ADD) / sum_p + tl.log(sum_q) - tl.log(sum_p)
    tl.store(loss_ptr + tl.program_id(0), divergence * temperature * temperature * per_image)
    tl.store(grad_ptr + row + c, (q / sum_q - p / sum_p) * (temperature * per_image), mask=mask)


def kd(student: Tensor, teacher: Tensor, temperature: float, losses: Tensor, grad: Tensor) -> None:
    """Fill ``losses [B]``, whose sum is the loss, and ``grad``."""
    batch, classes = student.shape
    block = triton.next_power_of_2(classes)
    kd_kernel[(batch,)](
        student, teacher, losses, grad, classes, temperature, 1 / batch,
        BLOCK=block, num_warps=min(max(block // 256, 1), 16),
    )  # fmt: skip
