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
from .network import FrozenModel, deviation
from .plan import LayerPlan
from .quantize import MOST_TERMS, ByteScale, Observer, longest_row, quantize_layer


def to_int8(
    frozen: FrozenModel,
    batches: Iterable[Sequence[Tensor]],
    percentile: float,
    options: Options,
) -> FrozenModel:
    """``frozen`` with int8 inside its sparse layers; between layers everything stays float32.

    The input range of a layer is what ``batches`` showed it. ``save`` keeps the float32 blocks.
    """
    network = copy.deepcopy(frozen.network)
    layers = {name: one for name, one in network.named_modules() if isinstance(one, FrozenLayer) and _takes_bytes(one)}
    seen = _observe(network, layers, list(batches), percentile)
    plans = []
    for one in frozen.plan:
        if one.name in seen:
            observer, operands = seen[one.name]
            one = _choose(layers[one.name], one, observer.scale(), operands, options)
        plans.append(one)
    note = "int8 layers take their input scales from the calibration batches; a saved file holds their float32 blocks"
    plan = replace(frozen.plan, layers=tuple(plans), notes=(*frozen.plan.notes, note))
    return FrozenModel(network, plan, frozen.record)


def check_int8(int8: FrozenModel, frozen: FrozenModel, inputs: Sequence[Tensor], tolerance: float | None) -> None:
    """Raise RuntimeError if rounding to bytes moved the outputs by more than ``tolerance`` (0.1) of the largest."""
    worst = deviation(int8(*inputs), frozen(*inputs), tolerance or 0.1)
    if worst > 1.0:
        raise RuntimeError(
            f"sparsekd.freeze: the int8 outputs differ by {worst:.3g} times the tolerance of {tolerance or 0.1:.3g}; "
            "calibrate on more or other batches, lower the percentile, or freeze in float32"
        )


def _takes_bytes(layer: FrozenLayer) -> bool:
    values = dict(layer.named_buffers()).get("values")
    return values is not None and values.dtype == torch.float32 and longest_row(_weight_of(layer)) <= MOST_TERMS


def _weight_of(layer: FrozenLayer) -> BlockSparse:
    assert layer.pattern is not None
    values, row_ptr, col_idx = (layer.get_buffer(name) for name in ("values", "row_ptr", "col_idx"))
    return BlockSparse(values, row_ptr, col_idx, layer.geometry.weight, layer.pattern)


Seen = dict[str, tuple[Observer, tuple[Any, ...]]]


def _observe(
    network: nn.Module, layers: dict[str, FrozenLayer], batches: Sequence[Sequence[Tensor]], percentile: float
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
            network(*(x.clone() for x in batch))
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
        layer.run, layer.step = run, None  # bytes are not for chains
    us = statistics.median(samples["int8"])
    kept = "int8" if chosen else "float32"
    return replace(plan, why=f"{plan.why}; int8 {us:.1f} us, {statistics.median(gains):.2f}x as fast: {kept}")


def _int8_run(layer: FrozenLayer, scale: ByteScale, threads: int | None) -> Run:
    geometry = layer.geometry
    options: dict[str, Any] = {"activation": geometry.activation, "threads": threads}
    if geometry.kind == "conv2d":
        options |= {"image": geometry.padded_image, "groups": geometry.groups}
        options |= {name: getattr(geometry, name) for name in ("stride", "padding", "dilation")}
    bias = dict(layer.named_buffers()).get("bias")
    call, pad, pad_mode = quantize_layer(_weight_of(layer), bias, scale, **options), geometry.pad, geometry.pad_mode

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        return call(x if pad is None else F.pad(x, pad, pad_mode), residual)

    return run
