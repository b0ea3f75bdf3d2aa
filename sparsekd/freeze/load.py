"""Reading a frozen network back into a freshly built model."""

from __future__ import annotations

import os
from dataclasses import asdict, replace

from torch import nn

from ..backends import cpu
from ..checkpoint import fingerprint
from .file import check_same, nodes_of, read, record_of, weight_and_bias
from .measure import geometry_of, why_dense
from .network import FrozenModel, assemble
from .packed import cpu_layer
from .plan import Plan
from .sites import Site, trace
from .source import prepare


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
    state = read(path)
    model = prepare(model)
    model = model.bfloat16() if state.get("in_bf16") else model
    check_same(path, "tensor", state["model"], fingerprint(model))
    traced, note = trace(model, len(state["inputs"])) if state["nodes"] else (None, "")
    check_same(path, note or "traced nodes", state["nodes"], nodes_of(traced))
    source: nn.Module = model if traced is None else traced
    plan, layers = Plan.from_dict(state["plan"]), {}
    sites = [Site(**site) for site in state["sites"]]
    for site in sites:
        place, tensors = plan[site.name], state["layers"][site.name]
        ours = geometry_of(site, source.get_submodule(site.target))
        check_same(path, "layer", {site.name: asdict(place.geometry)}, {site.name: asdict(ours)})
        weight, bias = weight_and_bias(path, place, tensors)
        chosen = "dense" if why_dense(place.geometry, weight, plan.memory_format) else place.chosen
        layers[site.name] = cpu_layer(
            place.geometry, weight, bias, chosen=chosen, memory_format=plan.memory_format, threads=threads
        )
    network = assemble(source, sites, layers)
    network.load_state_dict({**network.state_dict(), **state["rest"]})
    return FrozenModel(network, _on_this_machine(plan), record_of(state))


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
