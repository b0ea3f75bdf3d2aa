"""A frozen network whose block-sparse layers multiply bytes where that measured faster: `freeze(..., dtype="int8")`."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import BlockSparse
from .layer import FrozenLayer, Run
from .measure import Options, measure
from .network import FrozenModel
from .outputs import deviation
from .packed import other_sizes
from .plan import Geometry, LayerPlan
from .quantize import MOST_TERMS, ByteScale, Observer, longest_row, quantize_layer


def to_int8(
    frozen: FrozenModel,
    batches: Iterable[Sequence[Tensor]],
    percentile: float,
    options: Options,
) -> FrozenModel:
    """``frozen`` with int8 inside its sparse layers; between layers everything stays float32.

    The input range of a layer is what ``batches`` showed it. ``save`` keeps the float32 blocks and that range.
    """
    network = copy.deepcopy(frozen.network)
    layers = {name: one for name, one in network.named_modules() if isinstance(one, FrozenLayer) and _takes_bytes(one)}
    run = network if frozen.trace is not None else frozen.call.calls(network)
    seen = _observe(run, layers, list(batches), percentile)
    plans = []
    for one in frozen.plan:
        if one.name in seen:
            observer, operands = seen[one.name]
            one = _choose(layers[one.name], one, observer.scale(), operands, options)
        plans.append(one)
    note = (
        "int8 layers take their input scales from the calibration batches; a saved file holds their float32 blocks and "
        "these scales, and computes with bytes where the kernels are"
    )
    plan = replace(frozen.plan, layers=tuple(plans), notes=(*frozen.plan.notes, note))
    return FrozenModel(network, plan, frozen.record, frozen.trace)


def check_int8(int8: FrozenModel, frozen: FrozenModel, inputs: Sequence[Tensor], tolerance: float | None) -> None:
    """Raise RuntimeError if rounding to bytes moved the outputs by more than ``tolerance`` (0.1) of the largest."""
    worst = deviation(int8.result(*inputs), frozen.result(*inputs), tolerance or 0.1)
    if worst > 1.0:
        raise RuntimeError(
            f"sparsekd.freeze: the int8 outputs differ by {worst:.3g} times the tolerance of {tolerance or 0.1:.3g}; "
            "calibrate on more or other batches, lower the percentile, or freeze in float32"
        )


def _takes_bytes(layer: FrozenLayer) -> bool:
    values = dict(layer.named_buffers()).get("values")
    if layer.geometry.kind == "conv_transpose2d":
        return False
    return values is not None and values.dtype == torch.float32 and longest_row(_weight_of(layer)) <= MOST_TERMS


def _weight_of(layer: FrozenLayer) -> BlockSparse:
    assert layer.pattern is not None
    values, row_ptr, col_idx = (layer.get_buffer(name) for name in ("values", "row_ptr", "col_idx"))
    return BlockSparse(values, row_ptr, col_idx, layer.geometry.weight, layer.pattern)


Seen = dict[str, tuple[Observer, tuple[Any, ...]]]


def _observe(
    run: Callable[..., Any], layers: dict[str, FrozenLayer], batches: Sequence[Sequence[Tensor]], percentile: float
) -> Seen:
    """For each layer that was called, the range of its inputs, and the operands of its first call."""
    seen: Seen = {}

    def look(name: str, _module: nn.Module, operands: tuple[Any, ...]) -> None:
        if name not in seen:
            seen[name] = (Observer(percentile), tuple(x if x is None else x.clone() for x in operands[:2]))
        seen[name][0](operands[0])

    hooks = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            run(*(x.clone() for x in batch))
    for hook in hooks:
        hook.remove()
    return seen


def _choose(
    layer: FrozenLayer,
    plan: LayerPlan,
    scale: ByteScale,
    operands: tuple[Any, ...],
    options: Options,
) -> LayerPlan:
    """Gives the layer its int8 call if that is surely faster, and says so in its plan."""
    calls: dict[str, Callable[[], object]]
    run = _int8_run(layer, scale, options.threads)
    calls = {"float32": partial(layer.run, *operands), "int8": partial(run, *operands)}
    samples = measure(calls, options.seconds)
    gains = sorted(one / other for one, other in zip(samples["float32"], samples["int8"], strict=True))
    chosen = gains[len(gains) // 4] > options.min_gain
    if chosen:
        _take(layer, run, scale)
    us = statistics.median(samples["int8"])
    kept = "int8" if chosen else "float32"
    return replace(plan, why=f"{plan.why}; int8 {us:.1f} us, {statistics.median(gains):.2f}x as fast: {kept}")


def _take(layer: FrozenLayer, run: Run, scale: ByteScale) -> None:
    layer.run, layer.step = run, None  # bytes are not for chains
    layer.bytes = (scale.scale, scale.zero)


def give_bytes(layer: FrozenLayer, scale: ByteScale, threads: int | None) -> None:
    """Makes a layer multiply bytes, as a file says that it did. Raises ValueError where it cannot."""
    if not _takes_bytes(layer):
        raise ValueError("is damaged: a layer that is int8 in it cannot be")
    _take(layer, _int8_run(layer, scale, threads), scale)


def _int8_run(layer: FrozenLayer, scale: ByteScale, threads: int | None) -> Run:
    bias = dict(layer.named_buffers()).get("bias")
    weight = _weight_of(layer)

    def make(geometry: Geometry) -> Run:
        options: dict[str, Any] = {"activation": geometry.activation, "threads": threads}
        if geometry.kind == "conv2d":
            options |= {"image": geometry.padded_image, "groups": geometry.groups}
            options |= {name: getattr(geometry, name) for name in ("stride", "padding", "dilation")}
        call, pad, pad_mode = quantize_layer(weight, bias, scale, **options), geometry.pad, geometry.pad_mode
        image, size = geometry.kind == "conv2d", geometry.input[2:]
        elsewhere = other_sizes(geometry, make)

        def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
            if image and x.dim() == 4 and x.shape[2:] != size:
                return elsewhere(x, residual)
            return call(x if pad is None else F.pad(x, pad, pad_mode), residual)

        return run

    return make(layer.geometry)
