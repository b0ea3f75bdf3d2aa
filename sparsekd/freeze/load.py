"""Reading a frozen network back into a freshly built model.

A file is believed in nothing: its sites, plan and layers have to be those that the model has, its answer that of the
network which was built of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..backends import cpu
from ..blocks import BlockPattern, BlockSparse
from ..checkpoint import fingerprint
from ..conversion import sparse_type, table_type
from ..convert import replace_layers, sparse_layer, table_as
from ..modes import uncompiled
from ..nn import BlockSparseLayer
from ..nn.embedding_table import SparseTable
from .call import Call
from .checked import dataclass_of
from .deploy import LoadedNetwork, is_exported, load
from .file import Record, check_answer, check_same, nodes_of, read, record_of, weight_and_bias
from .int8 import give_bytes
from .kinds import is_conv, is_transposed, kind_of
from .layer import FORMATS, FrozenLayer
from .measure import density_of, geometry_of, why_dense
from .network import FrozenModel, assemble, cast
from .outputs import BF16_TOLERANCE
from .packed import cpu_layer
from .plan import LayerPlan, Plan
from .prepare import prepare
from .quantize import ByteScale
from .sites import Site, find_sites, weight_shape
from .source import in_eager_mode, trace_by
from .trace import LOCK, Trace, dense_twin

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: BF16_TOLERANCE}


@overload
def load_frozen(path: str | os.PathLike[str], model: nn.Module, *, threads: int | None = None) -> FrozenModel: ...
@overload
def load_frozen(path: str | os.PathLike[str], model: None = None, *, threads: int | None = None) -> LoadedNetwork: ...


def load_frozen(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, threads: int | None = None
) -> FrozenModel | LoadedNetwork:
    """The frozen network that ``FrozenModel.save`` wrote; without a model, the one that ``FrozenModel.export`` wrote.

    Args:
        path: the file.
        model: for a file of ``save`` a freshly built model of the same architecture, its layers dense or block-sparse,
            its weights irrelevant; left as it is. It gives the structure, the file gives tensors and choices.
        threads: as for `freeze`.

    What was chosen stays chosen: freeze again on another machine. Without the compiled module every layer runs dense.

    Raises FileNotFoundError, and ValueError for a damaged file or the file of another model.
    """
    if model is None:
        return load(path, threads)
    if is_exported(path):
        raise ValueError(
            f"sparsekd.load_frozen: {path} is a file of FrozenModel.export, which holds the whole network; leave the "
            "model out: load_frozen(path)"
        )
    try:
        state = read(path)
    except RecursionError as error:
        raise ValueError(f"sparsekd.load_frozen: {path} is damaged: it is nested without end") from error
    try:
        with LOCK, in_eager_mode():
            return build(state, uncompiled(model), threads)
    except RecursionError as error:
        raise ValueError(f"sparsekd.load_frozen: {path} is damaged: it is nested without end") from error
    except ValueError as error:
        raise ValueError(f"sparsekd.load_frozen: {path} {error}") from error


def build(state: Mapping[str, Any], model: nn.Module, threads: int | None) -> FrozenModel:
    """The network that a file describes. Raises ValueError where it does not describe one of this model."""
    record = _damaged(Record.of, state)
    plan = _damaged(_plan_of, state["plan"])
    model = prepare(model)
    model = model.bfloat16() if record.in_bf16 else model
    _check_tensors(state["model"], fingerprint(model))
    if plan.eager is not record.eager:
        raise ValueError("is damaged: its plan is of another network")
    frozen = _dense(state, record, model, plan) if record.eager else _frozen(state, record, model, plan, threads)
    tolerance = 0.1 if record.in_bf16 or any("bytes" in one for one in state["layers"].values()) else None
    dtypes = [p.dtype for p in model.parameters()]
    largest = max((_TOLERANCE.get(dtype, 1e-3) for dtype in dtypes), default=1e-3)
    try:
        said = frozen.answer()
    except Exception as error:
        raise ValueError(f"is damaged: its network fails ({type(error).__name__}: {error})".splitlines()[0]) from error
    _damaged(check_answer, state["answer"], said, tolerance or largest)
    return frozen


def _damaged(check: Any, *arguments: Any) -> Any:
    try:
        return check(*arguments)
    except ValueError as error:
        raise ValueError(f"is damaged: {error}") from error


def _check_tensors(theirs: Any, ours: dict[str, list[int]]) -> None:
    if not isinstance(theirs, dict):
        raise ValueError("is damaged: it does not say of which model it is")
    check_same("tensor", theirs, ours)


def _plan_of(fields: Any) -> Plan:
    plan = dataclass_of(Plan, fields, "the plan")
    if plan.memory_format not in FORMATS or plan.device != "cpu" or plan.threads < 1:
        raise ValueError(f"the plan is for {plan.memory_format} on {plan.device} with {plan.threads} threads")
    for one in plan:
        ours = ("sparse", "dense") if one.pattern is not None else ("native", "dense")
        if one.chosen not in ours or not 0 <= one.density <= 1:
            raise ValueError(f"the plan chose {one.chosen!r} for {one.name}, of density {one.density}")
    return plan


# ---- A network with frozen layers


def _frozen(state: Mapping[str, Any], record: Record, model: nn.Module, plan: Plan, threads: int | None) -> FrozenModel:
    given = _given_sites(state["sites"])
    if _dict(state["layers"]).keys() != {site.name for site in given} or state["kept"] != {}:
        raise ValueError("is damaged: its layers are not those of its sites")
    if [site.name for site in given] != [one.name for one in plan]:
        raise ValueError("is damaged: its plan is not that of its sites")
    tensors = [_tensors_of(place, state["layers"][place.name]) for place in plan]
    _take_over_tables(model, _dict(state["rest"]))
    _take_over_blocks(model, {**_dict(state["rest"]), **_blocks_alone(given, tensors)})
    inputs = record.inputs()
    inputs = cast(inputs, torch.float32, torch.bfloat16) if record.in_bf16 else inputs
    found = _trace(record, model, record.call, inputs)
    check_same("traced nodes", _dict(state["nodes"]), nodes_of(None if found is None else found.network))
    source: nn.Module = model if found is None else found.network
    sites = _sites(given, plan, model, found, inputs)
    layers = {}
    for site, place, held in zip(sites, plan, tensors, strict=True):
        ours = geometry_of(site, source.get_submodule(site.target))
        check_same("layer", {site.name: asdict(place.geometry)}, {site.name: asdict(ours)})
        layers[site.name] = _layer(place, *held, plan.memory_format, threads)
    network = assemble(source, sites, layers)
    _load_rest(network, state["rest"], {name for name, one in network.named_modules() if isinstance(one, FrozenLayer)})
    return FrozenModel(network, _on_this_machine(plan), record_of(state), found)


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"is damaged: it has {str(value)[:40]!r} where a dict is expected")
    return value


def _trace(record: Record, model: nn.Module, call: Call, inputs: tuple[Tensor, ...]) -> Trace | None:
    if not record.traced:
        return None
    try:
        return trace_by(record.traced, model, call, inputs)
    except Exception as error:  # it was traced when it was frozen: this is another model, or other inputs
        raise ValueError(
            f"belongs to another model: {record.traced} cannot trace this one ({type(error).__name__}: {error})"
        ) from error


def _given_sites(theirs: Any) -> list[Site]:
    if not isinstance(theirs, list):
        raise ValueError("is damaged: it has no list of sites")
    given = [_damaged(dataclass_of, Site, one, "a site") for one in theirs]
    if len({site.name for site in given}) != len(given):
        raise ValueError("is damaged: it has a site twice")
    return given


def _sites(
    given: list[Site], plan: Plan, model: nn.Module, found: Trace | None, inputs: tuple[Tensor, ...]
) -> list[Site]:
    """The sites of the model; those of the file have to be the same."""
    if found is None:
        for site in given:
            _check_eager_site(site, model)
        return given
    try:
        sites = find_sites(found.network, inputs)
    except Exception as error:
        raise ValueError(f"belongs to another model: this one fails ({type(error).__name__}: {error})") from error
    named = {site.name: site for site in sites}
    for place in plan:  # which says most about another model
        if place.name in named:
            site = named[place.name]
            ours = asdict(geometry_of(site, found.network.get_submodule(site.target)))
            check_same("layer", {place.name: asdict(place.geometry)}, {place.name: ours})
    check_same("site", {one.name: asdict(one) for one in given}, {one.name: asdict(one) for one in sites})
    if [one.name for one in given] != [one.name for one in sites]:
        raise ValueError("is damaged: its sites are in another order")
    return sites


def _check_eager_site(site: Site, model: nn.Module) -> None:
    """Of a model that runs its own forward: one layer for itself."""
    modules = dict(model.named_modules())
    layer = modules.get(site.target)
    plain = site == Site(site.target, site.target, site.input) and site.name == site.target
    if not plain or layer is None or kind_of(layer) is None or is_transposed(layer):
        raise ValueError(f"belongs to another model: it has no layer {site.target!r} to freeze")
    channels = weight_shape(layer)[1] * getattr(layer, "groups", 1)
    fits = len(site.input) == 4 and site.input[1] == channels if is_conv(layer) else site.input[-1:] == (channels,)
    if not fits:
        raise ValueError(f"is damaged: {site.target} does not take {site.input}")


Weight = tuple["Tensor | BlockSparse", "Tensor | None", "ByteScale | None"]


def _tensors_of(place: LayerPlan, held: Any) -> Weight:
    """Weight, bias and the scale of int8 inputs of one layer."""
    weight, bias = weight_and_bias(place, held)
    if abs(place.density - (density_of(weight) if isinstance(weight, BlockSparse) else 1.0)) > 1e-6:
        raise ValueError(f"is damaged: {place.name} has not the density of its plan")
    if "bytes" not in held:
        return weight, bias, None
    if place.chosen != "sparse":
        raise ValueError(f"is damaged: {place.name} is int8 and not sparse")
    return weight, bias, ByteScale(*_damaged(_bytes, held["bytes"]))


def _layer(
    place: LayerPlan,
    weight: Tensor | BlockSparse,
    bias: Tensor | None,
    scale: ByteScale | None,
    memory_format: str,
    threads: int | None,
) -> FrozenLayer:
    stays_dense = why_dense(place.geometry, weight, memory_format)
    chosen = "dense" if stays_dense else place.chosen
    layer = cpu_layer(place.geometry, weight, bias, chosen=chosen, memory_format=memory_format, threads=threads)
    if scale is not None and chosen == "sparse":
        give_bytes(layer, scale, threads)
    return layer


def _bytes(given: Any) -> tuple[float, int]:
    right = isinstance(given, tuple) and len(given) == 2 and type(given[0]) is float and type(given[1]) is int
    if not right or not (0 < given[0] < 1e30 and 0 <= given[1] <= 255):
        raise ValueError(f"the scale of int8 inputs is {given!r}")
    return given


def _load_rest(network: nn.Module, rest: Any, frozen: set[str]) -> None:
    """Gives the network what is not in frozen layers: exactly what it has, in shape and dtype."""
    ours = network.state_dict()
    inside = tuple(f"{name}." for name in frozen)
    wanted = {name: x for name, x in ours.items() if not name.startswith(inside)}
    if _dict(rest).keys() != wanted.keys():
        odd = sorted(map(str, rest.keys() ^ wanted.keys()))
        raise ValueError(f"belongs to another model: its tensors and those of the model differ in {', '.join(odd[:5])}")
    for name, x in wanted.items():
        given = rest[name]
        if isinstance(x, Tensor) and not (
            isinstance(given, Tensor) and given.shape == x.shape and given.dtype == x.dtype
        ):
            raise ValueError(f"belongs to another model: {name} is not of the shape and dtype that the model has")
        ours[name] = given
    try:
        network.load_state_dict(ours)
    except Exception as error:  # of a module that reads its state itself
        raise ValueError(f"belongs to another model: {error}".splitlines()[0]) from error


def _blocks_alone(sites: list[Site], tensors: list[Weight]) -> dict[str, Tensor]:
    """The blocks of layers that no trace shows: what calls them may ask whether they are block-sparse."""
    return {
        f"{site.target}.{part}": getattr(weight, part)
        for site, (weight, _, _) in zip(sites, tensors, strict=True)
        if not site.nodes and isinstance(weight, BlockSparse)
        for part in ("values", "row_ptr", "col_idx")
    }


def _take_over_blocks(model: nn.Module, rest: Mapping[str, Any]) -> None:
    """Makes layers that freezing left as they are block-sparse or dense as in the file, in place."""
    twins: list[tuple[nn.Module, nn.Module]] = []
    for name, layer in model.named_modules():
        parts = [rest.get(f"{name}.{part}") for part in ("values", "row_ptr", "col_idx")]
        dense = layer.to_dense() if isinstance(layer, BlockSparseLayer) else layer
        if all(isinstance(part, Tensor) for part in parts) and sparse_type(dense) is not None:
            twins.append((layer, _damaged(_with_blocks, name, dense, *parts)))
        elif dense is not layer and f"{name}.weight" in rest:
            twins.append((layer, dense))
    replace_layers(model, twins)


def _take_over_tables(model: nn.Module, rest: Mapping[str, Any]) -> None:
    """Makes embeddings packed, with the entries of the file, or dense as there, in place."""
    twins: list[tuple[nn.Module, nn.Module]] = []
    for name, layer in model.named_modules():
        kept, dense = rest.get(f"{name}.kept"), f"{name}.weight" in rest
        if isinstance(layer, SparseTable) or table_type(layer) is not None:
            twin = layer
            if isinstance(kept, Tensor) or dense:
                try:
                    twin = table_as(layer, packed=not dense)
                except ValueError as error:
                    raise ValueError(f"belongs to another model: {name!r} is a packed table in it, {error}") from error
            if isinstance(kept, Tensor) and isinstance(twin, SparseTable):
                _damaged(twin.rekeep_, kept)
            twins.append((layer, twin))
    replace_layers(model, twins)


def _with_blocks(name: str, dense: Any, values: Tensor, row_ptr: Tensor, col_idx: Tensor) -> BlockSparseLayer:
    kind: Any = sparse_type(dense)
    if values.dim() != 3 or not all(0 < size < 2**20 for size in values.shape[1:]):
        raise ValueError(f"the blocks of {name} are of shape {tuple(values.shape)}")
    pattern = BlockPattern(values.shape[1], values.shape[2])
    blocks = BlockSparse(values, row_ptr, col_idx, kind.matrix_shape_of(dense.weight.shape), pattern)
    try:
        blocks.validate()
        return sparse_layer(dense, pattern, mask=blocks.mask())
    except TypeError as error:
        raise ValueError(f"the blocks of {name} do not fit it: {error}") from error


# ---- A network that runs as it is


def _dense(state: Mapping[str, Any], record: Record, model: nn.Module, plan: Plan) -> FrozenModel:
    if len(plan) or state["layers"] != {} or state["sites"] != [] or state["nodes"] != {}:
        raise ValueError("is damaged: it runs the model's own forward, and has layers for another")
    dense = dense_twin(model, tables=False)
    if dense is None:
        raise ValueError("belongs to another model: this one is scripted")
    rest = dict(_dict(state["rest"]))
    _take_over_tables(dense, rest)
    dense = dense.requires_grad_(False)
    kept: dict[str, BlockSparse] = {}
    for name, held in _dict(state["kept"]).items():
        kept[name] = _damaged(_kept, name, held, dense)
        rest[f"{name}.weight"] = kept[name].to_dense()
    _load_rest(dense, rest, set())
    return FrozenModel(dense, _on_this_machine(plan), record_of(state), None, kept)


def _kept(name: str, held: Any, dense: nn.Module) -> BlockSparse:
    weight: Any = dict(dense.named_parameters(remove_duplicate=False)).get(f"{name}.weight")
    sizes = held.get("pattern") if isinstance(held, dict) else None
    whole = isinstance(sizes, list) and len(sizes) == 2 and all(type(one) is int and 0 < one < 2**20 for one in sizes)
    if weight is None or sizes is None or not whole or list(held) != ["pattern", "values", "row_ptr", "col_idx"]:
        raise ValueError(f"the blocks of {name} are not those of a layer")
    if not all(isinstance(held[part], Tensor) for part in ("values", "row_ptr", "col_idx")):
        raise ValueError(f"the blocks of {name} are no tensors")
    values, row_ptr, col_idx = held["values"], held["row_ptr"], held["col_idx"]
    blocks = BlockSparse(values, row_ptr, col_idx, tuple(weight.shape), BlockPattern(sizes[0], sizes[1]))
    try:
        blocks.validate()
    except TypeError as error:
        raise ValueError(str(error)) from error
    return blocks


def _on_this_machine(plan: Plan) -> Plan:
    """The plan of a loaded file, with what differs here said."""
    if cpu.isa() == plan.isa:
        return plan
    here = cpu.isa() or cpu.missing
    note = f"timed with {plan.isa or 'no compiled kernels'}, here is {here}; freeze again on this machine"
    layers = plan.layers
    if cpu.native is None:
        layers = tuple(
            replace(one, chosen="dense", why=cpu.missing) if one.chosen != "dense" else one for one in layers
        )
    return replace(plan, layers=layers, notes=(*plan.notes, note))


__all__ = ["build", "load_frozen"]
