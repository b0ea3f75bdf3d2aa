"""The six ops on CUDA tensors. A linear layer is a convolution of one pixel a row; only its dense library differs.

Each op hands ``choose.run`` two ways to compute it: by a Triton tile, and by the dense library on some channels or all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.kernels.index import Weight

from ...ops.conv2d import Geometry, memory_format
from . import choose, cost, driver, plan
from .choose import Paths, uses_triton
from .device import aligned, on, on_that_of
from .masks import Channels, Mask, masks

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}


class Library(NamedTuple):
    """The dense library of a kind of layer, on maps: the weight is ``[K, C / groups, R, S]``, a linear one has 1x1."""

    conv: bool
    forward: Callable[[Tensor, Tensor, Tensor | None, Weight], Tensor]
    grad_input: Callable[[Tensor, Tensor, Tensor, Weight], Tensor]  # grad, something like x, dense weight
    grad_weight: Callable[[Tensor, Tensor, Tensor, Weight], Tensor]  # grad, x, something like the dense weight


class Fused(NamedTuple):
    """What a forward pass adds and applies to its products. The op itself has the bias alone."""

    bias: Tensor | None
    residual: Tensor | None
    activation: str | None


class Ready:
    """What `Mask.ready` keeps of a problem whose choice is a Triton tile: its launch, which skips the choosing."""

    def __init__(self, family: str, launch: Callable[..., Tensor], result: Tensor) -> None:
        self.family, self._launch = family, launch
        self._shape, self._strides = tuple(result.shape), result.stride()

    def suits(self, x: Tensor, conv: bool) -> bool:
        """Whether the launch may run now: not while candidates are timed, nor after torch's switch of tf32 moved."""
        return not plan.is_measuring() and (self.family == "half" or self.family == choose.family(x, conv))

    def __call__(self, x: Tensor, values: Tensor, *more: Tensor | None) -> Tensor:
        out = torch.empty_strided(self._shape, self._strides, dtype=x.dtype, device=x.device)
        return self.into(out, x, values, *more)

    def into(self, out: Tensor, *operands: Tensor | None) -> Tensor:
        with on_that_of(out):
            return self._launch(operands[0], operands[1], out, *operands[2:])


