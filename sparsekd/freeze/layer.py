"""One frozen layer: the seam between a network and the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import cpu
from ..blocks import BlockSparse
from .plan import Geometry

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Run = Callable[..., Tensor]  # run(x, residual=None, reuse=False)


class FrozenLayer(nn.Module):
    """``act(conv(x) + bias + residual)`` by torch or by ``sparsekd._C``: buffers for files, ``run`` for speed.

    ``run(x, residual=None, reuse=False)`` is a closure over all it needs: attribute look-ups of nn.Module would cost
    more than the call itself. reuse: nobody reads the residual again, so the result may take its memory.
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
            onednn = memory_format == "channels_last" and _has_onednn(dense.dtype)
            conv2d = _onednn_conv2d if onednn else _torch_conv2d
            self.run = (conv2d if conv else _dense_linear)(geometry, dense, bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        return self.run(x, residual, reuse)

    def tensors(self) -> dict[str, Tensor | None]:
        """What a file keeps: the kept blocks of a block-sparse layer, also where dense was chosen, else the weight."""
        state = dict(self.named_buffers())
        if self.pattern is not None and not self.sparse:
            blocks = BlockSparse.from_dense(state.pop("weight"), self.pattern, mask=self._mask)
            state |= {"values": blocks.values, "row_ptr": blocks.row_ptr, "col_idx": blocks.col_idx}
        return {"bias": None, **state}

    def extra_repr(self) -> str:
        return f"{self.geometry}, fused={self.geometry.fused or None}, {'sparse' if self.sparse else 'dense'}"


_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu_,
    "relu6": partial(F.hardtanh_, min_val=0.0, max_val=6.0),
    "silu": partial(F.silu, inplace=True),
}


def _torch_conv2d(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Run:
    arguments = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    pad, pad_mode, activate, conv2d = geometry.pad, geometry.pad_mode, _IN_PLACE[geometry.activation], F.conv2d

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        if pad is not None:
            x = F.pad(x, pad, pad_mode)
        y = conv2d(x, weight, bias, *arguments)
        if residual is not None:
            y.add_(residual)
        return activate(y)

    return run


# Activations as oneDNN knows them: its name and numbers.
_ONEDNN: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
}


