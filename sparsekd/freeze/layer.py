"""One frozen layer: the seam between a network and the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import cpu
from ..blocks import BlockPattern, BlockSparse
from .plan import Geometry

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

DTYPES = {torch.float32: "", torch.bfloat16: "Bf16"}  # of the compiled kernels -> the end of their names

Run = Callable[..., Tensor]  # run(x, residual=None, reuse=False)


@dataclass(frozen=True)
class Step:
    """A layer of ours as a part of ``_C.Network``.

    add(network, x, x_channels_last, residual, y) appends it; the operands number values. any_format: it reads maps in
    either memory format.
    """

    add: Callable[[Any, int, bool, int, int], None]
    x: Samples
    y: Samples
    any_format: bool = False


@dataclass(frozen=True)
class Samples:
    """What a tensor has to be: any number of samples of one shape, in a dtype and memory format."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format

    @property
    def bytes(self) -> int:
        """Of one sample."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, n: int) -> Tensor:
        return torch.empty((n, *self.shape), dtype=self.dtype, device="cpu", memory_format=self.layout)


class FrozenLayer(nn.Module):
    """``act(conv(x) + bias + residual)``, or pooling, by torch or by ``sparsekd._C``: buffers for files, ``run`` for
    speed, and ``step``, where it is ours, for chains of layers (chain.py).

    ``run(x, residual=None, reuse=False)`` is a closure over all it needs: attribute look-ups of nn.Module would cost
    more than the call itself. reuse: nobody reads the residual again, so the result may take its memory.
    """

    step: Step | None = None

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor | BlockSparse,
        bias: Tensor | None,
        *,
        chosen: str,
        memory_format: str,
        threads: int | None,
    ) -> None:
        super().__init__()
        if isinstance(weight, BlockSparse):
            values, row_ptr, col_idx = (x.contiguous() for x in (weight.values, weight.row_ptr, weight.col_idx))
            weight = replace(weight, values=values, row_ptr=row_ptr, col_idx=col_idx)
        bias = None if bias is None else bias.contiguous()
        self.geometry, self.chosen, self.memory_format, self.threads = geometry, chosen, memory_format, threads
        self.pattern = weight.pattern if isinstance(weight, BlockSparse) else None
        self._mask = weight.mask() if isinstance(weight, BlockSparse) else None
        self.register_buffer("bias", bias)
        self.run: Run
        if isinstance(weight, BlockSparse) and chosen == "sparse":
            for name in ("values", "row_ptr", "col_idx"):
                self.register_buffer(name, getattr(weight, name))
            self.run, self.step = _packed(geometry, weight, bias, memory_format, threads)
        else:
            dense = weight.to_dense() if isinstance(weight, BlockSparse) else weight
            layout = FORMATS[memory_format] if geometry.kind == "conv2d" else torch.contiguous_format
            self.register_buffer("weight", dense.contiguous(memory_format=layout))
            if chosen == "native":
                self.run, self.step = _packed(geometry, dense.contiguous(), bias, memory_format, threads)
            else:
                self.run = _dense(geometry, self.get_buffer("weight"), bias, memory_format)

    def forward(self, x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        return self.run(x, residual, reuse)

    def tensors(self) -> dict[str, Tensor | None]:
        """What a file keeps: the kept blocks of a block-sparse layer, also where dense was chosen, else the weight."""
        state = dict(self.named_buffers())
        if self.pattern is not None and self.chosen != "sparse":
            blocks = BlockSparse.from_dense(state.pop("weight"), self.pattern, mask=self._mask)
            state |= {"values": blocks.values, "row_ptr": blocks.row_ptr, "col_idx": blocks.col_idx}
        return {"bias": None, **state}

    def extra_repr(self) -> str:
        return f"{self.geometry}, fused={self.geometry.fused or None}, {self.chosen}"


def _dense(geometry: Geometry, weight: Tensor, bias: Tensor | None, memory_format: str) -> Run:
    if geometry.kind == "linear":
        return _dense_linear(geometry, weight, bias)
    if geometry.kind == "norm":
        return _dense_norm(geometry, weight, bias)
    if geometry.pool:
        return _torch_pool(geometry)
    onednn = memory_format == "channels_last" and _has_onednn(weight.dtype)
    return (_onednn_conv2d if onednn else _torch_conv2d)(geometry, weight, bias)


def _packed(
    geometry: Geometry, weight: Tensor | BlockSparse, bias: Tensor | None, memory_format: str, threads: int | None
) -> tuple[Run, Step | None]:
    """A dense weight is a block-sparse one that has every block, unless it is that of a depthwise convolution."""
    if geometry.pool or geometry.depthwise:
        assert isinstance(weight, Tensor)
        kernel = _pool_kernel(geometry, weight.dtype) if geometry.pool else _depthwise_kernel(geometry, weight, bias)
        return _packed_conv2d(geometry, kernel, weight.dtype, memory_format, threads)
    if isinstance(weight, Tensor):
        weight = BlockSparse.from_dense(weight, BlockPattern.for_device("cpu", weight.dtype))
    if geometry.kind == "linear":
        return _packed_linear(geometry, weight, bias, threads)
    kernel = _sparse_kernel(geometry, weight, bias, memory_format == "channels_last")
    return _packed_conv2d(geometry, kernel, weight.values.dtype, memory_format, threads)


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


def _dense_norm(geometry: Geometry, scale: Tensor, shift: Tensor | None) -> Run:
    assert shift is not None
    scale, shift, activate = scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1), _IN_PLACE[geometry.activation]

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        return activate(torch.addcmul(shift, x, scale))

    return run


def _torch_pool(geometry: Geometry) -> Run:
    taps, flat = geometry.weight[2:], geometry.flat
    if geometry.kind == "max":
        sizes = (taps, geometry.stride, geometry.padding, geometry.dilation)
        return lambda x, residual=None, reuse=False: F.max_pool2d(x, *sizes)
    if taps == geometry.input[2:]:
        return lambda x, residual=None, reuse=False: x.mean((2, 3), keepdim=not flat)
    return lambda x, residual=None, reuse=False: F.avg_pool2d(x, taps, geometry.stride, geometry.padding)


def _dense_linear(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Run:
    activate, linear = _IN_PLACE[geometry.activation], F.linear

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        y = linear(x, weight, bias)
        if residual is not None:
            y.add_(residual)
        return activate(y)

    return run


def _shape(geometry: Geometry, block: tuple[int, int] = (1, 1)) -> Any:
    return cpu.native.Conv2dShape(
        (1, geometry.input[1], *geometry.padded_image), geometry.weight[0], geometry.weight[2:] or (1, 1),
        geometry.stride, geometry.padding, geometry.dilation, geometry.groups, block,
    )  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A packed layer of ``_C`` behind one signature: run(x, x_channels_last, residual, y, threads, n), add as Step."""

    run: Callable[[int, bool, int, int, int, int], None]
    add: Callable[[Any, int, bool, int, int], None]
    any_format: bool = False


