"""CPU kernels: hands pointers and sizes to ``sparsekd._C``. Operands were checked in ``sparsekd/ops``.

The compiled kernels take float32; layers and their gradients bfloat16 too; feature maps all half types. Layers in
float16 are converted around a float32 kernel. float64, and machines without the compiled module, run the reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, wraps
from pathlib import Path
from typing import Any

import torch  # before _C: its OpenMP run time is the one the kernels then share
from torch import Tensor

from ..ops._schema import DIRECT, PREPARED, REFERENCES
from ..ops.attention import (
    feature_stats_grad_reference,
    feature_stats_reference,
    kd_reference,
    match_maps_reference,
)
from ..ops.conv2d import (
    Geometry,
    conv2d_grad_input_reference,
    conv2d_grad_values_reference,
    conv2d_reference,
    memory_format,
)
from ..ops.linear import linear_grad_input_reference, linear_grad_values_reference, linear_reference
from ..ops.norm_relu import norm_relu_grad_reference, norm_relu_reference
from . import cpu_embedding
from .native import missing, native

# Of instruction sets that multiply bf16 as it is.
BF16_INSTRUCTIONS = {"avx512_bf16": "vdpbf16ps", "neon_bf16": "bfdot"}

__all__ = ["describe", "isa", "missing", "native", "register", "runs_norm_relu"]


def isa() -> str | None:
    """The instruction set that the compiled kernels use here, None without them."""
    return None if native is None else native.isa()


def describe(op: str) -> str:
    """What runs ``op`` on the CPU, and why."""
    if native is None:
        return f"pure-torch reference: {missing}"
    dtypes = "float32"
    if op.startswith("norm_relu"):
        return f"sparsekd._C {native.isa()} for float32 in channels_last; pure-torch reference otherwise"
    if op.startswith("feature_stats") or op in ("embedding", "embedding_bag", "embedding_top_k"):
        dtypes = "float32, bfloat16 and float16"
    elif op.endswith("_int8"):
        dtypes = "int8 with float32 scales"
    elif op in ("embedding_thin", "embedding_repack"):
        dtypes = "values of 1, 2, 4 and 8 bytes"
    elif op in ("embedding_grad", "embedding_rows_grad", "embedding_magnitudes"):
        dtypes = "float32, bfloat16 and float16 as float32"
    elif hasattr(native, f"{op}_bf16"):
        how = BF16_INSTRUCTIONS.get(native.isa(), "converted to float32 on its way in and out")
        dtypes = f"float32 and bfloat16 ({how}), float16 as float32"
    elif hasattr(native, f"{op}_f32"):
        dtypes = "float32, bfloat16 and float16 as float32"
    return f"sparsekd._C {native.isa()} for {dtypes}; pure-torch reference for other dtypes"


def register() -> None:
    """Make the compiled kernels what ``torch.ops.sparsekd.*`` runs on CPU tensors."""
    if native is None:
        for name, reference in REFERENCES.items():
            torch.library.impl(f"sparsekd::{name}", "cpu", _saying_so(name, reference))
        return
    layers: list[Callable[..., Tensor]]
    layers = [linear, linear_grad_input, linear_grad_values, conv2d, conv2d_grad_input, conv2d_grad_values]
    layers = [*map(_halves_in_float32, layers)]
    norms: list[Callable] = [norm_relu, norm_relu_grad]
    DIRECT.update({op.__name__: op for op in (*layers, *norms, *cpu_embedding.LOOKUPS)})
    PREPARED.update(linear=prepared_linear, conv2d=prepared_conv2d)
    ops: list[Callable] = [*layers, *norms, feature_stats, feature_stats_grad, match_maps, kd]
    ops += cpu_embedding.OPS
    for op in ops:
        # Not register_kernel: its wrapper imports torch._dynamo at the first call, seconds most processes can save.
        torch.library.impl(f"sparsekd::{op.__name__}", "cpu", op)


def _saying_so(name: str, reference: Callable) -> Callable:
    """A warning, once: a user who runs beside the sources would only see that everything is slow."""

    @wraps(reference)
    def run(*args: Any) -> Any:
        if not _said:
            _said.append(name)
            warnings.warn(
                f"sparsekd.{name} runs on its reference in plain torch, slower than a dense layer: {missing}. sparsekd "
                f"was imported from {Path(__file__).parent.parent}. If these are the sources, and it is installed, run "
                "from another folder; or pip install -e . in the clone",
                stacklevel=2,
            )
        return reference(*args)

    return run


_said: list[str] = []


def _halves_in_float32(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``op``, with half types that have no kernel of their own converted and the result rounded once."""

    @wraps(op)
    def run(first: Tensor, *rest: Any) -> Tensor:
        dtype = first.dtype
        if dtype == torch.float32:
            return op(first, *rest)
        operands = [x for x in (first, *rest) if isinstance(x, Tensor) and x.is_floating_point()]
        one_half = dtype in (torch.bfloat16, torch.float16) and all(x.dtype == dtype for x in operands)
        if not one_half or _kernel(op.__name__, *operands) is not None:
            return op(first, *rest)
        return op(first.float(), *(x.float() if isinstance(x, Tensor) and x.dtype == dtype else x for x in rest)).to(
            dtype
        )

    return run


