"""Frozen layers by ``sparsekd._C``: packed weights, and direct calls of the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..backends import cpu
from ..blocks import BlockPattern, BlockSparse
from .between import between_step, torch_between
from .dense import torch_run, with_epilogue
from .layer import FORMATS, FrozenLayer, Run, Samples, Step
from .plan import Geometry

DTYPES = {torch.float32: "", torch.bfloat16: "Bf16"}  # of the compiled kernels -> the end of their names


def cpu_layer(
    geometry: Geometry,
    weight: Tensor | BlockSparse,
    bias: Tensor | None,
    *,
    chosen: str,
    memory_format: str,
    threads: int | None,
) -> FrozenLayer:
    """A layer for the CPU; ``chosen`` as in `LayerPlan`."""
    bias = None if bias is None else bias.contiguous()
    blocks = weight if isinstance(weight, BlockSparse) else None
    buffers: dict[str, Tensor | None] = {"bias": bias}
    step: Step | None = None
    if blocks is not None and chosen == "sparse":
        tensors = {name: getattr(blocks, name).contiguous() for name in ("values", "row_ptr", "col_idx")}
        buffers |= tensors
        run, step = _packed(geometry, replace(blocks, **tensors), bias, memory_format, threads)
    else:
        dense = weight.to_dense() if isinstance(weight, BlockSparse) else weight
        image = geometry.kind in ("conv2d", "conv_transpose2d")
        layout = FORMATS[memory_format] if image else torch.contiguous_format
        buffers["weight"] = laid_out = dense.contiguous(memory_format=layout)
        if geometry.between:
            run = torch_between(geometry, laid_out, bias)
            step = between_step(geometry, laid_out, bias, memory_format) if chosen == "native" else None
        elif chosen == "native":
            run, step = _packed(geometry, dense.contiguous(), bias, memory_format, threads)
        else:
            run = torch_run(geometry, laid_out, bias, memory_format)
    return FrozenLayer(geometry, buffers, run, chosen=chosen, blocks=blocks, step=step, threads=threads)


def _packed(
    geometry: Geometry, weight: Tensor | BlockSparse, bias: Tensor | None, memory_format: str, threads: int | None
) -> tuple[Run, Step | None]:
    """A dense weight is a block-sparse one that has every block, unless it is that of a depthwise convolution."""
    single = geometry.pool or (geometry.depthwise and isinstance(weight, Tensor))
    if isinstance(weight, Tensor) and not single:
        weight = BlockSparse.from_dense(weight, BlockPattern.for_device("cpu", weight.dtype))
    if isinstance(weight, BlockSparse) and geometry.kind == "conv_transpose2d":
        return _transposed(geometry, weight, bias), None
    if isinstance(weight, BlockSparse) and geometry.kind == "linear":
        return _packed_linear(geometry, weight, bias, threads)

    def kernel_of(geometry: Geometry) -> Kernel:
        if isinstance(weight, BlockSparse):
            return _sparse_kernel(geometry, weight, bias, memory_format == "channels_last")
        if geometry.pool:
            return _pool_kernel(geometry, weight.dtype)
        return _depthwise_kernel(geometry, weight, bias)

    dtype = weight.values.dtype if isinstance(weight, BlockSparse) else weight.dtype
    return _packed_conv2d(geometry, kernel_of, dtype, memory_format, threads)


def _transposed(geometry: Geometry, weight: BlockSparse, bias: Tensor | None) -> Run:
    """On the kernel of a convolution's gradient to its input, which has no epilogue: that follows in place."""
    sizes: dict[str, Any] = {
        name: getattr(geometry, name) for name in ("stride", "padding", "output_padding", "dilation")
    }
    tensors = (weight.values, weight.row_ptr, weight.col_idx, bias)
    sizes |= {"out_channels": geometry.out_channels, "kernel_size": geometry.weight[2:], "groups": geometry.groups}
    return with_epilogue(geometry, lambda x: ops.conv_transpose2d(x, *tensors, **sizes))


