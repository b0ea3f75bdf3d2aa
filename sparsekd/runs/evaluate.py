"""What a trained network costs: its size, its speed and its joules, dense and frozen. Its scores are its goal's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import energy
from ..convert import densify
from ..data import Task
from ..freeze import freeze
from ..nn import BlockSparseLayer
from ..pruning import count_weights

__all__ = ["count_parameters", "freeze_for", "kept_share", "not_pruned", "speed"]


def not_pruned(model: nn.Module) -> tuple[str, ...]:
    """Patterns of the layers that the methods leave alone: `model.not_pruned`, none without it."""
    return getattr(model, "not_pruned", ())


def kept_share(model: nn.Module) -> float:
    """Kept share of the weights that the methods may prune; 1 for a dense model, and for one with nothing to prune."""
    weights, kept = count_weights(model, not_pruned(model) or None)
    return kept / weights if weights else 1.0


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes, without the padding of ragged blocks."""
    padding = sum(m.values.numel() - m.num_kept for m in model.modules() if isinstance(m, BlockSparseLayer))
    return sum(p.numel() for p in model.parameters()) - padding


def freeze_for(model: nn.Module, task: Task, batches: tuple[int, ...], layer_ms: float = 60.0) -> dict[int, Any]:
    """The network frozen for each batch size: which layers run sparse is chosen at that size."""
    return {batch: freeze(model.eval(), task.example_inputs(batch), layer_ms=layer_ms) for batch in batches}


def speed(model: nn.Module, frozen: Mapping[int, nn.Module], task: Task, quick: bool) -> tuple[dict[str, Any], str]:
    """Metrics of the dense eager network (same architecture, same weights) against the frozen one, and where the joules
    come from.

    latency_ms_{dense,frozen} and latency_ratio at the smallest batch, throughput_{dense,frozen}_{batch} in rows per
    second at the others, joules_{dense,frozen} per row at the largest. Interleaved windows, medians.
    """
    dense = densify(copy.deepcopy(model)).eval()
    seconds, warmup, rounds = (0.05, 0.05, 5) if quick else (0.15, 0.15, 7)
    metrics: dict[str, Any] = {}
    note = ""
    for batch in sorted(frozen):
        inputs = task.example_inputs(batch)
        calls = {"dense": _call(dense, inputs), "frozen": _call(frozen[batch], inputs)}
        with torch.inference_mode():
            compared = energy.compare(calls, seconds=seconds, warmup=warmup, rounds=rounds, device="cpu")
        for name, measured in compared.measurements.items():
            if batch == min(frozen):
                metrics[f"latency_ms_{name}"] = 1e3 * measured.seconds_per_call
                metrics["latency_ratio"] = compared.seconds_ratio["frozen"].value
            else:
                metrics[f"throughput_{name}_{batch}"] = batch / measured.seconds_per_call
            joules = measured.joules_per_call
            metrics[f"joules_{name}"] = None if joules is None else joules / batch
            # Why each counter cannot be read is a paragraph; doctor prints it.
            missing = "not measured: no energy counter can be read here, `sparsekd doctor` says why"
            note = missing if joules is None else f"{measured.source}, at batch {batch}"
    return metrics, note


def _call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: model(*inputs)
