"""A frozen layer on a GPU: some ways to compute ``act(conv(x) + bias + residual)``, compared, timed, the fastest kept.

The library alone makes a pass over the activations for each of bias, residual and activation: at a batch of 256 these
passes cost a ResNet-50 as much as half of its convolutions. So ReLU goes into cuDNN's fused call, the rest into one
pass of ours, and what is one pixel wide, dense or not, into our kernel, which fuses all three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import cuda as backend
from ..backends.cuda.plan import difference, tolerance_of
from ..blocks import BlockPattern, BlockSparse
from ..timing import medians
from .dense import dense_linear, dense_norm, torch_conv2d
from .layer import FrozenLayer, Run
from .measure import density_of, random_operands
from .plan import Geometry, LayerPlan

SECONDS = 0.02  # of measuring one way
LIBRARY, ONE_PASS, CUDNN, OURS = "torch", "torch and one pass", "cuDNN fused", "sparsekd"
_TENSORS = ("values", "row_ptr", "col_idx")
_TORCH = {"conv2d": torch_conv2d, "linear": dense_linear, "norm": dense_norm}


def gpu_layer(
    name: str, geometry: Geometry, weight: Tensor | BlockSparse, bias: Tensor | None
) -> tuple[FrozenLayer, LayerPlan]:
    """The fastest of the ways that compute what torch does, at the example's shape, and what was measured."""
    dense = weight.to_dense() if isinstance(weight, BlockSparse) else weight
    dense = dense.contiguous(memory_format=torch.channels_last if dense.dim() == 4 else torch.contiguous_format)
    blocks, why = blocks_for_kernels(geometry, weight)
    ways = library_ways(geometry, dense, bias)
    if blocks is not None:
        ways[OURS] = by_our_kernel(geometry, blocks, bias)
    microseconds: dict[str, float] = {}
    dropped: dict[str, str] = {}
    fastest, tile = LIBRARY, ""
    if len(ways) > 1:
        x, residual = random_operands(geometry, weight, "channels_last", "channels_last")
        if OURS in ways and (found := backend.measure(ways[OURS], x, residual)) is not None:
            tile = f" ({found.choice})"
        calls, dropped = _sound(ways, x, residual)
        taken = medians(calls, SECONDS * len(calls), device=x.device)
        microseconds = {way: 1e6 * seconds for way, seconds in taken.items()}
        fastest = min(taken, key=taken.__getitem__)
    ours = fastest == OURS
    sparse = isinstance(weight, BlockSparse)
    chosen = ("sparse" if sparse else "native") if ours else "dense"
    said = [f"{fastest}{tile if ours else ''} was fastest"] if len(ways) > 1 else []
    said += [why] if why else []
    said += [f"{way} was left out: {reason}" for way, reason in dropped.items()]
    pattern, density = (str(weight.pattern), density_of(weight)) if isinstance(weight, BlockSparse) else (None, 1.0)
    library = min((us for way, us in microseconds.items() if way != OURS), default=None)
    plan = LayerPlan(name, geometry, pattern, density, library, microseconds.get(OURS), chosen, "; ".join(said))
    buffers: dict[str, Tensor | None] = {"bias": bias}
    if ours and blocks is not None:
        buffers |= {name: getattr(blocks, name) for name in _TENSORS}
    else:
        buffers["weight"] = dense
    layer = FrozenLayer(geometry, buffers, ways[fastest], chosen=chosen, blocks=blocks if ours else None)
    return layer, plan