def _onednn_conv2d(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Run:
    """The calls torch.compile makes: the weight lies in oneDNN's own layout and the epilogue is fused.

    F.conv2d brings the weight into that layout at every call: half of the time of a 7 x 7 layer of ResNet-50.
    """
    plain = _torch_conv2d(geometry, weight, bias)
    sizes = (geometry.padding, geometry.stride, geometry.dilation, geometry.groups)
    n, channels = geometry.input[:2]
    ops = torch.ops.mkldnn
    packed = ops._reorder_convolution_weight(weight, *sizes, [n, channels, *geometry.padded_image])
    conv2d, conv2d_add = ops._convolution_pointwise.default, ops._convolution_pointwise.binary
    conv2d_add_to, layout = ops._convolution_pointwise_.binary, torch.channels_last
    numbers = (*_ONEDNN[geometry.activation], "")
    # Behind an add only ReLU is fused; others follow in place.
    relu, after = (
        ("relu", _IN_PLACE["none"]) if geometry.activation == "relu" else (None, _IN_PLACE[geometry.activation])
    )
    pad, pad_mode, out = geometry.pad, geometry.pad_mode, (weight.shape[0], *geometry.output_image)
    image = (channels, *geometry.input[2:])

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        if not x.shape[0] or x.shape[1:] != image:
            return plain(x, residual)
        if pad is not None:
            x = F.pad(x, pad, pad_mode)
        if residual is None:
            return conv2d(x, packed, bias, *sizes, *numbers)
        if residual.shape != (x.shape[0], *out):
            residual = residual.expand(x.shape[0], *out)
        if reuse and residual.is_contiguous(memory_format=layout):
            return after(conv2d_add_to(residual, x, packed, bias, *sizes, "add", 1.0, relu, [], ""))
        return after(conv2d_add(x, residual, packed, bias, *sizes, "add", 1.0, relu, [], ""))

    return run


def _has_onednn(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_convolution_pointwise_"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def _dense_linear(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Run:
    activate, linear = _IN_PLACE[geometry.activation], F.linear

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        y = linear(x, weight, bias)
        if residual is not None:
            y.add_(residual)
        return activate(y)

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
    packed = cpu.native.PackedConv2d(shape, *_pointers(weight, bias), cpu.native.ACTIVATIONS[geometry.activation]).run
    image, out, layout = (channels, h, w), (k, *geometry.output_image), FORMATS[memory_format]
    pad, pad_mode, last, float32 = geometry.pad, geometry.pad_mode, memory_format == "channels_last", torch.float32
    empty, torch_threads = torch.empty, torch.get_num_threads

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        if pad is not None:
            x = F.pad(x, pad, pad_mode)
        if x.shape[1:] != image or x.dtype is not float32 or not x.is_cpu:
            raise _wrong_input(x, ("N", *image))
        if not x.is_contiguous(memory_format=layout):
            x = x.contiguous(memory_format=layout)
        n = x.shape[0]
        add = 0
        if residual is not None:
            residual = _like(residual, (n, *out), layout)
            add = residual.data_ptr()
        y = residual if reuse and residual is not None else empty((n, *out), dtype=float32, memory_format=layout)
        packed(x.data_ptr(), last, add, y.data_ptr(), last, threads or torch_threads(), n)
        return y

    return run


def _packed_linear(
    geometry: Geometry, weight: BlockSparse, bias: Tensor | None, memory_format: str, threads: int | None
) -> Run:
    out_features, in_features = weight.shape
    block = (weight.pattern.bh, weight.pattern.bw)
    packed = cpu.native.PackedLinear(
        in_features, out_features, *block, *_pointers(weight, bias), cpu.native.ACTIVATIONS[geometry.activation]
    ).run
    float32, empty, torch_threads = torch.float32, torch.empty, torch.get_num_threads

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        *batch, features = x.shape
        if features != in_features or x.dtype is not float32 or not x.is_cpu:
            raise _wrong_input(x, ("...", in_features))
        x = x.contiguous()
        y = empty((*batch, out_features), dtype=float32)
        add = 0
        if residual is not None:
            residual = _like(residual, y.shape, torch.contiguous_format)
            add = residual.data_ptr()
        packed(x.data_ptr(), math.prod(batch), add, y.data_ptr(), threads or torch_threads())
        return y

    return run


def _pointers(weight: BlockSparse, bias: Tensor | None) -> tuple[int, int, int, int, int]:
    """(values, row_ptr, col_idx, nnzb, bias) for a packed layer, which copies what they point to."""
    index = (weight.row_ptr.data_ptr(), weight.col_idx.data_ptr(), weight.col_idx.shape[0])
    return weight.values.data_ptr(), *index, 0 if bias is None else bias.data_ptr()


def _like(residual: Tensor, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    """The residual as the kernel reads it: shape, dtype and memory format of the output."""
    if residual.shape != shape:
        residual = residual.expand(*shape)
    if residual.dtype is not torch.float32 or not residual.is_cpu:
        raise TypeError(f"sparsekd.freeze: expected a float32 residual on the CPU, got {residual.dtype}")
    return residual if residual.is_contiguous(memory_format=layout) else residual.contiguous(memory_format=layout)


def _wrong_input(x: Tensor, want: tuple[Any, ...]) -> Exception:
    wanted, got = ", ".join(map(str, want)), f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
    message = f"sparsekd.freeze: a frozen layer expected float32 [{wanted}] on the CPU, got {got}"
    if x.dtype != torch.float32 or not x.is_cpu:
        return TypeError(f"{message}; leave autocast and give it the kind of input it was frozen with")
    return ValueError(f"{message}; freeze again with an example of this image size")