def _shape(geometry: Geometry, block: tuple[int, int] = (1, 1)) -> Any:
    return cpu.native.Conv2dShape(
        (1, geometry.input[1], *geometry.padded_image), geometry.weight[0], geometry.weight[2:] or (1, 1),
        geometry.stride, geometry.padding, geometry.dilation, geometry.groups, block,
    )  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A packed layer of ``_C`` behind one signature: run(x, x_channels_last, residual, y, threads, n), add as Step."""

    run: Callable[[int, bool, int, int, int, int], None]
    add: Callable[[Any, Sequence[int], bool, int], None]
    any_format: bool = False


def _sparse_kernel(geometry: Geometry, weight: BlockSparse, bias: Tensor | None, last: bool) -> Kernel:
    shape = _shape(geometry, (weight.pattern.bh, weight.pattern.bw))
    packed = _pack("PackedConv2d", shape, weight=weight, bias=bias, activation=geometry.activation)
    run = packed.run
    return Kernel(
        lambda x, x_last, residual, y, threads, n: run(x, x_last, residual, y, last, threads, n),
        lambda network, operands, x_last, y: network.add(packed, operands[0], x_last, _residual(operands), y, last),
        any_format=True,
    )


def _depthwise_kernel(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Kernel:
    """A batch norm is the 1 x 1 case."""
    pointers = (weight.data_ptr(), 0 if bias is None else bias.data_ptr())
    packed = cpu.native.PackedDepthwise(_shape(geometry), *pointers, cpu.native.ACTIVATIONS[geometry.activation])
    run = packed.run
    return Kernel(
        lambda x, x_last, residual, y, threads, n: run(x, residual, y, threads, n),
        lambda network, operands, x_last, y: network.add(packed, operands[0], _residual(operands), y),
    )


def _residual(operands: Sequence[int]) -> int:
    return operands[1] if len(operands) > 1 else -1


def _pool_kernel(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    packed = cpu.native.Pool(_shape(geometry), geometry.kind == "mean", _name(dtype))
    run = packed.run
    return Kernel(
        lambda x, x_last, residual, y, threads, n: run(x, y, threads, n),
        lambda network, operands, x_last, y: network.add(packed, operands[0], y),
    )


MOST_SIZES = 16  # of images that a layer is kept packed for


def other_sizes(geometry: Geometry, make: Callable[[Geometry], Run]) -> Run:
    """The layer for images of other sizes than the example's: made when they first come."""
    runs: dict[tuple[int, ...], Run] = {}

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        size = (x.shape[2], x.shape[3])
        call = runs.get(size)
        if call is None:
            while len(runs) >= MOST_SIZES:
                runs.pop(next(iter(runs)), None)
            other = geometry.of_image(size)
            flattens = geometry.flat and other.output_image != (1, 1)
            call = make(replace(other, flat=False) if flattens else other)
            if flattens:
                call = partial(_flattened, call)
            runs[size] = call
        return call(x, residual, reuse)

    return run


def _flattened(run: Run, x: Tensor, residual: Tensor | None, reuse: bool) -> Tensor:
    return run(x, residual, reuse).flatten(1)


def _packed_conv2d(
    geometry: Geometry,
    kernel_of: Callable[[Geometry], Kernel],
    dtype: torch.dtype,
    memory_format: str,
    threads: int | None,
) -> tuple[Run, Step | None]:
    """A direct call of the compiled kernel, which reads and writes raw memory: what it cannot check is checked here."""
    image, out, size = (geometry.input[1], *geometry.padded_image), geometry.output, geometry.input[2:]
    layout = FORMATS[memory_format]
    (other,) = set(FORMATS.values()) - {layout}
    out_layout = layout if len(out) == 3 else torch.contiguous_format
    pad, pad_mode, last = geometry.pad, geometry.pad_mode, memory_format == "channels_last"
    kernel = kernel_of(geometry)
    call, any_format, empty, torch_threads = kernel.run, kernel.any_format, torch.empty, torch.get_num_threads
    elsewhere = other_sizes(geometry, lambda one: _packed_conv2d(one, kernel_of, dtype, memory_format, threads)[0])

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        if x.dtype is not dtype or not x.is_cpu or x.dim() != 4 or x.shape[1] != image[0]:
            raise _wrong_input(x, ("N", *image), dtype)
        if x.shape[2:] != size:
            return elsewhere(x, residual, reuse)
        if pad is not None:
            x = F.pad(x, pad, pad_mode)
        x_last = last
        if not x.is_contiguous(memory_format=layout):
            if any_format and x.is_contiguous(memory_format=other):
                x_last = not last
            else:
                x = x.contiguous(memory_format=layout)
        n = x.shape[0]
        add = 0
        if residual is not None:
            residual = _like(residual, (n, *out), dtype, layout)
            add = residual.data_ptr()
        y = (
            residual
            if reuse and residual is not None
            else empty((n, *out), dtype=dtype, device="cpu", memory_format=out_layout)
        )
        call(x.data_ptr(), x_last, add, y.data_ptr(), threads or torch_threads(), n)
        return y

    if pad is not None:
        return run, None
    y_samples = Samples(out, dtype, out_layout)
    return run, Step(kernel.add, (Samples(image, dtype, layout), y_samples), y_samples, any_format)