def _sparse_kernel(geometry: Geometry, weight: BlockSparse, bias: Tensor | None, last: bool) -> Kernel:
    shape = _shape(geometry, (weight.pattern.bh, weight.pattern.bw))
    packed = _pack("PackedConv2d", shape, weight=weight, bias=bias, activation=geometry.activation)
    run = packed.run
    return Kernel(
        lambda x, x_last, residual, y, threads, n: run(x, x_last, residual, y, last, threads, n),
        lambda network, x, x_last, residual, y: network.add(packed, x, x_last, residual, y, last),
        any_format=True,
    )


def _depthwise_kernel(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Kernel:
    """A batch norm is the 1 x 1 case."""
    pointers = (weight.data_ptr(), 0 if bias is None else bias.data_ptr())
    packed = cpu.native.PackedDepthwise(_shape(geometry), *pointers, cpu.native.ACTIVATIONS[geometry.activation])
    run = packed.run
    return Kernel(
        lambda x, x_last, residual, y, threads, n: run(x, residual, y, threads, n),
        lambda network, x, x_last, residual, y: network.add(packed, x, residual, y),
    )


def _pool_kernel(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    packed = cpu.native.Pool(_shape(geometry), geometry.kind == "mean", _name(dtype))
    run = packed.run
    return Kernel(
        lambda x, x_last, residual, y, threads, n: run(x, y, threads, n),
        lambda network, x, x_last, residual, y: network.add(packed, x, y),
    )


def _packed_conv2d(
    geometry: Geometry, kernel: Kernel, dtype: torch.dtype, memory_format: str, threads: int | None
) -> tuple[Run, Step | None]:
    """A direct call of the compiled kernel, which reads and writes raw memory: what it cannot check is checked here."""
    image, out = (geometry.input[1], *geometry.padded_image), geometry.output
    layout = FORMATS[memory_format]
    (other,) = set(FORMATS.values()) - {layout}
    out_layout = layout if len(out) == 3 else torch.contiguous_format
    pad, pad_mode, last = geometry.pad, geometry.pad_mode, memory_format == "channels_last"
    call, any_format, empty, torch_threads = kernel.run, kernel.any_format, torch.empty, torch.get_num_threads

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        if pad is not None:
            x = F.pad(x, pad, pad_mode)
        if x.shape[1:] != image or x.dtype is not dtype or not x.is_cpu:
            raise _wrong_input(x, ("N", *image), dtype)
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
    return run, Step(kernel.add, Samples(image, dtype, layout), Samples(out, dtype, out_layout), any_format)


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
    return run, Step(
        lambda network, x, x_last, residual, y: network.add(packed, rows, x, residual, y),
        Samples(sample, dtype),
        Samples(geometry.output, dtype),
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
    return ValueError(f"{message}; freeze again with an example of this image size")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
