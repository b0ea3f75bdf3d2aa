"""What a trained network is worth: its errors, its size, its speed and its joules, dense and frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import energy
from ..convert import DENSE_TYPES, SPARSE_TYPES, densify, named_layers
from ..data import Rows, Task
from ..freeze import freeze
from ..nn import BlockSparseLayer
from . import baselines

__all__ = ["count_parameters", "errors", "freeze_for", "kept_share", "not_pruned", "predict", "scores", "speed"]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def predict(model: nn.Module, part: Rows, batch_size: int = 512) -> Tensor:
    """Predictions [N], or logits [N, classes], of a whole part, in evaluation mode; on the CPU, in float32."""
    with _evaluating(model):
        return torch.cat([model(*inputs) for inputs, _ in part.batches(batch_size)]).float().cpu()


def scores(prediction: Tensor, task: Task, part: Rows) -> dict[str, float]:
    """{"mae", "mse"} of predictions [N] clipped to the range of the target; {"accuracy", "cross_entropy"} of logits."""
    if task.kind != "images":
        return dict(zip(("mae", "mse"), errors(prediction, task, part), strict=True))
    target = part.target.cpu()
    accuracy = (prediction.argmax(1) == target).double().mean()
    return {"accuracy": float(accuracy), "cross_entropy": float(F.cross_entropy(prediction, target))}


def errors(prediction: Tensor, task: Task, part: Rows) -> tuple[float, float]:
    """(MAE, MSE) of predictions [N] clipped to the range of the target."""
    score = baselines.score("", task, part, prediction.numpy())
    return score.mae, score.mse


def not_pruned(model: nn.Module) -> tuple[str, ...]:
    """Patterns of the layers that the methods leave alone: `model.not_pruned`, none without it."""
    return getattr(model, "not_pruned", ())


def kept_share(model: nn.Module) -> float:
    """Kept share of the weights that the methods may prune; 1 for a dense model."""
    leave = not_pruned(model)
    sparse: list[Any] = [layer for _, layer in named_layers(model, SPARSE_TYPES, None, leave)]
    dense: list[Any] = [layer for _, layer in named_layers(model, DENSE_TYPES, None, leave)]
    loose = sum(layer.weight.numel() for layer in dense)
    kept = sum(layer.num_kept for layer in sparse) + loose
    return kept / (sum(layer.num_weights for layer in sparse) + loose)


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
            found = energy.compare(calls, seconds=seconds, warmup=warmup, rounds=rounds, device="cpu")
        for name, measured in found.measurements.items():
            if batch == min(frozen):
                metrics[f"latency_ms_{name}"] = 1e3 * measured.seconds_per_call
                metrics["latency_ratio"] = found.seconds_ratio["frozen"].value
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
