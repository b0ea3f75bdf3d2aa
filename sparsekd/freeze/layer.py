"""One frozen layer: the seam between a network and the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import cpu
from ..blocks import BlockSparse
from .plan import Geometry

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Run = Callable[..., Tensor]  # run(x, residual=None)


class FrozenLayer(nn.Module):
    """``act(conv(x) + bias + residual)`` by torch or by ``sparsekd._C``: buffers for files, ``run`` for speed.

    ``run(x, residual=None)`` is a closure over all it needs: attribute look-ups of nn.Module would cost more than the
    call itself.
    """

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor | BlockSparse,
        bias: Tensor | None,
        *,
        sparse: bool,
        memory_format: str,
        threads: int | None,
    ) -> None:
        super().__init__()
        if isinstance(weight, BlockSparse):
            values, row_ptr, col_idx = (x.contiguous() for x in (weight.values, weight.row_ptr, weight.col_idx))
            weight = replace(weight, values=values, row_ptr=row_ptr, col_idx=col_idx)
        bias = None if bias is None else bias.contiguous()
        self.geometry, self.sparse = geometry, sparse
        self.pattern = weight.pattern if isinstance(weight, BlockSparse) else None
        self._mask = weight.mask() if isinstance(weight, BlockSparse) else None
        self.register_buffer("bias", bias)
        conv = geometry.kind == "conv2d"
        self.run: Run
        if sparse:
            assert isinstance(weight, BlockSparse)
            for name in ("values", "row_ptr", "col_idx"):
                self.register_buffer(name, getattr(weight, name))
            self.run = (_packed_conv2d if conv else _packed_linear)(geometry, weight, bias, memory_format, threads)
        else:
            dense = weight.to_dense() if isinstance(weight, BlockSparse) else weight
            dense = dense.contiguous(memory_format=FORMATS[memory_format]) if conv else dense.contiguous()
            self.register_buffer("weight", dense)
            self.run = (_dense_conv2d if conv else _dense_linear)(geometry, dense, bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.run(x, residual)

    def tensors(self) -> dict[str, Tensor | None]:
        """What a file keeps: the kept blocks of a block-sparse layer, also where dense was chosen, else the weight."""
        state = dict(self.named_buffers())
        if self.pattern is not None and not self.sparse:
            blocks = BlockSparse.from_dense(state.pop("weight"), self.pattern, mask=self._mask)
            state |= {"values": blocks.values, "row_ptr": blocks.row_ptr, "col_idx": blocks.col_idx}
        return {"bias": None, **state}

    def extra_repr(self) -> str:
        return f"{self.geometry}, fused={self.geometry.fused or None}, {'sparse' if self.sparse else 'dense'}"


def _dense_conv2d(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Run:
    arguments = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    pad, pad_mode, relu, conv2d = geometry.pad, geometry.pad_mode, geometry.relu, F.conv2d

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if pad is not None:
            x = F.pad(x, pad, pad_mode)
        y = conv2d(x, weight, bias, *arguments)
        if residual is not None:
            y.add_(residual)
        return y.relu_() if relu else y

    return run


def _dense_linear(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Run:
    relu, linear = geometry.relu, F.linear

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        if residual is not None:
            y.add_(residual)
        return y.relu_() if relu else y

    return run


def _packed_conv2d(
    geometry: Geometry, weight: BlockSparse, bias: Tensor | None, memory_format: str, threads: int | None
) -> Run:
    """A direct call of the compiled kernel, which reads and writes raw memory: what it cannot check is checked here."""
    k, _, r, s = weight.shape
    channels, (h, w) = geometry.input[1], geometry.padded_image
    (stride_h, stride_w), (pad_h, pad_w) = geometry.stride, geometry.padding
    shape = cpu.native.Conv2dShape(
        n=1, c=channels, h=h, w=w, k=k, r=r, s=s, stride_h=stride_h, stride_w=stride_w, pad_h=pad_h, pad_w=pad_w,
        dil_h=geometry.dilation[0], dil_w=geometry.dilation[1], groups=geometry.groups,
        bh=weight.pattern.bh, bw=weight.pattern.bw,
    )  # fmt: skip
    packed = cpu.native.PackedConv2d(shape, *_pointers(weight, bias), int(geometry.relu)).run
    image, out, layout = (channels, h, w), (k, *geometry.output_image), FORMATS[memory_format]
    pad, pad_mode, last, float32 = geometry.pad, geometry.pad_mode, memory_format == "channels_last", torch.float32
    empty, torch_threads = torch.empty, torch.get_num_threads

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if pad is not None:
            x = F.pad(x, pad, pad_mode)
        if x.shape[1:] != image or x.dtype is not float32 or not x.is_cpu:
            raise _wrong_input(x, ("N", *image))
        if not x.is_contiguous(memory_format=layout):
            x = x.contiguous(memory_format=layout)
        n = x.shape[0]
        y = empty((n, *out), dtype=float32, memory_format=layout)
        add = 0
        if residual is not None:
            residual = _like(residual, y, layout)
            add = residual.data_ptr()
        packed(x.data_ptr(), last, add, y.data_ptr(), last, threads or torch_threads(), n)
        return y

    return run


def _packed_linear(
    geometry: Geometry, weight: BlockSparse, bias: Tensor | None, memory_format: str, threads: int | None
) -> Run:
    out_features, in_features = weight.shape
    block = (weight.pattern.bh, weight.pattern.bw)
    packed = cpu.native.PackedLinear(
        in_features, out_features, *block, *_pointers(weight, bias), int(geometry.relu)
    ).run
    float32, empty, torch_threads = torch.float32, torch.empty, torch.get_num_threads

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        *batch, features = x.shape
        if features != in_features or x.dtype is not float32 or not x.is_cpu:
            raise _wrong_input(x, ("...", in_features))
        x = x.contiguous()
        y = empty((*batch, out_features), dtype=float32)
        add = 0
        if residual is not None:
            residual = _like(residual, y, torch.contiguous_format)
            add = residual.data_ptr()
        packed(x.data_ptr(), math.prod(batch), add, y.data_ptr(), threads or torch_threads())
        return y

    return run


def _pointers(weight: BlockSparse, bias: Tensor | None) -> tuple[int, int, int, int, int]:
    """(values, row_ptr, col_idx, nnzb, bias) for a packed layer, which copies what they point to."""
    index = (weight.row_ptr.data_ptr(), weight.col_idx.data_ptr(), weight.col_idx.shape[0])
    return weight.values.data_ptr(), *index, 0 if bias is None else bias.data_ptr()


def _like(residual: Tensor, y: Tensor, layout: torch.memory_format) -> Tensor:
    """The residual as the kernel reads it: shape, dtype and memory format of the output."""
    if residual.shape != y.shape:
        residual = residual.expand_as(y)
    if residual.dtype != y.dtype or not residual.is_cpu:
        raise TypeError(f"sparsekd.freeze: expected a float32 residual on the CPU, got {residual.dtype}")
    return residual.contiguous(memory_format=layout)


def _wrong_input(x: Tensor, want: tuple[Any, ...]) -> Exception:
    wanted, got = ", ".join(map(str, want)), f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
    message = f"sparsekd.freeze: a frozen layer expected float32 [{wanted}] on the CPU, got {got}"
    if x.dtype != torch.float32 or not x.is_cpu:
        return TypeError(f"{message}; leave autocast and give it the kind of input it was frozen with")
    return ValueError(f"{message}; freeze again with an example of this image size")
