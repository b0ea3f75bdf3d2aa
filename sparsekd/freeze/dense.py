"""Frozen layers by torch: a closure for each kind of layer, oneDNN's fused calls where they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import Run
from .plan import Geometry


def torch_run(geometry: Geometry, weight: Tensor, bias: Tensor | None, memory_format: str) -> Run:
    if geometry.kind == "linear":
        return dense_linear(geometry, weight, bias)
    if geometry.kind == "conv_transpose2d":
        sizes = (geometry.stride, geometry.padding, geometry.output_padding, geometry.groups, geometry.dilation)
        return with_epilogue(geometry, lambda x: F.conv_transpose2d(x, weight, bias, *sizes))
    if geometry.kind == "norm":
        return dense_norm(geometry, weight, bias)
    if geometry.pool:
        return torch_pool(geometry)
    onednn = memory_format == "channels_last" and _has_onednn(weight.dtype)
    return (_onednn_conv2d if onednn else torch_conv2d)(geometry, weight, bias)


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu_,
    "relu6": partial(F.hardtanh_, min_val=0.0, max_val=6.0),
    "silu": partial(F.silu, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
    "hardsigmoid": partial(F.hardsigmoid, inplace=True),
    "sigmoid": torch.sigmoid_,
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": partial(torch.ops.aten.gelu_.default, approximate="tanh"),
}


def torch_conv2d(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Run:
    steps = geometry.walk.steps
    pad, pad_mode, activate, conv2d = geometry.pad, geometry.pad_mode, IN_PLACE[geometry.activation], F.conv2d

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        if pad is not None:
            x = F.pad(x, pad, pad_mode)
        y = conv2d(x, weight, bias, *steps)
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
    "hardswish": ("hardswish", []),
    "sigmoid": ("sigmoid", []),
}


def _onednn_conv2d(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Run:
    """The calls torch.compile makes: the weight lies in oneDNN's own layout and the epilogue is fused.

    F.conv2d brings the weight into that layout at every call: half of the time of a 7 x 7 layer of ResNet-50.
    """
    plain = torch_conv2d(geometry, weight, bias)
    sizes = (geometry.padding, geometry.stride, geometry.dilation, geometry.groups)
    n, channels = geometry.input[:2]
    ops = torch.ops.mkldnn
    packed = ops._reorder_convolution_weight(weight, *sizes, [n, channels, *geometry.padded_image])
    conv2d, conv2d_add = ops._convolution_pointwise.default, ops._convolution_pointwise.binary
    conv2d_add_to, layout = ops._convolution_pointwise_.binary, torch.channels_last
    known = geometry.activation in _ONEDNN
    numbers = (*_ONEDNN[geometry.activation if known else "none"], "")
    rest = IN_PLACE["none" if known else geometry.activation]
    # Behind an add only ReLU is fused; others follow in place. torch has none in bfloat16 for a new tensor where oneDNN
    # does not do the add, as of grouped convolutions.
    relu, after = ("relu", IN_PLACE["none"]) if geometry.activation == "relu" else (None, IN_PLACE[geometry.activation])
    fuses = weight.dtype == torch.float32 or geometry.groups == 1
    new_relu, new_after = (relu, after) if fuses else (None, IN_PLACE[geometry.activation])
    pad, pad_mode, out = geometry.pad, geometry.pad_mode, (weight.shape[0], *geometry.output_image)
    image = (channels, *geometry.input[2:])

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        if not x.shape[0] or x.shape[1:] != image:
            return plain(x, residual)
        if pad is not None:
            x = F.pad(x, pad, pad_mode)
        if residual is None:
            return rest(conv2d(x, packed, bias, *sizes, *numbers))
        if residual.shape != (x.shape[0], *out):
            residual = residual.expand(x.shape[0], *out)
        if reuse and residual.is_contiguous(memory_format=layout):
            return after(conv2d_add_to(residual, x, packed, bias, *sizes, "add", 1.0, relu, [], ""))
        return new_after(conv2d_add(x, residual, packed, bias, *sizes, "add", 1.0, new_relu, [], ""))

    return run


def _has_onednn(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_convolution_pointwise_"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def dense_norm(geometry: Geometry, scale: Tensor, shift: Tensor | None) -> Run:
    assert shift is not None
    scale, shift, activate = scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1), IN_PLACE[geometry.activation]

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        return activate(torch.addcmul(shift, x, scale))

    return run


def torch_pool(geometry: Geometry) -> Run:
    taps, flat = geometry.weight[2:], geometry.flat
    if geometry.whole:
        return lambda x, residual=None, reuse=False: x.mean((2, 3), keepdim=not flat)
    sizes = (taps, geometry.stride, geometry.padding)
    pool = partial(F.max_pool2d, dilation=geometry.dilation) if geometry.kind == "max" else F.avg_pool2d

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        y = pool(x, *sizes)
        return y.flatten(1) if flat else y

    return run


def dense_linear(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Run:
    linear = F.linear
    return with_epilogue(geometry, lambda x: linear(x, weight, bias))


def with_epilogue(geometry: Geometry, compute: Callable[[Tensor], Tensor]) -> Run:
    """What ``compute`` gives, a fresh tensor, plus the residual, activated in place."""
    activate = IN_PLACE[geometry.activation]

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        y = compute(x)
        if residual is not None:
            y.add_(residual)
        return activate(y)

    return run