def _conv2d_forward(x: Tensor, dense: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
    return F.conv2d(x, dense, bias, *weight[5:])


def _conv2d_grad_input(grad: Tensor, like: Tensor, dense: Tensor, weight: Weight) -> Tensor:
    return _conv2d_gradients(grad, like, dense, weight, (True, False, False))[0]


def _conv2d_grad_weight(grad: Tensor, x: Tensor, like: Tensor, weight: Weight) -> Tensor:
    return _conv2d_gradients(grad, x, like, weight, (False, True, False))[1]


def _conv2d_gradients(grad: Tensor, x: Tensor, dense: Tensor, weight: Weight, wanted: tuple[bool, bool, bool]) -> Any:
    geometry = (weight.stride, weight.padding, weight.dilation, False, (0, 0), weight.groups)
    return torch.ops.aten.convolution_backward(grad, x, dense, None, *geometry, wanted)


def _linear_forward(x: Tensor, dense: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
    return _maps(F.linear(x.flatten(1), dense.flatten(1), bias))


def _linear_grad_input(grad: Tensor, like: Tensor, dense: Tensor, weight: Weight) -> Tensor:
    return _maps(grad.flatten(1) @ dense.flatten(1))


def _linear_grad_weight(grad: Tensor, x: Tensor, like: Tensor, weight: Weight) -> Tensor:
    return _maps(grad.flatten(1).T @ x.flatten(1))


CONV2D = Library(True, _conv2d_forward, _conv2d_grad_input, _conv2d_grad_weight)
LINEAR = Library(False, _linear_forward, _linear_grad_input, _linear_grad_weight)


# ---- The six ops


def linear(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    bias: Tensor | None,
    out_features: int,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(x W^T + bias + residual)``; the last two are for frozen models, the op itself has neither."""
    mask = masks.of(row_ptr, col_idx, out_features, x.shape[-1], values)
    fused = Fused(bias, None if residual is None else _rows(residual), activation)
    y = _forward(LINEAR, mask, _rows(x), values, fused, torch.channels_last)
    return y.reshape(*x.shape[:-1], out_features)


def linear_grad_input(grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, in_features: int) -> Tensor:
    mask = masks.of(row_ptr, col_idx, grad.shape[-1], in_features, values)
    rows = _rows(grad)
    dx = _grad_input(LINEAR, mask, rows, values, (rows.shape[0], in_features, 1, 1), torch.channels_last)
    return dx.reshape(*grad.shape[:-1], in_features)


def linear_grad_values(grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int) -> Tensor:
    out = torch.empty((col_idx.shape[0], bh, bw), dtype=x.dtype, device=x.device)
    mask = masks.of(row_ptr, col_idx, grad.shape[-1], x.shape[-1], out)
    return _grad_values(LINEAR, mask, _rows(grad), _rows(x), out, torch.channels_last)


def conv2d(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    bias: Tensor | None,
    out_channels: int,
    *fields: Any,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(conv(x) + bias + residual)``; the last two are for frozen models, the op itself has neither.

    fields: of a Geometry, in its order.
    """
    geometry = Geometry.of(*fields)
    mask = masks.of(row_ptr, col_idx, out_channels, x.shape[1] // geometry.groups, values, geometry)
    layout = memory_format(x)
    y = _forward(CONV2D, mask, x, values, Fused(bias, residual, activation), layout)
    return y.contiguous(memory_format=layout)


def conv2d_grad_input(
    grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, input_shape: Sequence[int], *fields: Any
) -> Tensor:
    geometry = Geometry.of(*fields)
    mask = masks.of(row_ptr, col_idx, grad.shape[1], input_shape[1] // geometry.groups, values, geometry)
    layout = memory_format(grad)
    dx = _grad_input(CONV2D, mask, grad, values, tuple(input_shape), layout)
    return dx.contiguous(memory_format=layout)


def conv2d_grad_values(
    grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int, *fields: Any
) -> Tensor:
    out = torch.empty((col_idx.shape[0], bh, bw), dtype=x.dtype, device=x.device)
    geometry = Geometry.of(*fields)
    mask = masks.of(row_ptr, col_idx, grad.shape[1], x.shape[1] // geometry.groups, out, geometry)
    return _grad_values(CONV2D, mask, grad, x, out, memory_format(x))


# ---- The three directions


def _forward(
    library: Library, mask: Mask, x: Tensor, values: Tensor, fused: Fused, layout: torch.memory_format
) -> Tensor:
    """layout: the memory format of a dense weight, where no kernel takes this one."""
    bias, residual, activation = fused
    key = ("forward", x.shape, x.dtype, values.dtype, bias is None, residual is None, activation)
    ready: Ready | None = mask.ready.get(key)
    if ready is None and choose.runs_dense(values, mask.weight, forward=True):
        return _forward_dense(library, mask, x, values, fused, layout, None)
    x, values, bias = _last(x), aligned(values.contiguous()), None if bias is None else aligned(bias.contiguous())
    residual = None if residual is None else _last(residual)
    if ready is not None and ready.suits(x, library.conv):
        return ready(x, values, bias, residual)
    shape, fused = _output_shape(mask.weight, x), Fused(bias, residual, activation)
    if not uses_triton():
        return native_forward(x, values, mask, _empty(x, shape), *fused)
    from sparsekd.kernels import conv2d as kernel

    family = choose.family(x, library.conv)

    def triton(tile: Any) -> Tensor:
        out = _empty(x, shape)
        table, precision = mask.table("forward", tile), _precision(family)
        options: Any = {"activation": activation, "precision": precision}
        launch = kernel.forward(x, values, table, mask.weight, tile, out, **options)
        mask.ready[key] = Ready(family, launch, out)
        return launch(x, values, out, bias, residual)

    def dense(kept: Channels | None) -> Tensor:
        return _forward_dense(library, mask, x, values, fused, torch.channels_last, kept)

    image = (int(shape[2]), int(shape[3]))
    return choose.run("forward", family, mask, values, shape[0], image, Paths(triton, dense))


def _forward_dense(
    library: Library,
    mask: Mask,
    x: Tensor,
    values: Tensor,
    fused: Fused,
    layout: torch.memory_format,
    kept: Channels | None,
) -> Tensor:
    weight, (bias, residual, activation) = mask.dense(values), fused
    if kept is None:
        y = library.forward(x, weight.contiguous(memory_format=layout), bias, mask.weight)
        return finish(y, residual, activation)
    some = library.forward(x.index_select(1, kept.inputs), weight[kept.outputs][:, kept.inputs], None, mask.weight)
    out = _empty(x, _output_shape(mask.weight, x))
    return finish(_spread(some, kept.outputs, out, bias), residual, activation)


def _grad_input(
    library: Library, mask: Mask, grad: Tensor, values: Tensor, shape: tuple[int, ...], layout: torch.memory_format
) -> Tensor:
    key = ("grad_input", grad.shape, grad.dtype, values.dtype, shape)
    ready = mask.ready.get(key)
    if ready is None and choose.runs_dense(values, mask.weight):
        return _grad_input_dense(library, mask, grad, values, shape, layout, None)
    grad, values = _last(grad), aligned(values.contiguous())
    if ready is not None and ready.suits(grad, library.conv):
        return ready(grad, values)
    from sparsekd.kernels import conv2d as kernel

    family = choose.family(grad, library.conv)

    def triton(tile: Any) -> Tensor:
        table, out = mask.table("grad_input", tile), _empty(grad, shape)
        launch = kernel.grad_input(grad, values, table, mask.weight, tile, out, precision=_precision(family))
        mask.ready[key] = Ready(family, launch, out)
        return launch(grad, values, out)

    def dense(kept: Channels | None) -> Tensor:
        return _grad_input_dense(library, mask, grad, values, shape, torch.channels_last, kept)

    image = (int(shape[2]), int(shape[3]))
    return choose.run("grad_input", family, mask, values, shape[0], image, Paths(triton, dense))


def _grad_input_dense(
    library: Library,
    mask: Mask,
    grad: Tensor,
    values: Tensor,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    kept: Channels | None,
) -> Tensor:
    weight = mask.dense(values)
    if kept is None:
        weight = weight.contiguous(memory_format=layout)
        return library.grad_input(grad, _empty(grad, shape, layout), weight, mask.weight)
    like, weight = _empty(grad, (shape[0], kept.inputs.shape[0], *shape[2:])), weight[kept.outputs][:, kept.inputs]
    some = library.grad_input(grad.index_select(1, kept.outputs), like, weight, mask.weight)
    return _spread(some, kept.inputs, _empty(grad, shape))


def _grad_values(
    library: Library, mask: Mask, grad: Tensor, x: Tensor, out: Tensor, layout: torch.memory_format
) -> Tensor:
    key = ("grad_values", grad.shape, x.shape, x.dtype, out.dtype)
    ready = mask.ready.get(key)
    if ready is None and choose.runs_dense(out, mask.weight):
        return _grad_values_dense(library, mask, grad, x, out, layout, None)
    x, grad = _last(x), _last(grad)
    if ready is not None and ready.suits(x, library.conv):
        return ready.into(out, grad, x)
    from sparsekd.kernels import conv2d as kernel

    family = choose.family(x, library.conv)

    def triton(tile: Any) -> Tensor:
        table = mask.table("grad_values", tile)
        launch = kernel.grad_values(grad, x, table, mask.weight, tile, out, precision=_precision(family))
        mask.ready[key] = Ready(family, launch, out)
        return launch(grad, x, out)

    def dense(kept: Channels | None) -> Tensor:
        return _grad_values_dense(library, mask, grad, x, out, torch.channels_last, kept)

    image = (grad.shape[2], grad.shape[3])
    return choose.run("grad_values", family, mask, out, x.shape[0], image, Paths(triton, dense))


def _grad_values_dense(
    library: Library,
    mask: Mask,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    layout: torch.memory_format,
    kept: Channels | None,
) -> Tensor:
    shape = (mask.weight.rows, mask.weight.cols, *mask.weight.kernel)
    if kept is None:
        return mask.pick(library.grad_weight(grad, x, _empty(x, shape, layout), mask.weight))
    like = _empty(x, (kept.outputs.shape[0], kept.inputs.shape[0], *mask.weight.kernel))
    narrow = grad.index_select(1, kept.outputs), x.index_select(1, kept.inputs)
    whole = out.new_zeros(shape)
    whole[kept.outputs[:, None], kept.inputs] = library.grad_weight(*narrow, like, mask.weight)
    return mask.pick(whole)


def native_forward(
    x: Tensor,
    values: Tensor,
    mask: Mask,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The forward pass in CUDA C++; all activations channels_last."""
    with on(x.device):
        pixels = out.shape[0] * out.shape[2] * out.shape[3]
        per_group = mask.weight.rows // mask.weight.groups
        tile = driver.tile_for(per_group, pixels, cost.of_device(x.device).processors)
        fused: Any = {"bias": bias, "residual": residual, "activation": activation}
        table = mask.table("forward", tile)
        return driver.gather_gemm(x, values, table, tile, out, stride=mask.weight.stride, **fused)


def has_epilogue(x: Tensor) -> bool:
    """Whether `epilogue` takes tensors like this one."""
    return uses_triton() and x.dtype in (torch.float16, torch.bfloat16, torch.float32)


def epilogue(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    """``act(y + bias + residual)`` of maps, written over ``y`` in one pass where ``y`` is channels_last."""
    from sparsekd.kernels.gather_gemm import SumParts

    y, bias = _last(y), None if bias is None else bias.contiguous()
    with on(y.device):
        return SumParts(1, y, y.shape[1], activation)(y, y, bias, None if residual is None else _last(residual))


# ---- Small parts


def _output_shape(weight: Weight, x: Tensor) -> tuple[int, ...]:
    return x.shape[0], weight.rows, *Geometry(*weight[4:]).output_size(x.shape[2:])


def _precision(family: str) -> str:
    return "tf32" if family == "tf32" else "ieee"


def finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"sparsekd: activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def _spread(some: Tensor, where: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out`` filled with ``some`` on the channels ``where``, 0 elsewhere, and the bias everywhere."""
    out.zero_().index_copy_(1, where, some)
    if bias is not None:
        out += bias.view(1, -1, 1, 1)
    return out


def _rows(x: Tensor) -> Tensor:
    """The rows of ``[..., features]`` as maps of one pixel."""
    return _maps(x.reshape(-1, x.shape[-1]))


def _maps(rows: Tensor) -> Tensor:
    return rows[:, :, None, None]


def _last(x: Tensor) -> Tensor:
    return aligned(x.contiguous(memory_format=torch.channels_last))


def _empty(like: Tensor, shape: Sequence[int], layout: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=layout)