def linear(
    x: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    if _kernel("linear", x, values, bias) is None:
        return linear_reference(x, values, row_ptr, col_idx, bias, out_features)
    x, values, row_ptr, col_idx = (t.contiguous() for t in (x, values, row_ptr, col_idx))
    bias = None if bias is None else _as_float32(bias)
    return prepared_linear(x, values, row_ptr, col_idx, bias, out_features)(x, values, row_ptr, col_idx, bias)


def prepared_linear(
    x: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, bias: Tensor | None, out_features: int
) -> Callable[..., Tensor]:
    """What ``linear`` does for contiguous operands like these, whose bias is float32."""
    kernel, threads = _compiled("linear", x.dtype), torch.get_num_threads
    size, rows, columns, blocks = (*x.shape[:-1], out_features), _rows(x), x.shape[-1], tuple(values.shape)

    def run(x: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(size)
        kernel(
            x.data_ptr(), rows, columns, values.data_ptr(), row_ptr.data_ptr(), col_idx.data_ptr(), *blocks,
            0 if bias is None else bias.data_ptr(), 0, y.data_ptr(), out_features, 0, threads(),
        )  # fmt: skip
        return y

    return run


def linear_grad_input(grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, in_features: int) -> Tensor:
    kernel = _kernel("linear_grad_input", grad, values)
    if kernel is None:
        return linear_grad_input_reference(grad, values, row_ptr, col_idx, in_features)
    grad, values, row_ptr, col_idx = (t.contiguous() for t in (grad, values, row_ptr, col_idx))
    dx = grad.new_empty(*grad.shape[:-1], in_features)
    weight = (values.data_ptr(), row_ptr.data_ptr(), col_idx.data_ptr(), *values.shape)
    kernel(grad.data_ptr(), _rows(grad), grad.shape[-1], *weight, dx.data_ptr(), in_features, torch.get_num_threads())
    return dx


def linear_grad_values(grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int) -> Tensor:
    kernel = _kernel("linear_grad_values", grad, x)
    if kernel is None:
        return linear_grad_values_reference(grad, x, row_ptr, col_idx, bh, bw)
    grad, x, row_ptr, col_idx = (t.contiguous() for t in (grad, x, row_ptr, col_idx))
    dvalues = x.new_empty(col_idx.shape[0], bh, bw)
    kernel(
        x.data_ptr(), _rows(x), x.shape[-1], grad.data_ptr(), grad.shape[-1],
        row_ptr.data_ptr(), col_idx.data_ptr(), col_idx.shape[0], bh, bw, dvalues.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dvalues


def conv2d(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    bias: Tensor | None,
    out_channels: int,
    *fields: Any,
) -> Tensor:
    if _kernel("conv2d", x, values, bias) is None:
        return conv2d_reference(x, values, row_ptr, col_idx, bias, out_channels, *fields)
    x = x.contiguous(memory_format=memory_format(x))
    values, row_ptr, col_idx = (t.contiguous() for t in (values, row_ptr, col_idx))
    bias = None if bias is None else _as_float32(bias)
    run = prepared_conv2d(x, values, row_ptr, col_idx, bias, out_channels, *fields)
    return run(x, values, row_ptr, col_idx, bias)


def prepared_conv2d(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    bias: Tensor | None,
    out_channels: int,
    *fields: Any,
) -> Callable[..., Tensor]:
    """What ``conv2d`` does for operands like these, contiguous (x perhaps channels_last), whose bias is float32."""
    kernel, threads, layout = _compiled("conv2d", x.dtype), torch.get_num_threads, memory_format(x)
    shape = _shape(x.shape, out_channels, Geometry.of(*fields), values.shape[1:])
    size, blocks, last = (x.shape[0], out_channels, shape.p, shape.q), len(values), layout == torch.channels_last

    def run(x: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, bias: Tensor | None) -> Tensor:
        y = _empty(x, size, layout) if last else x.new_empty(size)
        kernel(
            shape, x.data_ptr(), last, values.data_ptr(), row_ptr.data_ptr(), col_idx.data_ptr(), blocks,
            0 if bias is None else bias.data_ptr(), 0, y.data_ptr(), last, 0, threads(),
        )  # fmt: skip
        return y

    return run


def conv2d_grad_input(
    grad: Tensor, values: Tensor, row_ptr: Tensor, col_idx: Tensor, input_shape: Sequence[int], *fields: Any
) -> Tensor:
    kernel = _kernel("conv2d_grad_input", grad, values)
    if kernel is None:
        return conv2d_grad_input_reference(grad, values, row_ptr, col_idx, input_shape, *fields)
    layout = memory_format(grad)
    grad = grad.contiguous(memory_format=layout)
    values, row_ptr, col_idx = (t.contiguous() for t in (values, row_ptr, col_idx))
    shape = _shape(input_shape, grad.shape[1], Geometry.of(*fields), values.shape[1:])
    dx = _empty(grad, tuple(input_shape), layout)
    last = layout == torch.channels_last
    kernel(
        shape, grad.data_ptr(), last, values.data_ptr(), row_ptr.data_ptr(), col_idx.data_ptr(), values.shape[0],
        dx.data_ptr(), last, torch.get_num_threads(),
    )  # fmt: skip
    return dx


def conv2d_grad_values(
    grad: Tensor, x: Tensor, row_ptr: Tensor, col_idx: Tensor, bh: int, bw: int, *fields: Any
) -> Tensor:
    kernel = _kernel("conv2d_grad_values", grad, x)
    if kernel is None:
        return conv2d_grad_values_reference(grad, x, row_ptr, col_idx, bh, bw, *fields)
    x_layout, grad_layout = memory_format(x), memory_format(grad)
    x, grad = x.contiguous(memory_format=x_layout), grad.contiguous(memory_format=grad_layout)
    row_ptr, col_idx = row_ptr.contiguous(), col_idx.contiguous()
    shape = _shape(x.shape, grad.shape[1], Geometry.of(*fields), (bh, bw))
    dvalues = x.new_empty(col_idx.shape[0], bh, bw)
    kernel(
        shape, x.data_ptr(), x_layout == torch.channels_last, grad.data_ptr(), grad_layout == torch.channels_last,
        row_ptr.data_ptr(), col_idx.data_ptr(), col_idx.shape[0], dvalues.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dvalues


def norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_norm_relu(x, weight, bias, residual):
        return norm_relu_reference(x, weight, bias, eps, residual)
    weight, bias, y = weight.contiguous(), bias.contiguous(), torch.empty_like(x)
    mean, variance = torch.empty_like(weight), torch.empty_like(weight)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    native.norm_relu(
        *_rows_and_channels(x), x.data_ptr(), 0 if residual is None else residual.data_ptr(), weight.data_ptr(),
        bias.data_ptr(), eps, y.data_ptr(), mean.data_ptr(), variance.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, variance


def norm_relu_grad(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not runs_norm_relu(x, grad, y, weight, bias, mean, variance):
        return norm_relu_grad_reference(grad, x, y, weight, bias, mean, variance, eps)
    grad = grad.contiguous(memory_format=torch.channels_last)
    weight, bias, mean, variance = (t.contiguous() for t in (weight, bias, mean, variance))
    to_x, to_weight, to_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    if y is None:
        to_residual = grad.new_empty(0)
    else:
        y = y.contiguous(memory_format=torch.channels_last)
        to_residual = torch.empty_like(y)
    native.norm_relu_grad(
        *_rows_and_channels(x), grad.data_ptr(), x.data_ptr(), 0 if y is None else y.data_ptr(), weight.data_ptr(),
        bias.data_ptr(), mean.data_ptr(), variance.data_ptr(), eps, to_x.data_ptr(),
        0 if y is None else to_residual.data_ptr(), to_weight.data_ptr(), to_bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return to_x, to_residual, to_weight, to_bias


def runs_norm_relu(x: Tensor, *operands: Tensor | None) -> bool:
    """Whether the compiled kernels take these: float32 maps in channels_last. In other layouts torch is as fast."""
    return (
        native is not None
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(operand is None or operand.is_cpu for operand in (x, *operands))
        and _native(x, *operands)
    )


def _rows_and_channels(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[1], x.shape[1]


def feature_stats(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if not _native_maps(features):
        return feature_stats_reference(features)
    features = [f.contiguous(memory_format=memory_format(f)) for f in features]
    batch = features[0].shape[0]
    columns = (sum(f.shape[1] for f in features), sum(f.shape[2] * f.shape[3] for f in features))
    means, energy = (features[0].new_empty(batch, n, dtype=torch.float32) for n in columns)
    layers = [_map_layer(f, 0) for f in features]
    native.feature_stats(layers, batch, means.data_ptr(), energy.data_ptr(), torch.get_num_threads())
    return means, energy


def feature_stats_grad(features: Sequence[Tensor], grad_means: Tensor, grad_energy: Tensor) -> list[Tensor]:
    if not _native_maps(features):
        return feature_stats_grad_reference(features, grad_means, grad_energy)
    features = [f.contiguous(memory_format=memory_format(f)) for f in features]
    grad_means, grad_energy = grad_means.contiguous(), grad_energy.contiguous()
    grads = [torch.empty_like(f) for f in features]
    layers = [_map_layer(f, grad.data_ptr()) for f, grad in zip(features, grads, strict=True)]
    native.feature_stats_grad(
        layers, features[0].shape[0], grad_means.data_ptr(), grad_energy.data_ptr(), torch.get_num_threads()
    )
    return grads


def match_maps(
    attention: Tensor | None,
    teacher: Tensor,
    student: Tensor,
    teacher_sizes: Sequence[int],
    student_sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    if not _native(attention, teacher, student) or not student.numel() or not teacher.numel():
        return match_maps_reference(attention, teacher, student, teacher_sizes, student_sizes)
    teacher, student = teacher.contiguous(), student.contiguous()
    attention = None if attention is None else attention.contiguous()
    loss, grad_student = student.new_empty(()), torch.empty_like(student)
    grad_attention = student.new_empty(0) if attention is None else torch.empty_like(attention)
    native.match_maps(
        student.shape[0], 0 if attention is None else attention.data_ptr(),
        teacher.data_ptr(), teacher_sizes, student.data_ptr(), student_sizes,
        loss.data_ptr(), grad_attention.data_ptr(), grad_student.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return loss, grad_attention, grad_student


def kd(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if not _native(student, teacher) or not student.numel():
        return kd_reference(student, teacher, temperature)
    student, teacher = student.contiguous(), teacher.contiguous()
    loss, grad = student.new_empty(()), torch.empty_like(student)
    native.kd_loss(
        *student.shape, student.data_ptr(), teacher.data_ptr(), temperature,
        loss.data_ptr(), grad.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return loss, grad


def _native_maps(features: Sequence[Tensor]) -> bool:
    """Whether the compiled kernels take all of these; of an empty map the means are NaN, which torch knows."""
    return all(_dtype_name(f) in native.ELEMENTS and f.numel() for f in features)


def _map_layer(f: Tensor, grad: int) -> tuple[int, int, int, bool, int, int]:
    last = memory_format(f) == torch.channels_last
    return f.data_ptr(), grad, native.ELEMENTS[_dtype_name(f)], last, f.shape[1], f.shape[2] * f.shape[3]


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _native(*operands: Tensor | None) -> bool:
    """Whether the compiled kernels take these. Mixed dtypes go to the reference, where torch refuses them."""
    return all(operand is None or operand.dtype == torch.float32 for operand in operands)


_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _kernel(op: str, *operands: Tensor | None) -> Any:
    """The compiled ``op`` for the dtype of these, or None; mixed dtypes go to the reference: torch refuses them."""
    dtype = operands[0].dtype  # type: ignore[union-attr]
    for operand in operands:
        if operand is not None and operand.dtype != dtype:
            return None
    return _compiled(op, dtype)


@cache
def _compiled(op: str, dtype: torch.dtype) -> Any:
    return getattr(native, f"{op}_{_SUFFIXES[dtype]}", None) if dtype in _SUFFIXES else None


def _as_float32(bias: Tensor) -> Tensor:
    return (bias if bias.dtype == torch.float32 else bias.float()).contiguous()


def _shape(input_shape: Sequence[int], out_channels: int, geometry: Geometry, block: Sequence[int]) -> Any:
    return _cached_shape(tuple(input_shape), out_channels, geometry, tuple(block))


@lru_cache(maxsize=4096)
def _cached_shape(input_shape: tuple, out_channels: int, geometry: Geometry, block: tuple) -> Any:
    """What the kernels know of a layer; building it costs more than a small layer."""
    return native.Conv2dShape(input_shape, out_channels, **geometry._asdict(), block=block)


def _empty(like: Tensor, shape: tuple[int, ...], layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _rows(x: Tensor) -> int:
    """Product of the leading sizes, also where the last one is 0."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows
