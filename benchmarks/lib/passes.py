"""The passes of one layer that `benchmarks.conv2d` times: ours, called as a frozen model and autograd call them (the
compiled module directly), and their dense peers in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.shapes import Conv, Linear
from sparsekd import _C, BlockPattern, BlockSparse
from sparsekd.freeze import quantize

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Pass:
    ours: Call
    peers: dict[str, Call]  # dense torch, by type
    comparable: Callable[[Tensor], Tensor] = Tensor.float  # what ours and a peer's result are compared as


@dataclass(frozen=True)
class Dtype:
    block: tuple[int, int]
    bytes: int
    peak: str  # of _C.peak_gflops
    tolerance: float  # difference from dense torch over its largest output


DTYPES = {
    "float32": Dtype((16, 1), 4, "float32", 1e-4),
    "bf16": Dtype((16, 2), 2, "bfloat16", 0.01),
    "int8": Dtype((16, 4), 1, "int8", 0.05),
}
_PACKED: dict[torch.dtype, Any] = {
    torch.float32: ("fp32", _C.PackedConv2d, _C.PackedLinear),
    torch.bfloat16: ("bf16", _C.PackedConv2dBf16, _C.PackedLinearBf16),
}


def passes(dtype: str, layer: Conv | Linear, batch: int, density: float) -> tuple[BlockSparse, dict[str, Pass]]:
    """The layer's random weight, and "forward", "grad_input" and "grad_values" (float32 only) over a random input."""
    torch.manual_seed(0)
    dense, pattern = torch.randn(layer.weight), BlockPattern(*DTYPES[dtype].block)
    blocks = BlockSparse.from_dense(dense, pattern, mask=torch.rand(pattern.grid(layer.weight)) < density)
    x = torch.randn(batch, *layer.input)
    if dtype == "int8":
        assert isinstance(layer, Conv)
        return blocks, _conv2d_int8(layer, blocks, x)
    if dtype == "bf16":
        blocks, x = replace(blocks, values=blocks.values.bfloat16()), x.bfloat16()
    return blocks, _conv2d(layer, blocks, x) if isinstance(layer, Conv) else _linear(blocks, x)


