"""What a trained network costs: its size, its speed and its joules, dense and frozen. Its scores are its goal's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import energy
from ..convert import densify
from ..data import Task
from ..freeze import freeze
from ..models import MF
from ..nn import BlockSparseLayer, SparseEmbedding
from ..pruning import count_weights

__all__ = ["count_parameters", "entries_of", "freeze_for", "kept_share", "not_pruned", "served", "speed"]


def not_pruned(model: nn.Module) -> tuple[str, ...]:
    """Patterns of the layers that the methods leave alone: `model.not_pruned`, none without it."""
    return getattr(model, "not_pruned", ())


def kept_share(model: nn.Module) -> float:
    """Kept share of the weights that the methods may prune; 1 for a dense model, and for one with nothing to prune.

    Of a recommender: of the entries of its tables, as they would be with `dim_of_dense` dimensions.
    """
    if hasattr(model, "tables"):
        return entries_of(model)[0] / entries_of(model)[1]
    weights, kept = count_weights(model, not_pruned(model) or None)
    return kept / weights if weights else 1.0


def entries_of(model: Any) -> tuple[int, int]:
    """Entries of the tables of a recommender now, and if they were dense, of `dim_of_dense` dimensions."""
    tables = [table for pair in model.tables for table in pair]
    kept = sum(parameter.numel() for table in tables for parameter in table.parameters())
    return kept, sum(table.num_embeddings * max(model.dim_of_dense, table.embedding_dim) for table in tables)


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes, without the padding of ragged blocks."""
    padding = sum(m.values.numel() - m.num_kept for m in model.modules() if isinstance(m, BlockSparseLayer))
    return sum(p.numel() for p in model.parameters()) - padding


def freeze_for(model: nn.Module, task: Task, batches: tuple[int, ...], layer_ms: float) -> dict[int, Any]:
    """The network frozen for each batch size: which layers run sparse is chosen at that size."""
    return {batch: freeze(model.eval(), task.example_inputs(batch), layer_ms=layer_ms) for batch in batches}


def speed(model: nn.Module, frozen: Mapping[int, nn.Module], task: Task, quick: bool) -> tuple[dict[str, Any], str]:
    """Metrics of the dense eager network (same architecture, same weights) against the frozen one, and where the joules
    come from.

    latency_ms_{dense,frozen} and latency_ratio at the smallest batch, throughput_{dense,frozen}_{batch} in rows per
    second at the others, joules_{dense,frozen} per row at the largest. Interleaved windows, medians.
    """
    dense = densify(copy.deepcopy(model)).eval()
    seconds, warmup, rounds = (0.02, 0.01, 5) if quick else (0.05, 0.05, 7)
    metrics: dict[str, Any] = {}
    note = ""
    for batch in sorted(frozen):
        inputs = task.example_inputs(batch)
        calls = {"dense": _call(dense, inputs), "frozen": _call(frozen[batch], inputs)}
        with torch.inference_mode():
            compared = energy.compare(calls, seconds=seconds, warmup=warmup, rounds=rounds, device="cpu")
        note = _measured(compared, batch, batch == min(frozen), metrics)
    return metrics, note


def _measured(compared: energy.Comparison, batch: int, single: bool, metrics: dict[str, Any]) -> str:
    """Put what was measured at one batch size into `metrics`; where the joules come from."""
    note = ""
    for name, measured in compared.measurements.items():
        if single:
            metrics[f"latency_ms_{name}"] = 1e3 * measured.seconds_per_call
            metrics["latency_ratio"] = compared.seconds_ratio["frozen"].value
        else:
            metrics[f"throughput_{name}_{batch}"] = batch / measured.seconds_per_call
        joules = measured.joules_per_call
        metrics[f"joules_{name}"] = None if joules is None else joules / batch
        # Why each counter cannot be read is a paragraph; doctor prints it.
        missing = "not measured: no energy counter can be read here, `sparsekd doctor` says why"
        note = missing if joules is None else f"{measured.source}, at batch {batch}"
    return note


def served(model: Any, task: Task, quick: bool) -> tuple[dict[str, Any], str]:
    """As `speed`, of the best 20 items for a user: by a dense product, and straight from the packed table.

    Nothing where a model is not the product of two tables, or has dense ones.  Raises RuntimeError where they differ.
    """
    if not isinstance(model, MF) or not isinstance(model.items, SparseEmbedding):
        return {}, ""
    users, items = (table.to_dense().weight.detach() for table in model.tables[0])
    seconds, warmup, rounds = (0.02, 0.02, 3) if quick else (0.15, 0.15, 7)
    metrics: dict[str, Any] = {}
    note, count = "", min(20, task.sizes["items"])
    for batch in (1, 64):
        ids = task.example_inputs(batch)[0]
        calls: dict[str, Callable[[], Any]] = {
            "dense": partial(_best_of_dense, users, items, ids, count),
            "frozen": partial(_best_of_packed, *model.tables[0], ids, count),
        }
        with torch.inference_mode():
            dense, packed = (calls[name]()[0] for name in ("dense", "frozen"))
            if not torch.allclose(dense, packed, atol=1e-4):
                raise RuntimeError(
                    f"sparsekd.runs: the packed table scores up to {float((dense - packed).abs().max()):.2g} beside "
                    "the dense one: a fault of sparsekd on this machine; please report it with the output of sparsekd "
                    "doctor"
                )
            compared = energy.compare(calls, seconds=seconds, warmup=warmup, rounds=rounds, device="cpu")
        note = _measured(compared, batch, batch == 1, metrics)
    return metrics, note


def _best_of_dense(users: Tensor, items: Tensor, ids: Tensor, count: int) -> Any:
    return (users[ids] @ items.T).topk(count)


def _best_of_packed(users: Any, items: Any, ids: Tensor, count: int) -> Any:
    return items.top_k(users(ids), count)


def _call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: model(*inputs)
