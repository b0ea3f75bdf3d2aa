"""One file per device; the only place that chooses a kernel. ``describe()`` says what was chosen, and why."""

from __future__ import annotations

from . import cpu, cuda

OPS = (
    "linear",
    "linear_grad_input",
    "linear_grad_values",
    "conv2d",
    "conv2d_grad_input",
    "conv2d_grad_values",
    "embedding",
    "embedding_bag",
    "embedding_bag_scale",
    "embedding_grad",
    "embedding_absent_",
    "embedding_top_k",
    "embedding_rows_grad",
    "embedding_sgd_",
    "embedding_adagrad_",
    "embedding_adagrad_rows_",
    "embedding_adam_",
    "embedding_magnitudes",
    "embedding_thin",
    "embedding_repack",
    "embedding_int8",
    "embedding_bag_int8",
    "embedding_top_k_int8",
    "feature_stats",
    "feature_stats_grad",
    "match_maps",
    "kd",
    "norm_relu",
    "norm_relu_grad",
)


def describe() -> dict[str, dict[str, str]]:
    """For each op, what runs it on each device: ``{"conv2d": {"cpu": "sparsekd._C avx512 for ...", ...}}``."""
    return {op: {"cpu": cpu.describe(op), "cuda": cuda.describe(op)} for op in OPS}


cpu.register()
cuda.register()
