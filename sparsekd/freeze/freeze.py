"""`freeze`: what is checked, traced, chosen and checked again; the CPU's part of it. The GPU's is in cuda.py.

1. torch.fx or torch.export traces the model (trace.py). Every convolution and linear layer, with the batch norm,
   residual add and activation behind it, becomes a `Site`, and that one call: ``act(conv(x) + bias + residual)``.
   Conv1d and 1x1x1 Conv3d become Conv2d first (lift.py), nn.MultiheadAttention two projections around one call
   (attention.py); gates of channels, concatenations and layer norms are sites too (between.py).
2. BatchNorm is folded into weight and bias, exactly.
3. Each layer is timed dense (torch) and by ``sparsekd._C``, on its kept blocks or on all it has, at its input shape.
   Ours is kept only where it is faster by more than the noise. Everything else stays with torch.
4. Neighbouring layers of ours become one call (chain.py). The whole network is timed contiguous and channels_last, also
   with ours throughout, and with larger batches in slices of some images for each thread; the fastest is kept, and its
   outputs are compared with those of the model. Where the model's own forward with dense layers is faster than all of
   that, it is what runs (eager.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import cpu
from ..modes import uncompiled
from .call import Call, call_arguments
from .cuda import freeze_on_gpu
from .eager import DENSE, NOISE, run_dense
from .file import describe_inputs
from .int8 import check_int8, to_int8
from .layer import FORMATS
from .measure import Options, choose_all, time_networks
from .network import FrozenModel, assemble, cast, check_outputs, runner
from .outputs import BF16_TOLERANCE
from .plan import Plan
from .prepare import prepare
from .sites import clone
from .source import Source, find_source, in_eager_mode, outputs_of
from .trace import LOCK, batch_of, dense_twin, with_batch


def freeze(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    threads: int | None = None,
    min_gain: float = 1.0,
    memory_format: str | None = None,
    tolerance: float | None = None,
    layer_ms: float = 60.0,
    dtype: str | None = None,
    calibration: Iterable[Tensor | Sequence[Tensor]] | None = None,
    percentile: float = 100.0,
) -> FrozenModel:
    """A copy of ``model`` for inference where it is: BatchNorm folded, bias, residual add and activation fused, every
    block-sparse layer run sparse where, and only where, that measured faster than torch's dense layer.

    Fused activations are ReLU, ReLU6, SiLU, Hardswish, Hardsigmoid, Sigmoid and both GELUs. Layers are Conv2d, Conv1d,
    1x1x1 Conv3d, ConvTranspose2d, Linear, pooling, and on the CPU what stands between them: ``x * gate`` with a number
    for each channel (squeeze and excitation), concatenations of channels, layer norms.

    Args:
        model: any module, with or without block-sparse layers; left as it is. One that neither torch.fx nor
            torch.export can trace keeps its own forward, its layers are chosen one by one without fusion, and the plan
            says so. On a GPU the planner of
            ``backends.cuda`` chooses, and the network runs as a CUDA graph (cuda.py); the options from ``threads`` to
            ``memory_format`` and ``layer_ms`` are for the CPU.
        example_inputs: the tensor, or the arguments, of one call: a sequence of positional ones, or a mapping of
            keyword arguments, with tensors also inside lists, tuples and dicts. The batch size should be the one to be
            served: that is what is timed. Later calls may have any batch size, and other image sizes and lengths where
            the model takes them.
        threads: threads to measure with, and that our kernels then use. Default: those torch uses now; later calls
            follow ``torch.set_num_threads``.
        min_gain: keep a layer sparse if it is more than this many times as fast as dense, in three of four samples.
            0 keeps all sparse, ``math.inf`` none.
        memory_format: "contiguous" or "channels_last"; default: whichever makes the whole network faster.
        tolerance: largest difference from the outputs of ``model``, relative to the largest output; default by dtype.
            Given, and by "bf16" and "int8", whose rounding may move them, outputs that are no floats (positions,
            classes) may differ.
        layer_ms: milliseconds to measure one layer for, in each memory format; whole networks have 5/3 of it each.
        dtype: "bf16" computes a float32 model in bfloat16 (best with 16x2 blocks): inputs and outputs stay float32.
            "int8" multiplies bytes in sparse float32 layers where that is faster (CPU; best with 16x4 blocks).
            Activations between layers stay float32; ``tolerance`` (then 0.1) is that of bytes against float32.
        calibration: batches like ``example_inputs`` (no labels) that show int8 layers the range of their inputs; None:
            the example.
        percentile: share of a layer's inputs that its int8 range has to hold, in %; the rest is clamped.

    Raises:
        TypeError, ValueError: inputs that are no tensors, or elsewhere than the model, NaN or infinite weights.
        RuntimeError: the frozen outputs differ from the model's.
    """
    if dtype not in (None, "bf16", "int8"):
        raise ValueError(f"sparsekd.freeze: dtype must be None, 'bf16' or 'int8', got {dtype!r}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"sparsekd.freeze: tolerance must be positive, got {tolerance}; None takes that of the dtype")
    if calibration is not None and dtype != "int8":
        raise ValueError(f"sparsekd.freeze: calibration is for dtype='int8', got dtype={dtype!r}; leave it out")
    model = uncompiled(model)  # torch.compile would compile anew for every size that is tried here
    call, inputs = Call.of(getattr(model, "forward", None), example_inputs)
    _check_devices(inputs)
    batches = [inputs] if calibration is None else _calibration(call, inputs, calibration)
    on_gpu = is_on_gpu(inputs)
    if on_gpu:
        _check_gpu_options(dtype, threads, min_gain, memory_format)
    if memory_format not in (None, *FORMATS):
        raise ValueError(f"sparsekd.freeze: memory_format must be one of {list(FORMATS)}, got {memory_format!r}")
    with LOCK, in_eager_mode():
        _check_parameters(model, inputs[0].device)
        inputs = clone(inputs)
        if on_gpu:
            return freeze_on_gpu(prepare(model), call, inputs, tolerance)
        options = Options(threads, min_gain, layer_ms / 1e3)
        with _torch_threads(threads):
            if dtype == "bf16":
                return _in_bf16(model, call, inputs, tolerance, memory_format, options)
            model = prepare(model)
            source = find_source(model, call, inputs, outputs_of(call.calls(model), inputs), tolerance, pools=True)
            frozen = _on_cpu(source, memory_format, options, may_run_dense=dtype is None)
            if dtype is None:
                check_outputs(frozen, source.traced, source.expected, inputs, tolerance)
                return frozen
            check_outputs(frozen, source.traced, source.expected, inputs, None)
            int8 = to_int8(frozen, batches, percentile, options)
            check_int8(int8, frozen, inputs, tolerance)
            return int8


def _on_cpu(source: Source, memory_format: str | None, options: Options, may_run_dense: bool) -> FrozenModel:
    """The fastest of the variants, as a whole network; not yet compared with the model."""
    inputs, call, traced = source.inputs, source.call, source.trace is not None
    variants = choose_all(source.network, source.sites, memory_format, options)
    networks = {name: assemble(source.network, source.sites, variant.layers) for name, variant in variants.items()}
    dense = dense_twin(source.model, tables=False)  # a dense table may be ten times as large
    runs: dict[str, Callable[..., object]] = {
        "unfrozen": source.run,
        **({} if dense is None else {DENSE: call.calls(dense.requires_grad_(False))}),
        **{name: runner(network, call, traced=traced) for name, network in networks.items()},
    }
    network_us = time_networks(runs, inputs, options)
    fastest = min(networks, key=lambda name: network_us[name])
    if dense is not None and may_run_dense and options.min_gain > 0:
        # Measured again, since the choice is between all that was done here and nothing.
        us = time_networks({name: runs[name] for name in (DENSE, fastest)}, inputs, options)
        if us[DENSE] < NOISE * us[fastest] and network_us[DENSE] < NOISE * network_us[fastest]:
            return run_dense(source, dense, network_us)
    images = _images(networks[fastest], source, network_us, options)
    plan = Plan(
        layers=tuple(plan for _, plan in variants[fastest].choices),
        images=images,
        memory_format=variants[fastest].memory_format,
        threads=torch.get_num_threads(),
        isa=cpu.isa(),
        network_us=network_us,
        notes=source.notes(cpu.missing),
    )
    return FrozenModel(networks[fastest], plan, source.record, source.trace)


def _in_bf16(
    model: nn.Module,
    call: Call,
    inputs: tuple[Tensor, ...],
    tolerance: float | None,
    memory_format: str | None,
    options: Options,
) -> FrozenModel:
    """The model cast and frozen, behind an interface of float32."""
    if any(x.is_floating_point() and x.dtype != torch.float32 for x in (*inputs, *model.parameters())):
        raise TypeError("sparsekd.freeze: dtype='bf16' casts a float32 model and inputs; leave it out for others")
    halves = cast(inputs, torch.float32, torch.bfloat16)
    half_model = prepare(model).bfloat16()
    try:
        expected = outputs_of(call.calls(half_model), halves)
    except NotImplementedError as error:
        if "BFloat16" not in str(error):
            raise
        raise RuntimeError(
            f"sparsekd.freeze: dtype='bf16': torch has no bfloat16 form of something in the model ({error}); freeze it "
            "in float32"
        ) from error
    source = find_source(half_model, call, halves, expected, tolerance, pools=True)
    half = _on_cpu(source, memory_format, options, may_run_dense=False)
    check_outputs(half, source.traced, source.expected, halves, tolerance)
    record = {**half.record, "in_bf16": True, "inputs": describe_inputs(inputs)}
    record["probe"] = list(clone(with_batch(inputs, batch_of(tuple(half.record["probe"])))))
    frozen = FrozenModel(half.network, half.plan, record, source.trace)
    expected = call.calls(prepare(model))(*clone(inputs))
    check_outputs(frozen, None, expected, inputs, BF16_TOLERANCE if tolerance is None else tolerance)
    return frozen


def _images(network: nn.Module, source: Source, network_us: dict[str, float], options: Options) -> int:
    """``Plan.images``: the fastest of some; adds the times to ``network_us``."""
    inputs = source.inputs
    batch = inputs[0].shape[0] if inputs[0].dim() else 1
    if source.trace is None or batch < 2 or cpu.native is None:
        return 0
    names = {size: f"slices of {size}" if size else "whole" for size in (0, 1, 2, 4, 8, 16) if size < batch}
    runs = {name: runner(network, source.call, size) for size, name in names.items()}
    us = time_networks(runs, inputs, options)
    fastest = min(names, key=lambda size: us[names[size]])
    if fastest:
        network_us[names[fastest]] = us[names[fastest]]
    return fastest


def _calibration(call: Call, example: tuple[Tensor, ...], batches: Any) -> list[tuple[Tensor, ...]]:
    """The tensors of every batch, in the order of the example's. Raises ValueError unless there is a batch, and all are
    calls like the example."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"sparsekd.freeze: calibration must be several batches, got {type(batches).__name__}; pass [x]"
        )
    found = []
    for number, batch in enumerate(batches):
        try:
            tensors = call.flatten(*call_arguments(batch))
        except TypeError as error:
            raise ValueError(
                f"sparsekd.freeze: calibration batch {number} must be inputs like example_inputs, without labels: "
                f"{error}"
            ) from None
        if [_kind(x) for x in tensors] != [_kind(x) for x in example]:
            raise ValueError(
                f"sparsekd.freeze: calibration batch {number} must be inputs like example_inputs, "
                f"{_kinds(example)}, got {_kinds(tensors)}; convert it"
            )
        _check_devices((*tensors, example[0]))
        found.append(tensors)
    if not found:
        raise ValueError(
            "sparsekd.freeze: calibration has no batch; an iterator that has been used gives none, pass a list"
        )
    return found


