"""The inference network: folded, fused, and each layer as fast as this machine can run it.

    frozen = sparsekd.freeze(student, x)      # a copy; the student stays as it is
    print(frozen.plan)                        # per layer: dense us, sparse us, which one was kept, why
    y = frozen(x)                             # any batch size, images of the example's size
    frozen.save("student.frozen")
    frozen = sparsekd.load_frozen("student.frozen", build_student())

1. torch.fx traces the model. Every convolution and linear layer, with the BatchNorm, residual add and ReLU behind it,
   becomes a `Site`, and that one call: ``act(conv(x) + bias + residual)``.
2. BatchNorm is folded into weight and bias, exactly.
3. Each layer is timed dense (torch) and by ``sparsekd._C``, on its kept blocks or on all it has, at its input shape.
   Ours is kept only where it is faster by more than the noise. Everything else stays with torch.
4. Neighbouring layers of ours become one call (chain.py). The whole network is timed contiguous and channels_last, also
   with ours throughout, and with larger batches in slices of some images for each thread; the fastest is kept, and its
   outputs are compared with those of the model.

A file holds tensors and JSON, no code and no pickle: the structure comes from a model that the reader builds, as with a
state dict, and the file says which of its nodes to fuse. So no file can make `load_frozen` run anything.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import checkpoint
from ..backends import cpu
from ..blocks import BlockPattern, BlockSparse
from ..convert import SPARSE_TYPES
from .cuda import FrozenCudaModel, freeze_on_gpu, tolerance_of
from .int8 import check_int8, to_int8
from .layer import FORMATS, FrozenLayer
from .measure import Options, choose_all, geometry_of, time_networks, why_dense
from .network import BF16_TOLERANCE, FrozenModel, assemble, cast, check_no_nan, check_outputs, deviation, runner
from .plan import Geometry, LayerPlan, Plan
from .sites import LAYERS, Site, clone, find_eager_sites, find_sites, trace

__all__ = ["FrozenCudaModel", "FrozenModel", "Geometry", "LayerPlan", "Plan", "freeze", "load_frozen"]


def freeze(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
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
    """A copy of ``model`` for inference where it is: BatchNorm folded, bias, residual add and ReLU fused, and every
    block-sparse layer run sparse where, and only where, that measured faster than torch's dense layer.

    Args:
        model: any module, with or without block-sparse layers; left as it is. One that torch.fx cannot trace keeps its
            own forward, its layers are chosen one by one without fusion, and the plan says so. On a GPU the planner of
            ``backends.cuda`` chooses, and the network runs as a CUDA graph (cuda.py); the options from ``threads`` to
            ``memory_format`` and ``layer_ms`` are for the CPU.
        example_inputs: the tensor, or the tensors, of one call. The batch size should be the one to be served: that is
            what is timed. Later calls may have any batch size, the other dimensions stay.
        threads: threads to measure with, and that our kernels then use. Default: those torch uses now; later calls
            follow ``torch.set_num_threads``.
        min_gain: keep a layer sparse if it is more than this many times as fast as dense, in three of four samples.
            0 keeps all sparse, ``math.inf`` none.
        memory_format: "contiguous" or "channels_last"; default: whichever makes the whole network faster.
        tolerance: largest difference from the outputs of ``model``, relative to the largest output; default by dtype.
        layer_ms: milliseconds to measure one layer for, in each memory format.
        dtype: "bf16" computes a float32 model in bfloat16 (best with 16x2 blocks): inputs and outputs stay float32.
            "int8" multiplies bytes in sparse float32 layers where that is faster (CPU; best with 16x4 blocks).
            Activations between layers stay float32; ``tolerance`` (then 0.1) is that of bytes against float32.
        calibration: batches like ``example_inputs`` that show int8 layers the range of their inputs; None: the example.
        percentile: share of a layer's inputs that its int8 range has to hold, in %; the rest is clamped.

    Raises:
        TypeError, ValueError: inputs that are no tensors, or elsewhere than the model, NaN or infinite weights.
        RuntimeError: the frozen outputs differ from the model's.
    """
    if dtype not in (None, "bf16", "int8"):
        raise ValueError(f"sparsekd.freeze: dtype must be None, 'bf16' or 'int8', got {dtype!r}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"sparsekd.freeze: tolerance must be positive, got {tolerance}; None takes that of the dtype")
    inputs = _as_inputs(example_inputs)
    on_gpu = _on_gpu(inputs)
    if on_gpu:
        if dtype is not None:
            raise ValueError(f"sparsekd.freeze: dtype={dtype!r} is for the CPU; move model and inputs there")
        _check_gpu_options(threads, min_gain, memory_format)
    if memory_format not in (None, *FORMATS):
        raise ValueError(f"sparsekd.freeze: memory_format must be one of {list(FORMATS)}, got {memory_format!r}")
    _check_parameters(model, inputs[0].device)
    if dtype == "bf16":
        options = {"threads": threads, "min_gain": min_gain, "memory_format": memory_format, "layer_ms": layer_ms}
        return _freeze_in_bf16(model, inputs, tolerance, options)
    model = _prepare(model)
    with torch.no_grad(), _torch_threads(threads):
        expected = model(*clone(inputs))
        check_no_nan(expected)
        tolerance = tolerance_of(expected) if on_gpu and tolerance is None else tolerance
        traced, note = _trace_that_agrees(model, inputs, expected, tolerance)
        sites = find_eager_sites(model, inputs) if traced is None else find_sites(traced, inputs, pools=not on_gpu)
        source: nn.Module = model if traced is None else traced
        record = _record(model, traced, sites, inputs)
        if on_gpu:
            notes = _notes(model, sites, note, missing="")
            return freeze_on_gpu(model, source, sites, inputs, expected, record, notes, tolerance)
        variants = choose_all(source, sites, memory_format, Options(threads, min_gain, layer_ms / 1e3))
        networks = {name: assemble(source, sites, variant.layers) for name, variant in variants.items()}
        network_us = time_networks({"unfrozen": model, **{name: runner(one) for name, one in networks.items()}}, inputs)
        fastest = min(networks, key=lambda name: network_us[name])
        images = _images(networks[fastest], inputs, network_us)
        plan = Plan(
            layers=tuple(plan for _, plan in variants[fastest].choices),
            images=images,
            memory_format=variants[fastest].memory_format,
            threads=torch.get_num_threads(),
            isa=isa(),
            network_us=network_us,
            notes=_notes(model, sites, note, cpu.missing),
        )
        frozen = FrozenModel(networks[fastest], plan, record)
        check_outputs(frozen, traced, expected, inputs, tolerance if dtype is None else None)
        if dtype is None:
            return frozen
        batches = [inputs] if calibration is None else [_as_inputs(batch) for batch in calibration]
        int8 = to_int8(
            frozen, batches, threads=threads, min_gain=min_gain, percentile=percentile, seconds=layer_ms / 1e3
        )
        check_int8(int8, frozen, inputs, tolerance)
        return int8


def load_frozen(path: str | os.PathLike[str], model: nn.Module, *, threads: int | None = None) -> FrozenModel:
    """The frozen network that ``FrozenModel.save`` wrote.

    Args:
        path: the file.
        model: a freshly built model of the same architecture, its layers dense or block-sparse, its weights irrelevant;
            left as it is. It gives the structure, the file gives tensors and choices.
        threads: as for `freeze`.

    What was chosen stays chosen: freeze again on another machine. Without the compiled module every layer runs dense.

    Raises FileNotFoundError, and ValueError for a damaged file or the file of another model.
    """
    state = checkpoint.load_state(path)
    if not isinstance(state, dict) or state.get("kind") != _KIND:
        raise ValueError(f"sparsekd.load_frozen: {path} holds no frozen network; FrozenModel.save writes one")
    model = _prepare(model)
    model = model.bfloat16() if state.get("in_bf16") else model
    _check_same(path, "tensor", state["model"], checkpoint.fingerprint(model))
    traced, note = trace(model, len(state["inputs"])) if state["nodes"] else (None, "")
    _check_same(path, note or "traced nodes", state["nodes"], _nodes(traced))
    source: nn.Module = model if traced is None else traced
    plan, layers = Plan.from_dict(state["plan"]), {}
    sites = [Site(**site) for site in state["sites"]]
    for site in sites:
        place, tensors = plan[site.name], state["layers"][site.name]
        ours = geometry_of(site, source.get_submodule(site.target))
        _check_same(path, "layer", {site.name: asdict(place.geometry)}, {site.name: asdict(ours)})
        weight, bias = _weight_and_bias(path, place, tensors)
        chosen = "dense" if why_dense(place.geometry, weight, plan.memory_format) else place.chosen
        layers[site.name] = FrozenLayer(
            place.geometry, weight, bias, chosen=chosen, memory_format=plan.memory_format, threads=threads
        )
    network = assemble(source, sites, layers)
    network.load_state_dict({**network.state_dict(), **state["rest"]})
    record = {key: state[key] for key in ("kind", "model", "nodes", "sites", "inputs", "in_bf16") if key in state}
    return FrozenModel(network, _on_this_machine(plan), record)


_KIND = "sparsekd-frozen"


def _freeze_in_bf16(
    model: nn.Module, inputs: tuple[Tensor, ...], tolerance: float | None, options: dict[str, Any]
) -> FrozenModel:
    """The model cast and frozen, behind an interface of float32."""
    if any(x.is_floating_point() and x.dtype != torch.float32 for x in (*inputs, *model.parameters())):
        raise TypeError("sparsekd.freeze: dtype='bf16' casts a float32 model and inputs; leave it out for others")
    half = freeze(copy.deepcopy(model).bfloat16(), cast(inputs, torch.float32, torch.bfloat16), **options)
    record = {**half._record, "in_bf16": True, "inputs": [[list(x.shape), str(x.dtype)] for x in inputs]}
    frozen = FrozenModel(half.network, half.plan, record)
    with torch.no_grad():
        check_outputs(frozen, None, _prepare(model)(*clone(inputs)), inputs, tolerance or BF16_TOLERANCE)
    return frozen


def _images(network: nn.Module, inputs: tuple[Tensor, ...], network_us: dict[str, float]) -> int:
    """``Plan.images``: the fastest of some; adds the times to ``network_us``."""
    batch = inputs[0].shape[0] if inputs[0].dim() else 1
    if not isinstance(network, fx.GraphModule) or batch < 2 or cpu.native is None:
        return 0
    names = {size: f"slices of {size}" if size else "whole" for size in (0, 1, 2, 4, 8, 16) if size < batch}
    us = time_networks({name: runner(network, size) for size, name in names.items()}, inputs)
    fastest = min(names, key=lambda size: us[names[size]])
    if fastest:
        network_us[names[fastest]] = us[names[fastest]]
    return fastest


def _as_inputs(example: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(f"sparsekd.freeze: example_inputs must be a tensor or several, got {type(x).__name__}")
        if x.device != inputs[0].device or x.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"sparsekd.freeze: expected all inputs on the CPU, or all on one GPU, got one on {x.device}"
            )
    return inputs


def _on_gpu(inputs: tuple[Tensor, ...]) -> bool:
    return any(x.is_cuda for x in inputs)


def _check_gpu_options(threads: int | None, min_gain: float, memory_format: str | None) -> None:
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


def _prepare(model: nn.Module) -> nn.Module:
    """A copy in eval mode; a bare layer becomes a network of one."""
    model = copy.deepcopy(model).eval()
    return nn.Sequential(model) if type(model) in LAYERS else model


def _trace_that_agrees(
    model: nn.Module, inputs: tuple[Tensor, ...], expected: Any, tolerance: float | None
) -> tuple[fx.GraphModule | None, str]:
    """A trace that computes what the model does, or (None, why there is none).

    torch.fx records ``a += b`` as ``a = a + b``, which differs where ``a`` is a view, and only one path of Python code.
    """
    traced, note = trace(model, len(inputs))
    if traced is None:
        return None, note
    try:
        got = traced(*clone(inputs))
    except Exception as error:  # the model itself has just run
        return None, f"what torch.fx traces of the model fails ({type(error).__name__}: {error})".splitlines()[0]
    if deviation(got, expected, tolerance) > 1.0:
        return None, "what torch.fx traces of the model computes something else"
    return traced, ""


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


def isa() -> str | None:
    return None if cpu.native is None else cpu.native.isa()


def _notes(model: nn.Module, sites: Sequence[Site], note: str, missing: str) -> tuple[str, ...]:
    notes = []
    if note:
        notes.append(f"{note}: layers were chosen one by one, nothing is fused or folded")
    sparse = [name for name, module in model.named_modules() if type(module) in SPARSE_TYPES]
    if not sparse:
        notes.append("no block-sparse layer: sparsekd.sparsify or a pruning method makes some")
    elif missing:
        notes.append(f"every layer stays dense: {missing}")
    found = {site.target for site in sites}
    left = [name for name, module in model.named_modules() if type(module) in LAYERS and name not in found]
    if left:
        why = "not called, called without a batch or with several shapes, or their weight is read elsewhere too"
        notes.append(f"left as they are ({why}): {', '.join(left)}")
    return tuple(notes)


def _record(
    model: nn.Module, traced: fx.GraphModule | None, sites: Sequence[Site], inputs: tuple[Tensor, ...]
) -> dict[str, Any]:
    """What a file needs to find the sites again in a freshly built model, and to refuse another one."""
    return {
        "kind": _KIND,
        "model": checkpoint.fingerprint(model),
        "nodes": _nodes(traced),
        "sites": [asdict(site) for site in sites],
        "inputs": [[list(x.shape), str(x.dtype)] for x in inputs],
    }


def _nodes(network: fx.GraphModule | None) -> dict[str, str]:
    """Name -> what it does, for every node of a trace."""
    if network is None:
        return {}
    return {
        node.name: f"{node.op} {node.target if isinstance(node.target, str) else node.target.__name__}"
        for node in network.graph.nodes
    }


def _check_same(path: Any, what: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name in [*theirs, *ours]:
        if theirs.get(name) != ours.get(name):
            in_file, in_model = theirs.get(name, "missing"), ours.get(name, "missing")
            raise ValueError(
                f"sparsekd.load_frozen: {path} belongs to another model: {what} {name} is {in_file} in the file and "
                f"{in_model} in the model; build the model that was frozen"
            )


def _weight_and_bias(
    path: Any, place: LayerPlan, tensors: Mapping[str, Tensor]
) -> tuple[Tensor | BlockSparse, Tensor | None]:
    """The tensors of one layer, checked: the kernels trust what they are given."""
    geometry, bias = place.geometry, tensors["bias"]
    weight: Tensor | BlockSparse
    if place.pattern is None:
        weight = values = tensors["weight"]
    else:
        values, index = tensors["values"], (tensors["row_ptr"], tensors["col_idx"])
        weight = BlockSparse(values, *index, geometry.weight, BlockPattern.parse(place.pattern))
        weight.validate()
    channels = math.prod(geometry.weight[1:2]) * geometry.groups
    fits = weight.shape == ((0,) if geometry.pool else geometry.weight)
    whole = fits and geometry.input[-1 if geometry.kind == "linear" else 1] == channels
    if not whole or (bias is not None and (bias.shape, bias.dtype) != (geometry.weight[:1], values.dtype)):
        raise ValueError(f"sparsekd.load_frozen: {path} is damaged: the tensors of {place.name} do not fit {geometry}")
    return weight, bias


def _on_this_machine(plan: Plan) -> Plan:
    """The plan of a loaded file, with what differs here said."""
    if isa() == plan.isa:
        return plan
    here = isa() or cpu.missing
    note = f"timed with {plan.isa or 'no compiled kernels'}, here is {here}; freeze again on this machine"
    layers = plan.layers
    if cpu.native is None:
        layers = tuple(
            replace(one, chosen="dense", why=cpu.missing) if one.chosen != "dense" else one for one in layers
        )
    return replace(plan, layers=layers, notes=(*plan.notes, note))
