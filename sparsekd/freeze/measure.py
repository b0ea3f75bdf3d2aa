"""Fold a layer, time it dense and sparse on this machine, keep the faster."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import cpu
from ..blocks import BlockSparse
from ..nn import BlockSparseLayer, split_padding
from ..timing import samples
from .between import between_geometry, between_operands
from .chain import alone
from .kinds import is_conv, is_transposed
from .layer import FORMATS, FrozenLayer
from .norms import scale_and_shift
from .packed import DTYPES, cpu_layer
from .plan import Geometry, LayerPlan
from .sites import Site, clone, weight_shape


@dataclass(frozen=True)
class Options:
    threads: int | None
    min_gain: float
    seconds: float  # to measure one layer for

    @property
    def network_seconds(self) -> float:
        """To measure one whole network for: 0.1 where a layer has 60 ms."""
        return self.seconds / 0.6


Choice = tuple[FrozenLayer, LayerPlan]
_LEAST_GAIN = 0.5  # alone, of a layer of ours that may still pay between two others


@dataclass(frozen=True)
class Variant:
    """One way to run a network."""

    memory_format: str
    choices: list[Choice]

    @property
    def layers(self) -> dict[str, FrozenLayer]:
        return {plan.name: layer for layer, plan in self.choices}


def choose_all(
    source: nn.Module, sites: Sequence[Site], memory_format: str | None, options: Options
) -> dict[str, Variant]:
    """The variants worth timing as whole networks: in each memory format the layers that are fastest alone, and
    where that breaks chains, ours throughout. Between two layers of ours, one of torch costs more than its own time."""
    choices: dict[str, list[tuple[Choice, Choice]]] = {}
    modules = [source.get_submodule(site.target) for site in sites]
    layouts = [memory_format] if memory_format else list(FORMATS)
    if not any(is_conv(module) or type(module) is nn.BatchNorm2d for module in modules):
        layouts = layouts[:1]
    for site, module in zip(sites, modules, strict=True):
        geometry = geometry_of(site, module)
        folded = fold(site, module, None if site.norm is None else source.get_submodule(site.norm))
        if site.scale is not None:
            folded = _scaled(*folded, operator.attrgetter(site.scale)(source).detach())
        for layout in layouts:
            first = choices.get(layouts[0], [])
            one_format = geometry.kind in ("linear", "layer_norm")  # of its memory
            measured = one_format and layout != layouts[0]
            chosen = first[-1] if measured else _choose(site, geometry, *folded, layout, options)
            choices.setdefault(layout, []).append(chosen)
    variants = {layout: Variant(layout, [best for best, _ in choices.get(layout, [])]) for layout in layouts}
    for layout, pairs in choices.items():
        if any(best is not ours for best, ours in pairs):
            variants[f"{layout}, ours throughout"] = Variant(layout, [ours for _, ours in pairs])
    return variants


def time_networks(
    networks: Mapping[str, Callable[..., Any]], inputs: tuple[Tensor, ...], options: Options
) -> dict[str, float]:
    """Median microseconds of one call of each."""
    calls = {name: partial(network, *clone(inputs)) for name, network in networks.items()}
    return {name: statistics.median(us) for name, us in measure(calls, options.network_seconds * len(calls)).items()}


def _choose(
    site: Site, geometry: Geometry, weight: Tensor | BlockSparse, bias: Tensor | None, layout: str, options: Options
) -> tuple[Choice, Choice]:
    """The faster of the dense and the sparse layer in one memory format, and what was measured; and ours, if the other
    one is not much faster."""
    build = partial(cpu_layer, geometry, weight, bias, memory_format=layout, threads=options.threads)
    operands = _operands(site, geometry, weight, layout)
    layers = {"dense": build(chosen="dense")}
    ours = "sparse" if isinstance(weight, BlockSparse) else "native"
    why = why_dense(geometry, weight, layout)
    if not why:
        layers[ours] = build(chosen=ours)
    # In a network that was traced a layer of ours is part of a chain, without Python around it.
    chained = bool(site.nodes) and ours in layers and layers[ours].step is not None
    calls: dict[str, Callable[[], object]]
    calls = {name: partial(layer.run, *operands) for name, layer in layers.items()}
    if chained:
        calls[ours] = alone(layers[ours], operands)
    # A layer with nothing to choose is timed for the reader of the plan only.
    taken = measure(calls, options.seconds if len(calls) == 2 else options.seconds / 8)
    medians = {name: statistics.median(us) for name, us in taken.items()}
    chosen, may_pay = "dense", False
    if not why:
        gains = sorted(dense / our for dense, our in zip(taken["dense"], taken[ours], strict=True))
        gain, surely = statistics.median(gains), gains[len(gains) // 4]
        # min_gain is about sparsity: a layer that was never pruned has to be faster.
        chosen = ours if surely > (options.min_gain if ours == "sparse" else max(options.min_gain, 1.0)) else "dense"
        may_pay = chained and chosen == "dense" and options.min_gain <= 1 and gain > _LEAST_GAIN
        why = f"{ours} is {gain:.2f}x as fast" + ("" if chosen == ours or gain < 1 else ", within the noise")
    pattern, density = (str(weight.pattern), density_of(weight)) if isinstance(weight, BlockSparse) else (None, 1.0)
    us = (medians["dense"], medians.get(ours))
    plan = LayerPlan(site.name, geometry, pattern, density, *us, chosen, why)
    best = layers[chosen], plan
    if not may_pay:
        return best, best
    return best, (layers[ours], replace(plan, chosen=ours, why=f"{why}; faster between its neighbours"))


def _operands(site: Site, geometry: Geometry, weight: Tensor | BlockSparse, layout: str) -> list[Tensor]:
    if geometry.between:
        assert isinstance(weight, Tensor)
        return between_operands(geometry, weight.dtype, layout)
    x, residual = random_operands(geometry, weight, layout, "contiguous" if site.contiguous else layout)
    return [x] if residual is None else [x, residual]


def why_dense(geometry: Geometry, weight: Tensor | BlockSparse, memory_format: str) -> str:
    """Why ``sparsekd._C`` cannot run a layer, or ""."""
    if cpu.native is None:
        return cpu.missing
    dtype = weight.values.dtype if isinstance(weight, BlockSparse) else weight.dtype
    if geometry.between:
        return (
            "" if dtype in DTYPES else f"kernels take float32 and bfloat16, this is {str(dtype).removeprefix('torch.')}"
        )
    if geometry.kind == "conv_transpose2d" and isinstance(weight, Tensor):
        return "not block-sparse, and transposed"
    single = geometry.depthwise and isinstance(weight, Tensor)
    if dtype not in ((torch.float32,) if single else DTYPES):
        takes = "float32" if single else "float32 and bfloat16"
        return f"kernels take {takes}, the layer is {str(dtype).removeprefix('torch.')}"
    if (single or geometry.pool) and memory_format != "channels_last":
        return "the kernels for single channels take channels_last"
    if isinstance(weight, Tensor) and geometry.groups > 1 and not geometry.depthwise and not geometry.pool:
        return "not block-sparse, and grouped"
    return ""


def density_of(weight: BlockSparse) -> float:
    return int(weight.block_sizes().sum()) / max(math.prod(weight.shape), 1)


def random_operands(
    geometry: Geometry, weight: Tensor | BlockSparse, layout: str, x_layout: str
) -> tuple[Tensor, Tensor | None]:
    """Input and residual at the example's shape, drawn on the weight's device by a generator of our own: the caller's
    is left alone."""
    values = weight.values if isinstance(weight, BlockSparse) else weight
    dtype, device = values.dtype, values.device
    generator = torch.Generator(device).manual_seed(0)
    batch = geometry.input[:1] if geometry.kind != "linear" or len(geometry.input) > 1 else ()
    x, residual = (
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape in (geometry.input, (*batch, *geometry.output))
    )
    if x.dim() == 4 and geometry.kind != "linear":
        x = x.contiguous(memory_format=FORMATS[x_layout])
    if residual.dim() == 4 and geometry.kind != "linear":
        residual = residual.contiguous(memory_format=FORMATS[layout])
    return x, residual if geometry.residual else None


def measure(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Microseconds of one call, sampled in turns for about ``seconds``."""
    return {name: [1e6 * one for one in taken] for name, taken in samples(calls, seconds).items()}


