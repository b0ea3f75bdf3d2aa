"""CUDA kernels; the only place that chooses one on a GPU, layer by layer and direction by direction.

    sparsekd.backends.cuda.prewarm(model, x)       # time the candidates once; kept in one JSON file

ops        the six ops: operands in, the chosen path out. Operands were checked in ``sparsekd/ops``
choose     which path runs: Triton (``sparsekd.kernels``), the dense library, or that on the channels a block touches
plan       the choices, measured or guessed, and their file
cost       what a tile should take, where nothing was measured
masks      what is known of a block mask: tables and indices, built once
device     streams, captures, and memory that outlives them
driver     the forward pass in CUDA C++, for devices without Triton
attention  the distillation ops
embedding  the ops of packed embedding tables

What no kernel takes (blocks for a CPU, say) runs dense, the weight made dense on the device. Without Triton the forward
pass of float16 and bfloat16 runs in CUDA C++, the rest dense. Run a model once before capturing it in a CUDA graph.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from . import attention, driver, embedding
from .choose import allows_tf32, measure, prewarm, save_plan, takes, uses_triton, why_dense
from .ops import (
    conv2d,
    conv2d_grad_input,
    conv2d_grad_values,
    epilogue,
    has_epilogue,
    linear,
    linear_grad_input,
    linear_grad_values,
)

__all__ = [
    "allows_tf32",
    "conv2d",
    "describe",
    "epilogue",
    "has_epilogue",
    "linear",
    "measure",
    "prewarm",
    "save_plan",
    "takes",
    "why_dense",
]


def describe(op: str) -> str:
    """What runs ``op`` on CUDA devices, and why."""
    if op in attention.OPS:
        return attention.describe(op)
    if op.startswith("norm_relu"):
        return "pure-torch reference; sparsekd.nn.NormReLU calls torch's ops one after the other there"
    if op.startswith("embedding"):
        return embedding.describe(op)
    if not uses_triton():
        why = "SPARSEKD_CUDA=native" if find_spec("triton") else "triton is not importable; pip install sparsekd[gpu]"
        missing = driver.why_not() if op in ("linear", "conv2d") else "CUDA C++ has the forward pass alone"
        if missing:
            return f"the dense library, the weight made dense: {why}, and {missing}"
        return f"CUDA C++ for float16 and bfloat16 ({why}), where Triton would run; else the dense library"
    return (
        "sparsekd.kernels (Triton) or the dense library, whichever is faster, for float16, bfloat16 and float32 with "
        "blocks in multiples of 16x16 and channels in multiples of 8; the dense library otherwise"
    )


def register() -> None:
    """Make these functions what ``torch.ops.sparsekd.*`` runs on CUDA tensors."""
    for op in (linear, linear_grad_input, linear_grad_values, conv2d, conv2d_grad_input, conv2d_grad_values):
        torch.library.impl(f"sparsekd::{op.__name__}", "cuda", op)
    attention.register()
    embedding.register()