def _sound(
    ways: dict[str, Run], x: Tensor, residual: Tensor | None
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """(the calls that compute what torch does, name -> what is wrong with the others)."""
    calls: dict[str, Callable[[], Tensor]] = {}
    dropped = {}
    want = ways[LIBRARY](x, residual)
    for name, run in ways.items():
        try:
            why = difference(run(x, residual), want, tolerance_of(x.dtype))
        except Exception as error:  # whatever a library raises that does not know a shape: there are other ways
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        if why:
            dropped[name] = why
        else:
            calls[name] = lambda run=run: run(x, residual)  # type: ignore[misc]
    return calls, dropped


# ---- The ways


def blocks_for_kernels(geometry: Geometry, weight: Tensor | BlockSparse) -> tuple[BlockSparse | None, str]:
    """(the weight as our kernels take it, ""), or (None, why they do not)."""
    if isinstance(weight, BlockSparse):
        why = backend.why_dense(weight, geometry.groups)
        return (None, why) if why else (_contiguous(weight), "")
    pointwise = geometry.kind == "linear" or (geometry.kind == "conv2d" and max(geometry.weight[2:]) == 1)
    if not pointwise:
        return None, "not block-sparse"
    sides = (max(min(64, size & -size), 16) for size in weight.shape[:2])
    blocks = BlockSparse.from_dense(weight, BlockPattern(*sides))
    return (None, "not block-sparse") if backend.why_dense(blocks, geometry.groups) else (_contiguous(blocks), "")


def _contiguous(blocks: BlockSparse) -> BlockSparse:
    return replace(blocks, **{name: getattr(blocks, name).contiguous() for name in _TENSORS})


def library_ways(geometry: Geometry, dense: Tensor, bias: Tensor | None) -> dict[str, Run]:
    """torch's own way first."""
    ways: dict[str, Run] = {LIBRARY: _TORCH[geometry.kind](geometry, dense, bias)}
    if geometry.kind != "conv2d" or not dense.is_floating_point():
        return ways
    if geometry.activation == "relu" and dense.is_cuda:
        ways[CUDNN] = cudnn_conv2d(geometry, dense, bias)
    elif (bias is not None) + geometry.residual + (geometry.activation != "none") > 1 and backend.has_epilogue(dense):
        ways[ONE_PASS] = one_pass_conv2d(geometry, dense, bias)
    return ways


def cudnn_conv2d(geometry: Geometry, dense: Tensor, bias: Tensor | None) -> Run:
    """relu(conv(x) + bias + residual) in one call of cuDNN."""
    steps = geometry.walk.steps
    pad, pad_mode = geometry.pad, geometry.pad_mode
    shift = dense.new_zeros(dense.shape[0]) if bias is None else bias

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        x = (x if pad is None else nn.functional.pad(x, pad, pad_mode)).contiguous(memory_format=torch.channels_last)
        if residual is None:
            return torch.cudnn_convolution_relu(x, dense, shift, *steps)
        residual = residual.contiguous(memory_format=torch.channels_last)
        return torch.cudnn_convolution_add_relu(x, dense, residual, 1.0, shift, *steps)

    return run


def one_pass_conv2d(geometry: Geometry, dense: Tensor, bias: Tensor | None) -> Run:
    """torch's convolution, and one pass of ours for bias, residual and activation."""
    steps = geometry.walk.steps
    pad, pad_mode, activation = geometry.pad, geometry.pad_mode, _activation(geometry)

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        x = x if pad is None else nn.functional.pad(x, pad, pad_mode)
        return backend.epilogue(nn.functional.conv2d(x, dense, None, *steps), bias, residual, activation)

    return run


def by_our_kernel(geometry: Geometry, weight: BlockSparse, bias: Tensor | None) -> Run:
    operands = (weight.values, weight.row_ptr, weight.col_idx, bias)
    pad, pad_mode, activation = geometry.pad, geometry.pad_mode, _activation(geometry)
    if geometry.kind == "linear":
        sizes: tuple[Any, ...] = (weight.shape[0],)
        op: Callable[..., Tensor] = backend.linear
    else:
        sizes = (weight.shape[0], *geometry.walk)
        op = backend.conv2d

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        x = x if pad is None else nn.functional.pad(x, pad, pad_mode)
        return op(x, *operands, *sizes, residual=residual, activation=activation)

    return run


def _activation(geometry: Geometry) -> str | None:
    return None if geometry.activation == "none" else geometry.activation
