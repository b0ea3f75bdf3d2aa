"""What the ops share: defining one from its parts, and the checks on a block-sparse weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The same derivatives as an autograd.Function each: see `call`.
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
# What each op means, in plain torch.
REFERENCES: dict[str, Callable] = {}
# The CPU kernels that `call` may reach without torch's dispatcher, which takes longer than a small layer.
DIRECT: dict[str, Callable] = {}
# The same without gradients for float32 inputs of one size. Of a call (x, values, row_ptr, col_idx, bias, *rest) it
# makes a function of the first five, contiguous and as large as these, which does what is left to do.
PREPARED: dict[str, Callable[..., Callable[..., Tensor]]] = {}
_DIRECT_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


_PLAIN = (Tensor, torch.nn.Parameter)


def define(name: str, schema: str, reference: Callable, fake: Callable) -> None:
    """Define ``sparsekd::name``; ``reference`` runs on every device that has no kernel of its own."""
    REFERENCES[name] = reference
    torch.library.define(f"sparsekd::{name}", schema)
    torch.library.impl(f"sparsekd::{name}", "default", reference)
    torch.library.register_fake(f"sparsekd::{name}", _refusing_onnx(name, fake))


def _refusing_onnx(name: str, fake: Callable) -> Callable:
    """torch's ONNX exporter traces with fakes, and would only say that it has no function for the op."""

    @functools.wraps(fake)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                f"sparsekd.{name}: ONNX has no block-sparse layers; export sparsekd.densify(copy.deepcopy(model)), the "
                "same network with dense weights"
            )
        return fake(*args, **kwargs)

    return checked


def differentiate(name: str, backward: Callable, save: Callable) -> None:
    """Give ``sparsekd::name`` its derivative, as ``torch.library.register_autograd`` takes it."""
    torch.library.register_autograd(f"sparsekd::{name}", backward, setup_context=save)
    methods = {"forward": getattr(torch.ops.sparsekd, name), "setup_context": save, "backward": backward}
    _FUNCTIONS[name] = _function(name, methods)

    def forward(ctx: Any, *args: Any) -> Any:
        output = DIRECT[name](*args)
        save(ctx, args, output)
        return output

    # Without setup_context, with which torch takes four times as long to apply a function.
    _DIRECT_FUNCTIONS[name] = _function(name, {"forward": forward, "backward": backward})


def _function(name: str, methods: dict[str, Callable]) -> type[torch.autograd.Function]:
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})


def call(name: str, *args: Any) -> Any:
    """``torch.ops.sparsekd.name``, also inside ``torch.func.grad`` and its like, which differentiate an
    ``autograd.Function`` with ``setup_context`` but not what ``torch.library`` makes."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.sparsekd, name)(*args)
    if name in _FUNCTIONS and torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[name].apply(*args)
    if name not in DIRECT or not nobody_looks_on(args):
        return getattr(torch.ops.sparsekd, name)(*args)
    if name in _DIRECT_FUNCTIONS and torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return _DIRECT_FUNCTIONS[name].apply(*args)
    return DIRECT[name](*args)


def nobody_looks_on(args: Sequence[Any]) -> bool:
    """Whether these are plain tensors of the CPU, and no mode, trace or profiler has to see the op."""
    for arg in args:  # a loop takes half as long as all() here
        if isinstance(arg, Tensor) and not (type(arg) in _PLAIN and arg.is_cpu):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


def sum_dtype(*operands: Tensor) -> torch.dtype:
    """Of sums over many elements of these: float32 for half types, since squares above 255 overflow float16, and
    bfloat16 sums stop growing after 256 terms; float64 if any is."""
    return torch.float64 if any(operand.dtype == torch.float64 for operand in operands) else torch.float32


def autocast(x: Tensor, *operands: Tensor | None) -> tuple:
    """In the autocast dtype if autocast is on for the device of ``x``; as with torch's own layers, float64 stays."""
    if not torch._C._is_any_autocast_enabled():  # asked first, since the rest takes as long as a small layer
        return x, *operands
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, *operands
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if operand is None else operand.to(dtype) for operand in (x, *operands))


def check_weight(op: str, values: Tensor, row_ptr: Tensor, col_idx: Tensor, rows: int) -> None:
    """Types and shapes of the three tensors against ``rows`` dense output rows. Contents are left to the kernels."""
    if values.dim() != 3:
        raise ValueError(f"sparsekd.{op}: values must be [nnzb, bh, bw], got shape {tuple(values.shape)}")
    for index_name, index in (("row_ptr", row_ptr), ("col_idx", col_idx)):
        if index.dtype != torch.int32:
            raise TypeError(f"sparsekd.{op}: {index_name} must be int32, got {index.dtype}; use .to(torch.int32)")
        if index.device != values.device:
            raise ValueError(
                f"sparsekd.{op}: {index_name} must be on {values.device} like values, got {index.device}; "
                "move the whole module with .to(device)"
            )
    row_blocks = -(-rows // values.shape[1])
    if row_ptr.shape != (row_blocks + 1,):
        raise ValueError(
            f"sparsekd.{op}: {rows} output rows in blocks of {values.shape[1]} need row_ptr of shape "
            f"({row_blocks + 1},), got {tuple(row_ptr.shape)}"
        )
    if col_idx.dim() != 1 or col_idx.shape[0] != values.shape[0]:
        raise ValueError(
            f"sparsekd.{op}: col_idx must have one entry for each of the {values.shape[0]} blocks, "
            f"got shape {tuple(col_idx.shape)}"
        )


def check_operands(op: str, x: Tensor, values: Tensor, bias: Tensor | None, rows: int) -> None:
    """Dtype and device agree; bias is ``[rows]``."""
    for operand_name, operand in (("values", values), ("bias", bias)):
        if operand is None:
            continue
        if operand.dtype != x.dtype:
            raise TypeError(
                f"sparsekd.{op}: input and {operand_name} must have one dtype, got {x.dtype} and {operand.dtype}; "
                f"convert the module with .to({x.dtype})"
            )
        if operand.device != x.device:
            raise ValueError(
                f"sparsekd.{op}: input and {operand_name} must be on one device, got {x.device} and {operand.device}"
            )
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"sparsekd.{op}: bias must have shape ({rows},), got {tuple(bias.shape)}")
