"""What a file of a frozen network holds: tensors and JSON, no code and no pickle.

The structure comes from a model that the reader builds, as with a state dict, and the file says which of its nodes to
fuse. So no file can make `load_frozen` run anything.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, fx, nn

from ..blocks import BlockPattern, BlockSparse
from ..checkpoint import fingerprint, load_state, save_state
from .layer import FrozenLayer
from .plan import LayerPlan, Plan
from .sites import Site

_KIND = "sparsekd-frozen"


def save(path: str | os.PathLike[str], record: Mapping[str, Any], plan: Plan, network: nn.Module) -> None:
    """A block-sparse layer is stored as its blocks, whatever was chosen for this machine."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, FrozenLayer)}
    inside = tuple(f"{name}." for name in layers)
    rest = {name: x for name, x in network.state_dict().items() if not name.startswith(inside)}
    tensors = {name: layer.tensors() for name, layer in layers.items()}
    save_state({**record, "plan": plan.to_dict(), "layers": tensors, "rest": rest}, path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record and what `save` added to it. Raises FileNotFoundError, and ValueError for any other file."""
    state = load_state(path)
    if not isinstance(state, dict) or state.get("kind") != _KIND:
        raise ValueError(f"sparsekd.load_frozen: {path} holds no frozen network; FrozenModel.save writes one")
    return state


def record_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The record in what `read` returned."""
    return {key: state[key] for key in ("kind", "model", "nodes", "sites", "inputs", "in_bf16") if key in state}


def describe(
    model: nn.Module, traced: fx.GraphModule | None, sites: Sequence[Site], inputs: tuple[Tensor, ...]
) -> dict[str, Any]:
    """What a file needs to find the sites again in a freshly built model, and to refuse another one."""
    return {
        "kind": _KIND,
        "model": fingerprint(model),
        "nodes": nodes_of(traced),
        "sites": [asdict(site) for site in sites],
        "inputs": [[list(x.shape), str(x.dtype)] for x in inputs],
    }


def nodes_of(network: fx.GraphModule | None) -> dict[str, str]:
    """Name -> what it does, for every node of a trace."""
    if network is None:
        return {}
    return {
        node.name: f"{node.op} {node.target if isinstance(node.target, str) else node.target.__name__}"
        for node in network.graph.nodes
    }


def check_same(path: Any, what: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name in [*theirs, *ours]:
        if theirs.get(name) != ours.get(name):
            in_file, in_model = theirs.get(name, "missing"), ours.get(name, "missing")
            raise ValueError(
                f"sparsekd.load_frozen: {path} belongs to another model: {what} {name} is {in_file} in the file and "
                f"{in_model} in the model; build the model that was frozen"
            )


def weight_and_bias(
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