def geometry_of(site: Site, module: Any) -> Geometry:
    fused: dict[str, Any] = {"batch_norm": site.norm is not None, "residual": site.add is not None}
    fused["activation"] = site.activation
    if site.pool is not None:
        kind, window, _, flat = site.pool
        sizes = window or (*site.input[2:], 1, 1, 0, 0, 1, 1)
        kernel, *steps = (tuple(sizes[i : i + 2]) for i in range(0, 8, 2))
        channels = site.input[1]
        walk: Any = dict(zip(("stride", "padding", "dilation"), steps, strict=True))
        weight = (channels, 1, *kernel)
        return Geometry(kind, site.input, weight, **walk, groups=channels, flat=flat, whole=not window)
    if site.between is not None:
        return between_geometry(site.between, site.input, residual=site.add is not None, activation=site.activation)
    if type(module) is nn.BatchNorm2d:
        channels = module.num_features
        return Geometry("norm", site.input, (channels,), groups=channels, activation=site.activation)
    if not is_conv(module):
        return Geometry("linear", site.input, weight_shape(module), **fused)
    padding, pad = split_padding(module)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if is_transposed(module):
        fused["output_padding"] = tuple(module.output_padding)
    return Geometry(
        "conv_transpose2d" if is_transposed(module) else "conv2d",
        site.input,
        weight_shape(module),
        tuple(module.stride),
        tuple(padding),
        tuple(module.dilation),
        module.groups,
        None if pad is None else tuple(pad),
        mode,
        **fused,
    )


def fold(site: Site, layer: Any, norm: Any) -> tuple[Tensor | BlockSparse, Tensor | None]:
    """Weight and bias of a layer with the BatchNorm behind it in them, computed in float64.

    bn(Wx + b) = (scale * W) x + shift + scale * (b - mean),  scale = gamma / sqrt(var + eps)
    """
    weight: Tensor | BlockSparse
    bias: Tensor | None
    if site.pool is not None:
        return torch.empty(0, dtype=getattr(torch, site.pool[2])), None  # says what it pools
    if site.between is not None:
        dtype = getattr(torch, site.between.dtype)
        if site.between.kind != "layer_norm":
            return torch.empty(0, dtype=dtype), None
        ones = torch.ones(layer.normalized_shape, dtype=dtype)
        return (
            ones if layer.weight is None else layer.weight.detach(),
            None if layer.bias is None else layer.bias.detach(),
        )
    if type(layer) is nn.BatchNorm2d:
        dtype = layer.running_mean.dtype  # type: ignore[union-attr]
        weight, bias = (x.to(dtype) for x in scale_and_shift(layer, None))
    else:
        weight = layer.blocks if isinstance(layer, BlockSparseLayer) else layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach()
    if norm is not None:
        dtype = layer.values.dtype if isinstance(layer, BlockSparseLayer) else layer.weight.dtype
        scale, shift = scale_and_shift(norm, bias)
        scaled = _scale_outputs(weight, scale, layer.groups) if is_transposed(layer) else _scale_rows(weight, scale)
        weight, bias = scaled, shift.to(dtype)
    for tensor in (weight.values if isinstance(weight, BlockSparse) else weight, bias):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(
                f"sparsekd.freeze: expected finite weights, got NaN or infinity in {site.target}"
                f"{f' with {site.norm} folded in' if site.norm else ''}; load a checkpoint from before the divergence"
            )
    return weight, bias


def _scaled(weight: Tensor | BlockSparse, bias: Tensor | None, scale: Tensor) -> tuple[Any, Tensor | None]:
    """scale * (Wx + b), computed in float64."""
    shift = None if bias is None else (bias.double() * scale.double()).to(bias.dtype)
    return _scale_rows(weight, scale.double()), shift


def _scale_outputs(weight: Tensor | BlockSparse, scale: Tensor, groups: int) -> Tensor | BlockSparse:
    """The weight ``[C, K/groups, R, S]`` of a transposed convolution with output k times ``scale[k]`` (float64)."""
    dense = weight if isinstance(weight, Tensor) else weight.to_dense()
    of_inputs = scale.view(groups, -1).repeat_interleave(dense.shape[0] // groups, 0)
    scaled = (dense.double() * of_inputs[:, :, None, None]).to(dense.dtype)
    return scaled if isinstance(weight, Tensor) else BlockSparse.from_dense(scaled, weight.pattern, mask=weight.mask())


def _scale_rows(weight: Tensor | BlockSparse, scale: Tensor) -> Tensor | BlockSparse:
    """The weight with output row k times ``scale[k]`` (float64)."""
    if isinstance(weight, Tensor):
        return (weight.double() * scale.view(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype)
    bh, row_blocks = weight.pattern.bh, weight.row_ptr.shape[0] - 1
    padded = scale.new_zeros(row_blocks * bh)  # rows of padding stay zero
    padded[: scale.shape[0]] = scale
    of_block = padded.view(row_blocks, bh)[weight.row_block()]  # [nnzb, bh]
    return replace(weight, values=(weight.values.double() * of_block.unsqueeze(2)).to(weight.values.dtype))
