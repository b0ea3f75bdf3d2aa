"""CUDA kernels: chooses, layer by layer and direction by direction, between ``sparsekd.kernels`` (Triton), the dense
library, and the dense library on the channels that any block touches. Operands were checked in ``sparsekd/ops``.

    sparsekd.backends.cuda.prewarm(model, x)       # time the candidates once; kept in one JSON file

What no kernel takes (blocks for a CPU, say) runs dense, the weight made dense on the device. Without Triton the forward
pass of float16 and bfloat16 runs in CUDA C++ (cuda_driver.py), the rest dense.

The tables a kernel walks are built on the device when a mask is first seen (one synchronisation) and kept while the
mask is in use. Run a model once before capturing it in a CUDA graph.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import BlockPattern, BlockSparse
from ..ops.conv2d import Geometry, memory_format
from . import cuda_attention, cuda_driver

MASKS_KEPT = 1024
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}


def describe(op: str) -> str:
    """What runs ``op`` on CUDA devices, and why."""
    if op in cuda_attention.OPS:
        return cuda_attention.describe(op)
    if not uses_triton():
        why = "SPARSEKD_CUDA=native" if find_spec("triton") else "triton is not importable; pip install sparsekd[gpu]"
        missing = cuda_driver.why_not() if op in ("linear", "conv2d") else "CUDA C++ has the forward pass alone"
        if missing:
            return f"the dense library, the weight made dense: {why}, and {missing}"
        return f"CUDA C++ for float16 and bfloat16 ({why}), where Triton would run; else the dense library"
    return (
        "sparsekd.kernels (Triton) or the dense library, whichever is faster, for float16, bfloat16 and float32 with "
        "blocks in multiples of 16x16 and channels in multiples of 8; the dense library otherwise"
    )


@lru_cache(maxsize=1)
def uses_triton() -> bool:
    """Whether the Triton kernels run; ``SPARSEKD_CUDA=native`` leaves them for the CUDA C++ ones, which need no JIT."""
    forced = os.environ.get("SPARSEKD_CUDA", "triton")
    if forced not in ("triton", "native"):
        raise RuntimeError(f"sparsekd: SPARSEKD_CUDA must be triton or native, got {forced!r}")
    return forced == "triton" and find_spec("triton") is not None


def register() -> None:
    """Make these functions what ``torch.ops.sparsekd.*`` runs on CUDA tensors."""
    for op in (linear, linear_grad_input, linear_grad_values, conv2d, conv2d_grad_input, conv2d_grad_values):
        torch.library.impl(f"sparsekd::{op.__name__}", "cuda", op)
    cuda_attention.register()


def prewarm(model: torch.nn.Module, *inputs: Tensor, backward: bool = True) -> dict[str, Any]:
    """Run ``model(*inputs)`` (and its backward pass) with every candidate timed, and keep the fastest of each layer.

    Call it before training, before DDP wraps the model, and before a CUDA graph is captured; gradients are left as
    they were. Returns ``{problem: Measured}`` of all problems measured so far on this device.
    """
    from sparsekd.kernels import _plan

    for mask in _masks.values():
        mask.choices.clear()
    before = {parameter: parameter.grad for parameter in model.parameters()}
    with _plan.measuring(), torch.set_grad_enabled(backward):
        output = model(*inputs)
        if backward:
            output.float().square().mean().backward()
    for parameter, grad in before.items():
        parameter.grad = grad
    plan = _plan_of(inputs[0].device)
    plan.save()
    return plan.measured


def measure(run: Callable[..., Tensor], *operands: Tensor | None) -> Any:
    """Time every candidate of the one op in ``run(*operands)``; its ``Measured``, None where nothing is timed."""
    if not uses_triton():
        run(*operands)
        return None
    from sparsekd.kernels import _plan

    with _plan.measuring() as found:
        run(*operands)
    return found[-1]


def save_plan(device: torch.device) -> None:
    """Keep what was measured on a device for other processes."""
    if uses_triton():
        _plan_of(device).save()


def why_dense(blocks: BlockSparse, groups: int = 1) -> str | None:
    """Why the dense library runs the forward pass of a weight, or None."""
    rows, cols = blocks.shape[:2]
    why = refusal(blocks.values, _weight(rows, cols, blocks.values, groups=groups))
    if why is None and not uses_triton():
        why = cuda_driver.why_not(blocks.values.dtype, blocks.values.device)
    return why


def takes(shape: Sequence[int], pattern: BlockPattern, groups: int = 1) -> bool:
    """Whether a layer ``[K, C / groups, ...]`` is worth these blocks: False where they suit the kernels, its channels
    do not. (Blocks for other devices run dense in any layer.)"""
    from sparsekd.kernels import _index, _tiles

    whole = _index.Weight(pattern.bh, pattern.bw, pattern.bh, pattern.bw)
    layer = _index.Weight(shape[0], shape[1], pattern.bh, pattern.bw, groups=groups)
    return _tiles.why_not(whole) is not None or _tiles.why_not(layer) is None


def refusal(values: Tensor, weight: Any) -> str | None:
    """Why no kernel takes this weight, or None."""
    from sparsekd.kernels import _tiles

    if _tiles.family(str(values.dtype).removeprefix("torch."), False) is None:
        return f"{values.dtype}: the tensor-core kernels take float16, bfloat16 and float32"
    return _tiles.why_not(weight)


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
    weight = _weight(out_features, x.shape[-1], values)
    if _runs_dense(values, weight, forward=True):
        dense = _mask(row_ptr, col_idx, weight).dense(values).flatten(1)
        return _finish(F.linear(x, dense, bias), residual, activation)
    rows, values = x.reshape(-1, x.shape[-1]).contiguous(), values.contiguous()
    added = None if residual is None else residual.reshape(-1, out_features).contiguous()
    if not uses_triton():
        more = None if added is None else added[:, :, None, None]
        out = rows.new_empty(rows.shape[0], out_features, 1, 1)
        _native(rows[:, :, None, None], values, _mask(row_ptr, col_idx, weight), out, bias, more, activation)
        return out.view(*x.shape[:-1], out_features)
    from sparsekd.kernels import linear as kernel

    mask, family = _mask(row_ptr, col_idx, weight), _family(x, conv=False)

    def run(choice: Any) -> Tensor:
        if choice.kernel == "triton":
            out = rows.new_empty(rows.shape[0], out_features)
            table = mask.table("forward", choice.tile)
            fused: Any = {"bias": bias, "residual": added, "activation": activation}
            return kernel.forward(rows, values, table, choice.tile, out, **fused, precision=_precision(family))
        dense = mask.dense(values).flatten(1)
        if choice.kernel == "dense":
            return _finish(F.linear(rows, dense, bias), added, activation)
        outputs, inputs = mask.channels
        some = rows.index_select(1, inputs) @ dense[outputs][:, inputs].T
        return _finish(_spread(some, outputs, 1, rows.new_empty(rows.shape[0], out_features), bias), added, activation)

    y = _run("forward", family, mask, values, rows.shape[0], (1, 1), run)
    return y.view(*x.shape[:-1], out_features)


def linear_grad_input(grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, in_features: int) -> Tensor:
    weight = _weight(grad.shape[-1], in_features, values)
    if _runs_dense(values, weight):
        return grad @ _mask(row_ptr, col_idx, weight).dense(values).flatten(1)
    from sparsekd.kernels import linear as kernel

    rows, values = grad.reshape(-1, grad.shape[-1]).contiguous(), values.contiguous()
    mask, family = _mask(row_ptr, col_idx, weight), _family(grad, conv=False)

    def run(choice: Any) -> Tensor:
        out = rows.new_empty(rows.shape[0], in_features)
        if choice.kernel == "triton":
            table = mask.table("grad_input", choice.tile)
            return kernel.grad_input(rows, values, table, choice.tile, out, precision=_precision(family))
        dense = mask.dense(values).flatten(1)
        if choice.kernel == "dense":
            return rows @ dense
        outputs, inputs = mask.channels
        return _spread(rows.index_select(1, outputs) @ dense[outputs][:, inputs], inputs, 1, out)

    dx = _run("grad_input", family, mask, values, rows.shape[0], (1, 1), run)
    return dx.view(*grad.shape[:-1], in_features)


def linear_grad_values(grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int) -> Tensor:
    out = x.new_empty(col_idx.shape[0], bh, bw)
    weight = _weight(grad.shape[-1], x.shape[-1], out)
    if _runs_dense(out, weight):
        grads, rows = (t.reshape(-1, t.shape[-1]) for t in (grad, x))
        return _mask(row_ptr, col_idx, weight).pick(grads.T @ rows)
    from sparsekd.kernels import linear as kernel

    grads, rows = (t.reshape(-1, t.shape[-1]).contiguous() for t in (grad, x))
    mask, family = _mask(row_ptr, col_idx, weight), _family(x, conv=False)

    def run(choice: Any) -> Tensor:
        if choice.kernel == "triton":
            table = mask.table("grad_values", choice.tile)
            return kernel.grad_values(grads, rows, table, choice.tile, out, precision=_precision(family))
        if choice.kernel == "dense":
            return mask.pick(grads.T @ rows)
        outputs, inputs = mask.channels
        dense = out.new_zeros(weight.rows, weight.cols)
        dense[outputs[:, None], inputs] = grads[:, outputs].T @ rows[:, inputs]
        return mask.pick(dense)

    return _run("grad_values", family, mask, out, rows.shape[0], (1, 1), run)


def conv2d(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(conv(x) + bias + residual)``; the last two are for frozen models, the op itself has neither."""
    geometry = Geometry.of(kernel_size, stride, padding, dilation, groups)
    weight = _weight(out_channels, x.shape[1] // groups, values, *geometry)
    if _runs_dense(values, weight, forward=True):
        layout = memory_format(x)
        dense = _mask(row_ptr, col_idx, weight).dense(values).contiguous(memory_format=layout)
        y = F.conv2d(x, dense, bias, stride, padding, dilation, groups)
        return _finish(y, residual, activation).contiguous(memory_format=layout)
    layout, image = memory_format(x), geometry.output_size(x.shape[2:])
    x, values, added = _last(x), values.contiguous(), None if residual is None else _last(residual)
    mask, family = _mask(row_ptr, col_idx, weight), _family(x, conv=True)
    shape = (x.shape[0], out_channels, *image)
    if not uses_triton():
        y = _native(x, values, mask, _empty(x, shape), bias, added, activation)
        return y.contiguous(memory_format=layout)
    from sparsekd.kernels import conv2d as kernel

    def run(choice: Any) -> Tensor:
        if choice.kernel == "triton":
            out, table = _empty(x, shape), mask.table("forward", choice.tile)
            fused: Any = {"bias": bias, "residual": added, "activation": activation}
            return kernel.forward(x, values, table, weight, choice.tile, out, **fused, precision=_precision(family))
        dense = mask.dense(values)
        if choice.kernel == "dense":
            y = F.conv2d(x, dense, bias, stride, padding, dilation, groups)
            return _finish(y, added, activation)
        outputs, inputs = mask.channels
        some = F.conv2d(x.index_select(1, inputs), dense[outputs][:, inputs], None, stride, padding, dilation)
        return _finish(_spread(some, outputs, 1, _empty(x, shape), bias), added, activation)

    return _run("forward", family, mask, values, x.shape[0], image, run).contiguous(memory_format=layout)


def conv2d_grad_input(
    grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, input_shape: Sequence[int], *geometry: Any
) -> Tensor:
    weight = _weight(grad.shape[1], input_shape[1] // geometry[-1], values, *geometry)
    if _runs_dense(values, weight):
        layout = memory_format(grad)
        dense = _mask(row_ptr, col_idx, weight).dense(values).contiguous(memory_format=layout)
        dx = _dense_gradients(grad, _empty(grad, input_shape, layout), dense, weight, (True, False, False))[0]
        return dx.contiguous(memory_format=layout)
    from sparsekd.kernels import conv2d as kernel

    layout, grad, values = memory_format(grad), _last(grad), values.contiguous()
    mask, family = _mask(row_ptr, col_idx, weight), _family(grad, conv=True)

    def run(choice: Any) -> Tensor:
        out = _empty(grad, input_shape)
        if choice.kernel == "triton":
            table = mask.table("grad_input", choice.tile)
            return kernel.grad_input(grad, values, table, weight, choice.tile, out, precision=_precision(family))
        dense = mask.dense(values)
        if choice.kernel == "dense":
            return _dense_gradients(grad, out, dense, weight, (True, False, False))[0]
        outputs, inputs = mask.channels
        some = _empty(grad, (input_shape[0], inputs.shape[0], *input_shape[2:]))
        kept = dense[outputs][:, inputs]
        return _spread(
            _dense_gradients(grad.index_select(1, outputs), some, kept, weight, (True, False, False))[0], inputs, 1, out
        )

    image = (int(input_shape[2]), int(input_shape[3]))
    return _run("grad_input", family, mask, values, grad.shape[0], image, run).contiguous(memory_format=layout)


def conv2d_grad_values(
    grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int, *geometry: Any
) -> Tensor:
    out = x.new_empty(col_idx.shape[0], bh, bw)
    weight = _weight(grad.shape[1], x.shape[1] // geometry[-1], out, *geometry)
    if _runs_dense(out, weight):
        like = _empty(x, (weight.rows, weight.cols, *weight.kernel), memory_format(x))
        dense = _dense_gradients(grad, x, like, weight, (False, True, False))[1]
        return _mask(row_ptr, col_idx, weight).pick(dense)
    from sparsekd.kernels import conv2d as kernel

    x, grad = _last(x), _last(grad)
    mask, family = _mask(row_ptr, col_idx, weight), _family(x, conv=True)
    shape = (weight.rows, weight.cols, *weight.kernel)

    def run(choice: Any) -> Tensor:
        if choice.kernel == "triton":
            table = mask.table("grad_values", choice.tile)
            return kernel.grad_values(grad, x, table, weight, choice.tile, out, precision=_precision(family))
        if choice.kernel == "dense":
            return mask.pick(_dense_gradients(grad, x, _empty(x, shape), weight, (False, True, False))[1])
        outputs, inputs = mask.channels
        kept = _empty(x, (outputs.shape[0], inputs.shape[0], *weight.kernel))
        some = _dense_gradients(
            grad.index_select(1, outputs), x.index_select(1, inputs), kept, weight, (False, True, False)
        )[1]
        dense = out.new_zeros(shape)
        dense[outputs[:, None], inputs] = some
        return mask.pick(dense)

    return _run("grad_values", family, mask, out, x.shape[0], (grad.shape[2], grad.shape[3]), run)


def _runs_dense(values: Tensor, weight: Any, forward: bool = False) -> bool:
    """Whether the dense library alone runs this: what no kernel takes, and without Triton all but the forward pass of
    half types. The weight is made dense without a synchronisation, so a CUDA graph holds it, too."""
    if refusal(values, weight) is not None:
        return True
    return not uses_triton() and not (forward and cuda_driver.why_not(values.dtype, values.device) is None)


def _native(
    x: Tensor,
    values: Tensor,
    mask: Mask,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The forward pass in CUDA C++; all activations channels_last."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        pixels = out.shape[0] * out.shape[2] * out.shape[3]
        per_group = mask.weight.rows // mask.weight.groups
        tile = cuda_driver.tile_for(per_group, pixels, _device(x.device).processors)
        fused: Any = {"bias": bias, "residual": residual, "activation": activation}
        table = mask.table("forward", tile)
        return cuda_driver.gather_gemm(x, values, table, tile, out, stride=mask.weight.stride, **fused)


# ---- Masks: what is known of one, built once


class Mask:
    """Everything derived from one block mask. Holds the index tensors, so that their memory cannot be used again."""

    def __init__(self, row_ptr: Tensor, col_idx: Tensor, weight: Any) -> None:
        self.row_ptr, self.col_idx, self.weight = row_ptr, col_idx, weight
        self.tables: dict[tuple, Any] = {}
        self.choices: dict[tuple, Any] = {}
        self.captured = False

    @property
    def density(self) -> float:
        blocks = math.ceil(self.weight.rows / self.weight.bh) * math.ceil(self.weight.cols / self.weight.bw)
        return self.col_idx.shape[0] / max(blocks * math.prod(self.weight.kernel), 1)

    def table(self, direction: str, tile: Any) -> Any:
        """The walk of a direction for a tile (kernels/_index.py), built when first asked for."""
        from sparsekd.kernels import _index

        key = (direction, tile.bn, tile.bk)
        if key not in self.tables:
            _refuse_capture(self.col_idx)
            build = _index.transposed_table if direction == "grad_input" else _index.forward_table
            deepest = self.weight.bh if direction == "grad_input" else self.weight.bw
            one_slot = _index.power_of_two_part(deepest, tile.bk)
            step = tile.bk if direction == "grad_values" else one_slot
            self.tables[key] = build(self.row_ptr, self.col_idx, self.weight, tile.bn, step)
        return self.tables[key]

    @cached_property
    def position(self) -> Tensor:
        """``[nnzb]`` place of each kept block among all blocks, row-major and tap-major."""
        _refuse_capture(self.col_idx)
        block = torch.arange(self.col_idx.shape[0], device=self.col_idx.device)
        row = torch.searchsorted(self.row_ptr.long(), block, right=True) - 1
        return row * (math.prod(self.weight.kernel) * self._columns) + self.col_idx.long()

    @cached_property
    def channels(self) -> tuple[Tensor, Tensor]:
        """(output channels, input channels) that some kept block touches; without conv groups."""
        _refuse_capture(self.col_idx)
        rows = torch.zeros(self._rows, dtype=torch.bool, device=self.col_idx.device)
        cols = torch.zeros(self._columns, dtype=torch.bool, device=self.col_idx.device)
        rows[self.position // (math.prod(self.weight.kernel) * self._columns)] = True
        cols[self.col_idx.long() % self._columns] = True
        outputs = rows.repeat_interleave(self.weight.bh)[: self.weight.rows]
        inputs = cols.repeat_interleave(self.weight.bw)[: self.weight.cols]
        return outputs.nonzero()[:, 0], inputs.nonzero()[:, 0]

    def dense(self, values: Tensor) -> Tensor:
        """``[K, C / groups, R, S]``, channels_last, without a synchronisation."""
        w, (r, s) = self.weight, self.weight.kernel
        blocks = values.new_zeros(self._rows * r * s * self._columns, w.bh, w.bw)
        blocks.index_copy_(0, self.position, values)
        blocks = blocks.view(self._rows, r, s, self._columns, w.bh, w.bw).permute(0, 4, 1, 2, 3, 5)
        last = blocks.reshape(self._rows * w.bh, r, s, self._columns * w.bw)[: w.rows, :, :, : w.cols]
        return last.contiguous().permute(0, 3, 1, 2)

    def pick(self, dense: Tensor) -> Tensor:
        """``[nnzb, bh, bw]``: the kept blocks of a dense ``[K, C / groups(, R, S)]``."""
        w, (r, s) = self.weight, self.weight.kernel
        last = dense.view(w.rows, w.cols, r, s).permute(0, 2, 3, 1)
        pad = (0, self._columns * w.bw - w.cols, 0, 0, 0, 0, 0, self._rows * w.bh - w.rows)
        blocks = F.pad(last, pad).reshape(self._rows, w.bh, r, s, self._columns, w.bw)
        return blocks.permute(0, 2, 3, 4, 1, 5).reshape(-1, w.bh, w.bw).index_select(0, self.position)

    @cached_property
    def _rows(self) -> int:
        return math.ceil(self.weight.rows / self.weight.bh)

    @cached_property
    def _columns(self) -> int:
        return math.ceil(self.weight.cols / self.weight.bw)


_masks: OrderedDict[tuple, Mask] = OrderedDict()


def _mask(row_ptr: Tensor, col_idx: Tensor, weight: Any) -> Mask:
    """The Mask of these index tensors: by address and version, since autograd hands out other objects for them."""
    indices = (row_ptr, col_idx)
    versions = (0 if index.is_inference() else index._version for index in indices)
    key = (weight, col_idx.shape[0], col_idx.device, *(index.data_ptr() for index in indices), *versions)
    mask = _masks.get(key)
    if mask is None:
        _make_room()
        mask = _masks[key] = Mask(row_ptr.contiguous(), col_idx.contiguous(), weight)
    _masks.move_to_end(key)
    mask.captured |= _is_capturing(col_idx)
    return mask


def _make_room() -> None:
    """Forget the masks used longest ago, but none that a CUDA graph reads."""
    for key in [key for key, mask in _masks.items() if not mask.captured][: max(len(_masks) + 1 - MASKS_KEPT, 0)]:
        del _masks[key]


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _refuse_capture(tensor: Tensor) -> None:
    if _is_capturing(tensor):
        raise RuntimeError(
            "sparsekd: this layer's mask is new, and its tables cannot be built while a CUDA graph is captured; "
            "run the model once before capturing"
        )


# ---- The choice


def _run(
    direction: str,
    family: str,
    mask: Mask,
    values: Tensor,
    images: int,
    image: tuple[int, int],
    run: Callable[[Any], Tensor],
) -> Tensor:
    """Run one op by the plan's choice; inside ``measuring`` time the candidates first."""
    known = (direction, family, values.dtype, images, image)
    with torch.cuda.device(values.device) if values.is_cuda else nullcontext():
        from sparsekd.kernels import _plan

        measuring = _plan.is_measuring() and not _is_capturing(values)
        if known not in mask.choices or measuring:
            density = round(mask.density * 20) / 20
            dtype = str(values.dtype).removeprefix("torch.")
            problem = _plan.Problem(direction, dtype, family, images, image, mask.weight, density)
            plan = _plan_of(values.device)
            if measuring:
                mask.choices[known] = plan.measure(problem, _choices(problem, mask, values), run)
            else:
                mask.choices[known] = plan.choose(problem, lambda: _guess(problem, mask, values))
        return run(mask.choices[known])


def _choices(problem: Any, mask: Mask, values: Tensor) -> list[Any]:
    """Every candidate, dense first."""
    from sparsekd.kernels import _plan

    choices = [_plan.DENSE]
    if problem.weight.groups == 1:
        outputs, inputs = mask.channels
        if outputs.numel() and inputs.numel() and outputs.numel() + inputs.numel() < sum(mask.weight[:2]):
            choices.append(_plan.COMPACT)
    return choices + [_plan.Choice("triton", tile) for tile, _ in tiles(problem, mask, values)]


def tiles(problem: Any, mask: Mask, values: Tensor) -> list[tuple[Any, float]]:
    """The tiles that fit this device, each cut into as many parts as fill it, with the model's seconds."""
    from sparsekd.kernels import _cost, _tiles

    device, found = _device(values.device), []
    for tile in _tiles.candidates(problem.direction, problem.family, problem.weight, device.capability):
        if _cost.shared_bytes(problem.direction, tile, values.element_size()) > device.shared_bytes:
            continue
        tile, work = _cost.arrange(problem, tile, mask.table(problem.direction, tile), device)
        found.append((tile, _cost.seconds(problem, work, tile, device)))
    return found


def _guess(problem: Any, mask: Mask, values: Tensor) -> Any:
    """The candidate the cost model prefers."""
    from sparsekd.kernels import _cost, _plan

    _refuse_capture(values)
    found = tiles(problem, mask, values)
    if not found or not mask.col_idx.shape[0]:
        return _plan.DENSE
    tile, ours = min(found, key=lambda pair: pair[1])
    device, flops, moved = _device(values.device), _cost.dense_flops(problem), _cost.moved_bytes(problem)
    dense = _cost.dense_seconds(flops, moved, problem.family, device)
    dense += 3 * _cost.LAUNCH  # to make the weight dense
    return _plan.Choice("triton", tile) if ours <= _plan.GAIN * dense else _plan.DENSE


@lru_cache(maxsize=16)
def _plan_of(device: torch.device) -> Any:
    from sparsekd.kernels import _plan

    return _plan.Plan(_plan.device_key(device) if device.type == "cuda" else f"{device.type}, interpreted")


@lru_cache(maxsize=16)
def _device(device: torch.device) -> Any:
    """What the cost model knows of a device: its own figures, the rates of the nearest one that is known."""
    from sparsekd.kernels import _cost

    if device.type != "cuda":
        return _cost.DEVICES["NVIDIA H200"]
    found = torch.cuda.get_device_properties(device)
    known = _cost.DEVICES.get(found.name, _cost.DEVICES["NVIDIA H100 80GB HBM3"])
    scale = found.multi_processor_count / known.processors
    shared = getattr(found, "shared_memory_per_block_optin", 101376)
    return known._replace(
        name=found.name,
        processors=found.multi_processor_count,
        flops=known.flops * scale,
        shared_bytes=shared,
        capability=10 * found.major + found.minor,
    )


# ---- Small parts


def _weight(
    rows: int,
    cols: int,
    values: Tensor,
    kernel_size: Sequence[int] = (1, 1),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Any:
    from sparsekd.kernels._index import Weight

    pairs = (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    return Weight(rows, cols, values.shape[1], values.shape[2], *pairs, groups)  # type: ignore[arg-type]


def _family(x: Tensor, conv: bool) -> str:
    from sparsekd.kernels import _tiles

    family = _tiles.family(str(x.dtype).removeprefix("torch."), x.dtype == torch.float32 and allows_tf32(conv))
    assert family is not None  # refusal() said so
    return family


def allows_tf32(conv: bool) -> bool:
    """torch's own switch: on for convolutions and off for products unless the user says otherwise."""
    backend: Any = torch.backends.cudnn.conv if hasattr(torch.backends.cudnn, "conv") else None
    if backend is not None and hasattr(backend, "fp32_precision"):
        return (backend if conv else torch.backends.cuda.matmul).fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32 if conv else torch.backends.cuda.matmul.allow_tf32


def _precision(family: str) -> str:
    return "tf32" if family == "tf32" else "ieee"


def _dense_gradients(grad: Tensor, x: Tensor, dense: Tensor, weight: Any, wanted: tuple[bool, bool, bool]) -> Any:
    geometry = (weight.stride, weight.padding, weight.dilation, False, (0, 0), weight.groups)
    return torch.ops.aten.convolution_backward(grad, x, dense, None, *geometry, wanted)


def _finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"sparsekd: activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def _spread(some: Tensor, where: Tensor, dim: int, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out`` filled with ``some`` on the channels ``where``, 0 elsewhere, and the bias everywhere."""
    out.zero_().index_copy_(dim, where, some)
    if bias is not None:
        out += bias.view(1, -1, *(1,) * (out.dim() - 2))
    return out


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, shape: Sequence[int], layout: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=layout)
