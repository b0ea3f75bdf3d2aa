"""What a training step cannot take less than: the products that the kept weights ask for, and the maps between layers.

Every product is done three times, for the output and for both gradients, at the measured peak of the CPU. Every layer
reads its input and writes its output, and on the way back reads its input and the gradient of its output, and writes
the gradient of its input: five maps a layer, at the measured rate of copies. All that stands between layers is taken to
be free, as if it were fused into them, and so are the loss and the optimizer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsekd.backends import cpu
from sparsekd.conversion import DENSE_TYPES, SPARSE_TYPES
from sparsekd.pruning import count_macs

COPIED = 1 << 26  # bytes, more than caches hold
COPIES = 5


@dataclass(frozen=True)
class Floor:
    """Of one step: multiply-adds and bytes, and the milliseconds that these machines' rates make of them."""

    macs: float
    bytes: float
    gflops: float
    gigabytes_a_second: float

    @property
    def arithmetic_ms(self) -> float:
        return 2e-6 * self.macs / self.gflops

    @property
    def traffic_ms(self) -> float:
        return 1e-6 * self.bytes / self.gigabytes_a_second


def floor_of(student: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Floor:
    """``inputs``: of one batch. RuntimeError without compiled kernels, which measure the peak."""
    if cpu.native is None:
        raise RuntimeError(f"benchmarks.headline floor: the peak cannot be measured: {cpu.missing}")
    _, kept = count_macs(student, inputs)
    rows, threads = len(inputs[0]), torch.get_num_threads()
    return Floor(
        3 * rows * kept, 4.0 * _floats_moved(student, inputs), cpu.native.peak_gflops(threads, 0.2), _copy_rate()
    )


@torch.no_grad()
def _floats_moved(student: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    moved = []

    def count(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        moved.append(3 * args[0].numel() + 2 * output.numel())

    layers = [module for module in student.modules() if isinstance(module, (*DENSE_TYPES, *SPARSE_TYPES))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    student(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(moved)


def _copy_rate() -> float:
    """Gigabytes a second, read and written, on torch's threads."""
    source, target = torch.ones(COPIED // 4), torch.zeros(COPIED // 4)
    best = 0.0
    for _ in range(COPIES):
        began = time.perf_counter()
        target.copy_(source)
        best = max(best, 2e-9 * COPIED / (time.perf_counter() - began))
    return best