def _packed_linear(
    geometry: Geometry, weight: BlockSparse, bias: Tensor | None, threads: int | None
) -> tuple[Run, Step | None]:
    out_features, in_features = weight.shape
    sizes = (in_features, out_features, weight.pattern.bh, weight.pattern.bw)
    packed = _pack("PackedLinear", *sizes, weight=weight, bias=bias, activation=geometry.activation)
    call = packed.run
    dtype, empty, torch_threads = weight.values.dtype, torch.empty, torch.get_num_threads

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        *batch, features = x.shape
        if features != in_features or x.dtype is not dtype or not x.is_cpu:
            raise _wrong_input(x, ("...", in_features), dtype)
        x = x.contiguous()
        y = empty((*batch, out_features), dtype=dtype, device="cpu")
        add = 0
        if residual is not None:
            residual = _like(residual, y.shape, dtype, torch.contiguous_format)
            add = residual.data_ptr()
        call(x.data_ptr(), math.prod(batch), add, y.data_ptr(), threads or torch_threads())
        return y

    sample = geometry.input[1:]
    rows = math.prod(sample[:-1])
    if not sample:  # a vector alone, not a batch
        return run, None
    y_samples = Samples(geometry.output, dtype)
    return run, Step(
        lambda network, operands, x_last, y: network.add(packed, rows, operands[0], _residual(operands), y),
        (Samples(sample, dtype), y_samples),
        y_samples,
    )


def _pack(kind: str, *sizes: Any, weight: BlockSparse, bias: Tensor | None, activation: str) -> Any:
    """A packed layer of the weight's dtype, which copies weight and bias."""
    make = getattr(cpu.native, kind + DTYPES[weight.values.dtype])
    index = (weight.row_ptr.data_ptr(), weight.col_idx.data_ptr(), weight.col_idx.shape[0])
    bias = None if bias is None else bias.float()
    pointer = 0 if bias is None else bias.data_ptr()
    return make(*sizes, weight.values.data_ptr(), *index, pointer, cpu.native.ACTIVATIONS[activation])


def _like(residual: Tensor, shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """The residual as the kernel reads it: shape, dtype and memory format of the output."""
    if residual.shape != shape:
        residual = residual.expand(*shape)
    if residual.dtype is not dtype or not residual.is_cpu:
        raise TypeError(f"sparsekd.freeze: expected a {_name(dtype)} residual on the CPU, got {residual.dtype}")
    return residual if residual.is_contiguous(memory_format=layout) else residual.contiguous(memory_format=layout)


def _wrong_input(x: Tensor, want: tuple[Any, ...], dtype: torch.dtype) -> Exception:
    wanted, got = ", ".join(map(str, want)), f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
    message = f"sparsekd.freeze: a frozen layer expected {_name(dtype)} [{wanted}] on the CPU, got {got}"
    if x.dtype != dtype or not x.is_cpu:
        return TypeError(f"{message}; leave autocast and give it the kind of input it was frozen with")
    return ValueError(f"{message}; give it what the layer it stands for takes")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
