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
from . import choose, cost, driver
from .choose import Paths, uses_triton
from .device import aligned, on
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
    mask = masks.of(row_ptr, col_idx, weight_of(out_features, x.shape[-1], values))
    added = None if residual is None else _rows(residual)
    rows = _rows(x)
    shape = (rows.shape[0], out_features, 1, 1)
    y = _forward(LINEAR, mask, rows, values, bias, added, activation, shape, torch.channels_last)
    return y.reshape(*x.shape[:-1], out_features)


def linear_grad_input(grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, in_features: int) -> Tensor:
    mask = masks.of(row_ptr, col_idx, weight_of(grad.shape[-1], in_features, values))
    rows = _rows(grad)
    dx = _grad_input(LINEAR, mask, rows, values, (rows.shape[0], in_features, 1, 1), torch.channels_last)
    return dx.reshape(*grad.shape[:-1], in_features)


def linear_grad_values(grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int) -> Tensor:
    out = x.new_empty(col_idx.shape[0], bh, bw)
    mask = masks.of(row_ptr, col_idx, weight_of(grad.shape[-1], x.shape[-1], out))
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
    mask = masks.of(row_ptr, col_idx, weight_of(out_channels, x.shape[1] // geometry.groups, values, geometry))
    layout, shape = memory_format(x), (x.shape[0], out_channels, *geometry.output_size(x.shape[2:]))
    y = _forward(CONV2D, mask, x, values, bias, residual, activation, shape, layout)
    return y.contiguous(memory_format=layout)


def conv2d_grad_input(
    grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, input_shape: Sequence[int], *fields: Any
) -> Tensor:
    geometry = Geometry.of(*fields)
    mask = masks.of(row_ptr, col_idx, weight_of(grad.shape[1], input_shape[1] // geometry.groups, values, geometry))
    layout = memory_format(grad)
    dx = _grad_input(CONV2D, mask, grad, values, tuple(input_shape), layout)
    return dx.contiguous(memory_format=layout)


def conv2d_grad_values(
    grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int, *fields: Any
) -> Tensor:
    out = x.new_empty(col_idx.shape[0], bh, bw)
    geometry = Geometry.of(*fields)
    mask = masks.of(row_ptr, col_idx, weight_of(grad.shape[1], x.shape[1] // geometry.groups, out, geometry))
    return _grad_values(CONV2D, mask, grad, x, out, memory_format(x))


# ---- The three directions


def _forward(
    library: Library,
    mask: Mask,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    shape: tuple[int, ...],
    layout: torch.memory_format,
) -> Tensor:
    """layout: the memory format of a dense weight, where no kernel takes this one."""

    def dense(kept: Channels | None) -> Tensor:
        weight = mask.dense(values)
        if kept is None:
            return _finish(
                library.forward(x, weight.contiguous(memory_format=layout), bias, mask.weight), residual, activation
            )
        some = library.forward(x.index_select(1, kept.inputs), weight[kept.outputs][:, kept.inputs], None, mask.weight)
        return _finish(_spread(some, kept.outputs, _empty(x, shape), bias), residual, activation)

    if choose.runs_dense(values, mask.weight, forward=True):
        return dense(None)
    layout = torch.channels_last
    x, values = _last(x), aligned(values.contiguous())
    residual = None if residual is None else _last(residual)
    bias = None if bias is None else aligned(bias)
    if not uses_triton():
        return native_forward(x, values, mask, _empty(x, shape), bias, residual, activation)
    from sparsekd.kernels import conv2d as kernel

    family = choose.family(x, library.conv)

    def triton(tile: Any) -> Tensor:
        return kernel.forward(
            x, values, mask.table("forward", tile), mask.weight, tile, _empty(x, shape),
            bias=bias, residual=residual, activation=activation, precision=_precision(family),
        )  # fmt: skip

    return choose.run("forward", family, mask, values, shape[0], shape[2:], Paths(triton, dense))  # type: ignore[arg-type]


def _grad_input(
    library: Library, mask: Mask, grad: Tensor, values: Tensor, shape: tuple[int, ...], layout: torch.memory_format
) -> Tensor:
    def dense(kept: Channels | None) -> Tensor:
        weight = mask.dense(values)
        if kept is None:
            return library.grad_input(
                grad, _empty(grad, shape, layout), weight.contiguous(memory_format=layout), mask.weight
            )
        like, weight = _empty(grad, (shape[0], kept.inputs.shape[0], *shape[2:])), weight[kept.outputs][:, kept.inputs]
        some = library.grad_input(grad.index_select(1, kept.outputs), like, weight, mask.weight)
        return _spread(some, kept.inputs, _empty(grad, shape))

    if choose.runs_dense(values, mask.weight):
        return dense(None)
    from sparsekd.kernels import conv2d as kernel

    layout = torch.channels_last
    grad, values = _last(grad), aligned(values.contiguous())
    family = choose.family(grad, library.conv)

    def triton(tile: Any) -> Tensor:
        table, out = mask.table("grad_input", tile), _empty(grad, shape)
        return kernel.grad_input(grad, values, table, mask.weight, tile, out, precision=_precision(family))

    image = (int(shape[2]), int(shape[3]))
    return choose.run("grad_input", family, mask, values, shape[0], image, Paths(triton, dense))


def _grad_values(
    library: Library, mask: Mask, grad: Tensor, x: Tensor, out: Tensor, layout: torch.memory_format
) -> Tensor:
    shape = (mask.weight.rows, mask.weight.cols, *mask.weight.kernel)

    def dense(kept: Channels | None) -> Tensor:
        if kept is None:
            return mask.pick(library.grad_weight(grad, x, _empty(x, shape, layout), mask.weight))
        like = _empty(x, (kept.outputs.shape[0], kept.inputs.shape[0], *mask.weight.kernel))
        narrow = grad.index_select(1, kept.outputs), x.index_select(1, kept.inputs)
        whole = out.new_zeros(shape)
        whole[kept.outputs[:, None], kept.inputs] = library.grad_weight(*narrow, like, mask.weight)
        return mask.pick(whole)

    if choose.runs_dense(out, mask.weight):
        return dense(None)
    from sparsekd.kernels import conv2d as kernel

    layout = torch.channels_last
    x, grad = _last(x), _last(grad)
    family = choose.family(x, library.conv)

    def triton(tile: Any) -> Tensor:
        table = mask.table("grad_values", tile)
        return kernel.grad_values(grad, x, table, mask.weight, tile, out, precision=_precision(family))

    image = (grad.shape[2], grad.shape[3])
    return choose.run("grad_values", family, mask, out, x.shape[0], image, Paths(triton, dense))


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
    from sparsekd.kernels.gather_gemm import sum_parts

    y = _last(y)
    with on(y.device):
        sum_parts(y[None], y, y.shape[1], bias, None if residual is None else _last(residual), activation)
    return y


# ---- Small parts


_ONE_PIXEL = Geometry((1, 1))


def weight_of(rows: int, cols: int, values: Tensor, geometry: Geometry = _ONE_PIXEL) -> Weight:
    return Weight(rows, cols, values.shape[1], values.shape[2], *geometry)


def _precision(family: str) -> str:
    return "tf32" if family == "tf32" else "ieee"


def _finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
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