def _conv2d(layer: Conv, blocks: BlockSparse, x: Tensor) -> dict[str, Pass]:
    """In channels_last, oneDNN's best format."""
    name, packed_conv2d, _ = _PACKED[x.dtype]
    x, weight = _channels_last(x), _channels_last(blocks.to_dense())
    stride, pad, threads = (layer.stride,) * 2, (layer.kernel // 2,) * 2, torch.get_num_threads()
    shape = _C.Conv2dShape(x.shape, len(weight), weight.shape[2:], stride, pad, block=blocks.values.shape[1:])
    dy = _channels_last(torch.randn(len(x), len(weight), shape.p, shape.q, dtype=x.dtype))
    y, dx, dvalues = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(blocks.values)
    index = blocks.row_ptr.data_ptr(), blocks.col_idx.data_ptr(), len(blocks.values)
    packed = packed_conv2d(shape, blocks.values.data_ptr(), *index)

    def forward() -> Tensor:
        packed.run(x.data_ptr(), True, 0, y.data_ptr(), True, threads)
        return y

    def grad_input() -> Tensor:
        _C.conv2d_grad_input_f32(
            shape, dy.data_ptr(), True, blocks.values.data_ptr(), *index, dx.data_ptr(), True, threads
        )
        return dx

    def grad_values() -> Tensor:
        _C.conv2d_grad_values_f32(shape, x.data_ptr(), True, dy.data_ptr(), True, *index, dvalues.data_ptr(), threads)
        return dvalues

    def backward(i: int) -> Tensor:
        wanted = [i == 0, i == 1, False]
        return torch.ops.aten.convolution_backward(dy, x, weight, None, stride, pad, (1, 1), False, (0, 0), 1, wanted)[
            i
        ]

    found = {"forward": Pass(forward, {name: lambda: F.conv2d(x, weight, None, stride, pad)})}
    if x.dtype == torch.float32:
        found["grad_input"] = Pass(grad_input, {name: lambda: backward(0)})
        found["grad_values"] = Pass(grad_values, {name: lambda: backward(1)}, _kept(blocks))
    return found


def _linear(blocks: BlockSparse, x: Tensor) -> dict[str, Pass]:
    """The peers are F.linear and the two products of its backward pass."""
    name, _, packed_linear = _PACKED[x.dtype]
    weight, threads, batch = blocks.to_dense(), torch.get_num_threads(), len(x)
    (outputs, inputs), (bh, bw) = weight.shape, blocks.values.shape[1:]
    dy = torch.randn(batch, outputs, dtype=x.dtype)
    y, dx, dvalues = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(blocks.values)
    index = blocks.row_ptr.data_ptr(), blocks.col_idx.data_ptr(), len(blocks.values)
    packed = packed_linear(inputs, outputs, bh, bw, blocks.values.data_ptr(), *index)

    def forward() -> Tensor:
        packed.run(x.data_ptr(), batch, 0, y.data_ptr(), threads)
        return y

    def grad_input() -> Tensor:
        _C.linear_grad_input_f32(
            dy.data_ptr(), batch, outputs, blocks.values.data_ptr(), *index, bh, bw, dx.data_ptr(), inputs, threads
        )
        return dx

    def grad_values() -> Tensor:
        _C.linear_grad_values_f32(
            x.data_ptr(), batch, inputs, dy.data_ptr(), outputs, *index, bh, bw, dvalues.data_ptr(), threads
        )
        return dvalues

    found = {"forward": Pass(forward, {name: lambda: F.linear(x, weight)})}
    if x.dtype == torch.float32:
        found["grad_input"] = Pass(grad_input, {name: lambda: dy @ weight})
        found["grad_values"] = Pass(grad_values, {name: lambda: dy.T @ x}, _kept(blocks))
    return found


def _conv2d_int8(layer: Conv, blocks: BlockSparse, x: Tensor) -> dict[str, Pass]:
    """u8 in and out, ours and torch's quantised convolution; torch's fp32 and bf16 beside it."""
    x, dense = _channels_last(x), _channels_last(blocks.to_dense())
    stride, pad = (layer.stride,) * 2, (layer.kernel // 2,) * 2
    exact = F.conv2d(x, dense, None, stride, pad)
    scale_x, scale_y = (quantize.ByteScale.of_range(*(v.item() for v in t.aminmax())) for t in (x, exact))
    ours = quantize.quantize_layer(
        blocks, None, scale_x, y=scale_y, image=(layer.size, layer.size), stride=stride, padding=pad
    )
    _, weight_scale = quantize.quantize_weight(blocks)
    per_channel = weight_scale.double(), torch.zeros(len(weight_scale), dtype=torch.long)
    packed = torch.ops.quantized.conv2d_prepack(
        torch.quantize_per_channel(dense, *per_channel, 0, torch.qint8), None, stride, pad, (1, 1), 1
    )
    bytes_x, quantized_x = scale_x.quantize(x), torch.quantize_per_tensor(x, scale_x.scale, scale_x.zero, torch.quint8)
    half_x, half_dense = x.bfloat16(), _channels_last(dense.bfloat16())
    peers: dict[str, Call] = {
        "fp32": lambda: F.conv2d(x, dense, None, stride, pad),
        "bf16": lambda: F.conv2d(half_x, half_dense, None, stride, pad),
        "int8": lambda: torch.ops.quantized.conv2d(quantized_x, packed, scale_y.scale, scale_y.zero),
    }

    def real(y: Tensor) -> Tensor:
        return y.dequantize() if y.is_quantized else scale_y.dequantize(y) if y.dtype == torch.uint8 else y.float()

    return {"forward": Pass(lambda: ours(bytes_x), peers, real)}


def _kept(blocks: BlockSparse) -> Callable[[Tensor], Tensor]:
    """The kept blocks of a gradient of the dense weight; ours is those alone."""
    mask = blocks.mask()
    return lambda g: g if g.dim() == 3 else BlockSparse.from_dense(g, blocks.pattern, mask=mask).values


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)