def _kind(x: Any) -> Any:
    """Whole numbers of any type will do for each other."""
    return (x.dtype if x.is_floating_point() else int, x.dim()) if isinstance(x, Tensor) else type(x)


def _kinds(inputs: Sequence[Any]) -> str:
    return ", ".join(
        f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        for x in inputs
    )


def _check_devices(inputs: tuple[Tensor, ...]) -> None:
    for x in inputs:
        if x.device != inputs[0].device or x.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"sparsekd.freeze: expected all inputs on the CPU, or all on one GPU, got one on {x.device}"
            )


def is_on_gpu(inputs: tuple[Tensor, ...]) -> bool:
    return any(x.is_cuda for x in inputs)


def _check_gpu_options(dtype: str | None, threads: int | None, min_gain: float, memory_format: str | None) -> None:
    if dtype is not None:
        raise ValueError(f"sparsekd.freeze: dtype={dtype!r} is for the CPU; move model and inputs there")
    for name, given, only in (
        ("threads", threads, (None,)),
        ("min_gain", min_gain, (1.0,)),
        ("memory_format", memory_format, (None, "channels_last")),
    ):
        if given not in only:
            raise ValueError(
                f"sparsekd.freeze: {name} is for the CPU; on a GPU the planner chooses, in channels_last, got {given!r}"
            )


def _check_parameters(model: nn.Module, device: torch.device) -> None:
    where = "the CPU" if device.type == "cpu" else str(device)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"sparsekd.freeze: {name} has no values yet; run the model once")
        if parameter.device != device:
            raise ValueError(
                f"sparsekd.freeze: expected a model on {where} like its inputs, got {name} on {parameter.device}; "
                f"use model.to({str(device)!r})"
            )
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(
                f"sparsekd.freeze: expected finite weights, got NaN or infinity in {name}; "
                "load a checkpoint from before the divergence"
            )


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None and threads < 1:
        raise ValueError(f"sparsekd.freeze: threads must be 1 or more, got {threads}")
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
