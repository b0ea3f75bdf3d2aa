"""Distillation losses, forward and backward: feature_stats, attention transfer and SAD on feature maps, logits.

`plain` is the formula in torch operations, each kept by autograd; `compiled` (--compile) is torch.compile of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.contest import Case, Contest, Setup, contest_of_gradients
from sparsekd.losses import SAD, attention_transfer_loss, kd_loss
from sparsekd.ops.attention import feature_stats

# Channels and side of the feature maps, shallow to deep.
_STUDENT = ((32, 32), (64, 16), (128, 8))  # WRN-16-2
_QUICK = ((16, 16), (32, 8))


def cases(setup: Setup) -> list[Case]:
    batch, maps = (8, _QUICK) if setup.quick else (64, _STUDENT)
    compiled = ("compiled",) if setup.compile else ()
    pair, alone = ("plain", "ours", *compiled), ("ours", *compiled)
    return [
        Case(f"feature-stats-n{batch}", pair, lambda: _stats(setup, batch, maps)),
        Case(f"attention-transfer-n{batch}", pair, lambda: _transfer(setup, batch, maps)),
        Case(f"logits-n{batch}", pair, lambda: _logits(setup, batch)),
        Case(f"sad-n{batch}", alone, lambda: _sad(setup, batch, maps)),
    ]


def _features(setup: Setup, batch: int, maps: Sequence[tuple[int, int]], grad: bool) -> list[Tensor]:
    """Post-ReLU feature maps."""
    return [torch.randn(batch, c, s, s, device=setup.device).relu().requires_grad_(grad) for c, s in maps]


def _stats(setup: Setup, batch: int, maps: Sequence[tuple[int, int]]) -> Contest:
    student = _features(setup, batch, maps, grad=True)

    def plain(features: Tensor) -> tuple[Tensor, Tensor]:
        return features.mean((2, 3)), features.square().mean(1).flatten(1)

    def loss(stats: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
        return lambda: torch.stack([part.square().sum() for x in student for part in stats(x)]).sum()

    return contest_of_gradients(setup, {"plain": loss(plain), "ours": loss(feature_stats)}, student)


def _transfer(setup: Setup, batch: int, maps: Sequence[tuple[int, int]]) -> Contest:
    student = _features(setup, batch, maps, grad=True)
    teacher = _features(setup, batch, [(2 * c, s) for c, s in maps], grad=False)

    def attention(features: Tensor) -> Tensor:
        return F.normalize(features.square().mean(1).flatten(1))

    def plain() -> Tensor:
        pairs = zip(student, teacher, strict=True)
        return torch.stack([F.mse_loss(attention(s), attention(t)) for s, t in pairs]).sum()

    calls = {"plain": plain, "ours": lambda: attention_transfer_loss(student, teacher)}
    return contest_of_gradients(setup, calls, student)


def _logits(setup: Setup, batch: int, classes: int = 100, temperature: float = 4.0) -> Contest:
    student = torch.randn(batch, classes, device=setup.device, requires_grad=True)
    teacher = torch.randn(batch, classes, device=setup.device)

    def plain() -> Tensor:
        logs, wanted = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
        return temperature**2 * F.kl_div(logs, wanted, reduction="batchmean")

    calls = {"plain": plain, "ours": lambda: kd_loss(student, teacher, temperature)}
    return contest_of_gradients(setup, calls, [student])


def _sad(setup: Setup, batch: int, maps: Sequence[tuple[int, int]]) -> Contest:
    student = _features(setup, batch, maps, grad=True)
    teacher = _features(setup, batch, [(2 * c, s) for c, s in maps], grad=False)
    module = SAD([t.shape[1] for t in teacher], [s.shape[1] for s in student]).to(setup.device)
    return contest_of_gradients(setup, {"ours": lambda: module(teacher, student)}, [*student, *module.parameters()])
